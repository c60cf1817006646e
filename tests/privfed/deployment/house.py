"""A consortium of three hospitals in folders, with everything but FLARE: its certificates and kits are left away."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pandas as pd
from sklearn.datasets import load_breast_cancer

from privfed import config_io
from privfed.config import Config, Policy
from privfed.crypto import keys
from privfed.deployment import account, kits, papers
from privfed.deployment.account import Account
from privfed.deployment.blocks import Block, do_block
from privfed.deployment.consortium import Consortium
from privfed.deployment.durable import DurableSite
from privfed.deployment.files import DeploymentError, write_toml
from privfed.deployment.history import Reminded
from privfed.deployment.hospital import SITE, Hospital, Strict, Study
from privfed.deployment.signed import SignedHandler, coordinator_key, reminding
from privfed.engines.contract import Engine, Handler
from privfed.engines.local import LocalEngine

SITES = ("north", "south", "west")
SEED = 7
OPEN = msgspec.structs.replace(Strict, release_figures=True, key_holders=None)


def tables(folder: Path, sites: Sequence[str] = SITES) -> dict[str, str]:
    """Hospitals' tables: public records, cut in parts."""
    raw = load_breast_cancer()
    frame = pd.DataFrame(
        raw.data[:, :6], columns=["radius", "texture", "perimeter", "area", "smoothness", "compactness"]
    )
    frame["label"] = raw.target
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for number, site in enumerate(sites):
        paths[site] = str(folder / f"{site}.csv")
        frame.iloc[number :: len(sites)].head(120).to_csv(paths[site], index=False)
    return paths


def experiment(paths: dict[str, str], **more: Any) -> Config:
    """An experiment over them; as a user's file has it."""
    ranges = {
        "radius": [5, 30],
        "texture": [5, 40],
        "perimeter": [40, 190],
        "area": [100, 2600],
        "smoothness": [0.05, 0.17],
        "compactness": [0.01, 0.4],
    }
    table: dict[str, Any] = {
        "name": "pilot",
        "rounds": 3,
        "data": {
            "source": "csv",
            "files": paths,
            "label": "label",
            "classes": {"benign": ["1"], "malignant": ["0"]},
            "numeric": [{"name": name, "range": low_high} for name, low_high in ranges.items()],
        },
        "privacy": {"delta": 1e-5, "target_epsilon": 3.0},
        "simulation": {"deadline_seconds": 30},
        "evaluation": {"local_steps": 5},
    }
    for key, value in more.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
    return config_io.decode(table)


@contextmanager
def without_flare() -> Iterator[None]:
    """FLARE's part of a folder, left away: certificates, kits and their settings."""

    def nothing(*_: object, **__: object) -> None:
        pass

    def a_file(folder: Path, *_: object, **__: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "flare.request.zip"
        path.write_bytes(b"a request for a certificate")
        return path

    def a_kit(*_: object, out: Path, **__: object) -> Path:
        (out / "local").mkdir(parents=True)
        (out / "startup").mkdir()
        return out

    def signed(_: Path, asked: Path, path: Path) -> Path:
        path.write_bytes(b"a certificate")
        return path

    with ExitStack() as stack:
        for name, stand_in in {
            "require_flare": nothing,
            "own_kits": nothing,
            "harden": nothing,
            "require_site": nothing,
            "request": a_file,
            "package": a_kit,
            "approve": signed,
            "new_authority": lambda *_: "SHA256:00",
        }.items():
            stack.enter_context(mock.patch.object(kits, name, stand_in))
        yield


def found(
    home: Path,
    config: Config,
    *,
    port: int = 8102,
    policy: Policy = OPEN,
    study: bool = True,
    engine: papers.EngineName = "nvflare",
) -> Consortium:
    """A consortium, its hospitals beside it, all set up."""
    sites: dict[str, str] = config.data.files  # type: ignore[union-attr]
    consortium = Consortium.create(
        home / "coordinator",
        config,
        name="consortium",
        contact="c@example.org",
        host="localhost",
        port=port,
        engine=engine,
    )
    for site in sites:
        body = Hospital.request(
            home / site,
            consortium="consortium",
            name=site,
            organisation=f"{site}-hospital",
            contact=f"it@{site}.org",
            engine=engine,
        )
        consortium.approve(body)
    consortium.next_roster()
    for site in sites:
        hospital = Hospital.open(home / site)
        hospital.install(
            consortium.kit(site),
            authority=consortium.terms.authority,
            data=Path(sites[site]),
            policy=policy,
        )
        if study:
            file = msgspec.structs.replace(Hospital.open(home / site).file, study=Study(insecure_seed=SEED))
            write_toml(home / site / SITE, file, comment="reproducible")
    return consortium


@contextmanager
def at_work(home: Path) -> Iterator[dict[str, DurableSite]]:
    with ExitStack() as stack:
        yield {site: stack.enter_context(Hospital.open(home / site).opened()) for site in SITES}


class Tapped:
    """An engine on whose line somebody listens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seen: list[dict[str, bytes]] = []

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        self.seen.append(dict(requests))
        return self._engine.exchange(self.seen[-1], deadline_seconds)


def signed_sites(home: Path, sites: Mapping[str, Handler]) -> dict[str, SignedHandler]:
    """Sites that read what the coordinator has signed for them, as in a job with rounds."""
    there = {site: Hospital.open(home / site) for site in sites}
    return {
        site: SignedHandler(one, there[site].terms, site, admit=Reminded(there[site])) for site, one in sites.items()
    }


def signed_block(consortium: Consortium, run: str, rounds: int) -> list[dict[str, bytes]]:
    """A job whose requests are signed; what went over the line. A site that can not work is not there."""
    home = consortium.home.parent
    with ExitStack() as stack:
        sites: dict[str, Handler] = {}
        for site in SITES:
            with suppress(DeploymentError):
                sites[site] = stack.enter_context(Hospital.open(home / site).opened())
        line = Tapped(LocalEngine(signed_sites(home, sites)))
        do_block(consortium, Block(run, rounds), stack.enter_context(reminding(line, consortium)), set)
    return line.seen


def body_of(request: bytes) -> bytes:
    """The message in a signed request."""
    start = keys.SIGNATURE_BYTES + 4
    return request[start + int.from_bytes(request[start - 4 : start], "big") :]


def account_of(consortium: Consortium, **changed: Any) -> bytes:
    """The coordinator's account of north, changed and signed by it as it then is."""
    given = msgspec.json.decode(account.account(consortium, "north"), type=Account)
    given = msgspec.structs.replace(given, **changed, signature="")
    signature = keys.sign(coordinator_key(consortium.home), given.statement).hex()
    return msgspec.json.encode(msgspec.structs.replace(given, signature=signature))


def hospital(consortium: Consortium, name: str = "north") -> Hospital:
    """A site of `found`, opened anew."""
    return Hospital.open(consortium.home.parent / name)


__all__ = [
    "SEED",
    "SITES",
    "Tapped",
    "account_of",
    "at_work",
    "body_of",
    "experiment",
    "found",
    "hospital",
    "papers",
    "signed_block",
    "signed_sites",
    "tables",
    "without_flare",
]
