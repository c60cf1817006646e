"""Check a privfed ledger without privfed: python check_export.py EXPORT.jsonl [KEYS.json]

EXPORT.jsonl comes from `privfed accountant export LEDGER --out EXPORT.jsonl`. KEYS.json is
{"site": "public key in hex"}, which you should have from the sites themselves. It needs Python 3.11 and the package
`cryptography`; with `dp-accounting` installed it also recomputes ε where all events are Gaussian.

What is checked, for each site: h0 = SHA256("privfed-ledger/1" 0 ledger 0 site), h_i = SHA256(h_{i-1} body_i); every
signed word is about an entry that is there and is signed by its site; every root that the coordinator signed is that
of the sites' words before it (RFC 6962 leaves and nodes, padded with zeros to a power of two); with KEYS.json, every
entry is covered by a word under one of these keys. The coordinator's other entries are audits, which are printed, and
the ends of runs, whose digests `sha256sum` recomputes in the run's folder.
"""

import hashlib
import json
import pathlib
import sys

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def fail(what: str) -> None:
    sys.exit(f"NOT VERIFIED: {what}")


def root(leaves: list[bytes]) -> bytes:
    level = [sha(b"\0", leaf) for leaf in leaves]
    while len(level) & (len(level) - 1):
        level.append(bytes(32))
    while len(level) > 1:
        level = [sha(b"\1", level[i], level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def signed_bytes(text: str, signature: str) -> bytes:
    """The word's own text without its signature: JSON is not spelled anew, numbers have several spellings."""
    parts = (b"privfed/seal/1", text.replace(signature, "").encode())
    return sha(*(len(part).to_bytes(8, "big") + part for part in parts))


def main(export: str, keys_file: str | None = None) -> None:
    with open(export, encoding="utf-8") as file:
        header, *lines = map(json.loads, file)
    given = json.loads(pathlib.Path(keys_file).read_text("utf-8")) if keys_file else {}
    keys, covered = dict(given), dict[str, int]()
    heads, bodies = dict[str, list[str]](), dict[str, list[dict]]()
    batch, words, roots, elsewhere = list[bytes](), 0, 0, dict[str, str]()
    for line in lines:
        if "body" in line:
            site, body = line["site"], line["body"].encode()
            genesis = sha(b"privfed-ledger/1\0", header["ledger"].encode(), b"\0", site.encode()).hex()
            chain = heads.setdefault(site, [genesis])
            chain.append(sha(bytes.fromhex(chain[-1]), body).hex())
            entry = json.loads(body)
            if chain[-1] != line["hash"] or entry["sequence"] != len(chain) - 1 or entry["entry"]["site"] != site:
                fail(f"site {site!r}, entry {len(chain) - 1}")
            bodies.setdefault(site, []).append(entry["entry"])
            continue
        words += 1
        word = json.loads(line["statement"])
        site, where = word["site"], f"signed word {words} (site {word['site']!r}, round {word['round']})"
        home = header["ledger"]
        if word["ledger"] != home and site not in heads:  # a deployed site keeps its own: here only its words are
            home = elsewhere.setdefault(site, word["ledger"])
            if keys_file and site not in given:
                fail(f"{where}: there is no key of this site, anybody may have signed it")
        if keys.setdefault(site, word["key"]) != word["key"] or word["ledger"] != home:
            fail(f"{where}: another key or ledger")
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(word["key"]))
            public.verify(bytes.fromhex(word["signature"]), signed_bytes(line["statement"], word["signature"]))
        except (InvalidSignature, ValueError):
            fail(f"{where}: signature")
        if site not in elsewhere:
            if word["sequence"] >= len(heads.get(site, [""])) or heads[site][word["sequence"]] != word["head"]:
                fail(f"{where}: its entry is not there")
            covered[site] = word["sequence"]
        if site != "coordinator":
            batch.append(line["statement"].encode())
            continue
        entry = bodies[site][word["sequence"] - 1]
        if entry["kind"] in ("audit", "end") and not batch:
            continue
        if entry["kind"] != "witness" or root(batch).hex() != entry["dataset"]:
            fail(f"{where}: root")
        batch, roots = [], roots + 1
    for site in sorted(elsewhere):
        if site in bodies:
            fail(f"site {site!r}: words of another ledger beside its own chain")
        print(f"  {site}: signed words alone; its entries are in its own ledger")
    loose, trusted = [], given if keys_file else heads
    for site, entries in bodies.items():
        print(f"  {site}: {epsilon(entries)}")
        first = covered.get(site, 0) + 1 if site in trusted else 1
        if first <= len(entries):
            why = "no signed word covers them" if site in trusted else "there is no key of this chain"
            loose.append(f"site {site!r}, entries {first} to {len(entries)}: {why}")
        for entry in (one for one in entries[: covered.get(site, 0)] if one["kind"] == "audit"):
            found = json.loads(entry["metadata"]["audit"])
            bound = f"ε at least {found['epsilon_lower']:.4g}, claimed {found['claimed_epsilon']}"
            print(f"    audit of {entry['run']}, level {found['level']}: {found['verdict']}, {bound}")
    if keys_file and loose:
        fail("anybody may have written " + "; ".join(loose))
    total = sum(map(len, bodies.values()))
    print(f"verified: {total} entries of {len(bodies)} chains, {words} signed words, {roots} roots")
    if not keys_file:
        print("  signatures agree with each other; give KEYS.json to know whose they are", *loose, sep="\n  ")


def epsilon(entries: list[dict]) -> str:
    """ε at δ = 1e-5 of un-split Gaussian events, by dp-accounting; else how many charges there are."""
    charges = [charge for entry in entries if entry["kind"] in ("charge", "reserve") for charge in entry["charges"]]
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return f"{len(charges)} charges"
    accountant = PLDAccountant()
    for charge in charges:
        event = charge["event"]
        if event["type"] not in ("gaussian", "poisson-gaussian") or charge["group"] != "all":
            return f"{len(charges)} charges, not all of them un-split Gaussian: see `privfed accountant verify`"
        gaussian = GaussianDpEvent(event["noise_multiplier"])
        rate = event.get("sample_rate", 1.0)
        accountant.compose(PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian, charge["count"])
    return f"ε = {accountant.get_epsilon(1e-5):.4f} at δ = 1e-5 by dp-accounting" if charges else "nothing spent"


if __name__ == "__main__":
    main(*sys.argv[1:3])
