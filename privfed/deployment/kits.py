"""NVIDIA FLARE's own certificates, packaging and settings, asked for as this toolkit needs them.

Keys are made where they are used (``nvflare cert request``), signed where the CA is (``nvflare cert approve``) and put
together again where the key is (``nvflare package``). Central provisioning would make everybody's keys in one place.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import NameOID

from . import files
from .files import DeploymentError

CONTROLLER = "privfed.deployment.flare.CoordinatorController"
EXECUTOR = "privfed.deployment.flare.SiteExecutor"
LAUNCHER = "privfed.engines.nvflare.RespawningLauncher"
OWN = "privfed.json"
"""In a kit's ``local/``: where the folder is that the kit belongs to."""

CA, PROFILE = "ca", "profile.yaml"

Role = Literal["server", "site"]


def require_flare() -> None:
    """Return if NVIDIA FLARE is installed."""
    if find_spec("nvflare") is None:
        raise DeploymentError("a deployment needs NVIDIA FLARE: pip install -c constraints.txt '.[nvflare]'")


def flare(*commands: Sequence[str | Path], home: Path) -> None:
    """Commands of FLARE's own, in one process. What it remembers of its requests goes to ``home``, not to the user's.

    Raises:
        DeploymentError: one failed, and none after it was tried; with its own words.
    """
    require_flare()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps([[str(word) for word in command] for command in commands])],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        umask=0o077,
        check=False,
    )
    if done.returncode:
        raise DeploymentError(f"nvflare: {(done.stdout + done.stderr).strip()}")


_COMMANDS = """
import json, sys
from nvflare.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["nvflare", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def profile(name: str, host: str, port: int) -> str:
    """What all certificates and kits of a consortium agree on, as FLARE reads it (JSON is YAML)."""
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    return json.dumps({"name": name, "scheme": "tcp", "connection_security": "mtls", "server": server}, indent=1)


def flare_name(organisation: str) -> str:
    """An organisation as FLARE spells one: without hyphens."""
    return organisation.replace("-", "_")


def participant(consortium: str, **settings: Any) -> str:
    """One party of a consortium, as FLARE reads it."""
    return json.dumps({"name": consortium, "description": consortium, "participants": [settings]}, indent=1)


def new_authority(folder: Path, name: str, host: str, port: int) -> str:
    """A CA of a consortium's own, in ``folder``; its fingerprint. The key stays there, mode 0600."""
    files.write(folder / PROFILE, profile(name, host, port).encode())
    flare(("cert", "init", "--profile", folder / PROFILE, "-o", folder / CA), home=folder / ".flare")
    (folder / CA / "rootCA.key").chmod(0o600)
    return fingerprint(folder / CA / "rootCA.pem")


def request(folder: Path, consortium: str, **party: Any) -> Path:
    """A key and a request for its certificate, in ``folder``; the request, which is all that may leave."""
    folder.mkdir(mode=0o700, parents=True)
    definition = folder.with_name(f".{folder.name}.party")
    files.write(definition, participant(consortium, **party).encode())
    flare(("cert", "request", "-p", definition, "--out", folder, "--force"), home=folder / ".flare")
    definition.unlink()
    return folder / f"{party['name']}.request.zip"


def approve(authority: Path, asked: Path, signed: Path) -> Path:
    """Sign a request with the CA of ``authority``; what goes back to who asked."""
    flare(
        ("cert", "approve", asked, "-c", authority / CA, "--profile", authority / PROFILE, "--out", signed),
        home=authority / ".flare",
    )
    return signed


def require_site(signed: Path, name: str) -> None:
    """Return if what the CA signed is a site's certificate in this name: a request could ask to be a server's.

    Raises:
        DeploymentError: it is another's; it must not go out.
    """
    with zipfile.ZipFile(signed) as archive:
        certificates = [part for part in archive.namelist() if part.endswith(".crt")]
        subjects = [load_pem_x509_certificate(archive.read(part)).subject for part in certificates]
    for subject in subjects:
        names = [str(entry.value) for entry in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        kinds = {str(entry.value) for entry in subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)}
        if names != [name] or not kinds <= {"client"}:
            raise DeploymentError(f"the request is not for a certificate of a site named {name!r}: it is refused")
    if not subjects:
        raise DeploymentError("the CA has signed nothing")


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """From when to when a certificate in PEM counts."""
    found = load_pem_x509_certificate(certificate)
    return found.not_valid_before_utc, found.not_valid_after_utc


def signed_validity(signed: Path) -> tuple[datetime, datetime]:
    """The same of what `approve` has signed."""
    with zipfile.ZipFile(signed) as archive:
        (certificate,) = (part for part in archive.namelist() if part.endswith(".crt"))
        return validity(archive.read(certificate))


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a certificate, as people compare it: AB:CD:…"""
    digest = load_pem_x509_certificate(files.read(certificate)).fingerprint(SHA256()).hex().upper()
    return "SHA256:" + ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))


def package(signed: Path, request: Path, *, fingerprint: str, out: Path, name: str, home: Path) -> Path:
    """Put a kit together from what the CA signed and the key that never left; its folder."""
    flare(_package(signed, request, fingerprint=fingerprint, out=out), home=home)
    return _unpacked(out, name)


def own_kits(authority: Path, consortium: str, mark: str, parties: Mapping[str, Mapping[str, Any]]) -> None:
    """Kits of parties that live where the CA does: the server, and the person who submits jobs.

    Args:
        authority: folder of the CA; each kit is made in it.
        mark: the CA's fingerprint.
        parties: folder → what FLARE knows of the party.
    """
    commands: list[Sequence[str | Path]] = []
    for folder, party in parties.items():
        definition, asked = authority / f".{folder}.party", authority / f"{folder}.request"
        signed = authority / f"{folder}.signed.zip"
        files.write(definition, participant(consortium, **party).encode())
        request = asked / f"{party['name']}.request.zip"
        commands += [
            ("cert", "request", "-p", definition, "--out", asked, "--force"),
            ("cert", "approve", request, "-c", authority / CA, "--profile", authority / PROFILE, "--out", signed),
            _package(signed, asked, fingerprint=mark, out=authority / folder),
        ]
    flare(*commands, home=authority / ".flare")
    for folder, party in parties.items():
        _unpacked(authority / folder, party["name"])
        for used in (authority / f".{folder}.party", authority / f"{folder}.signed.zip"):
            used.unlink()


def _package(signed: Path, request: Path, *, fingerprint: str, out: Path) -> Sequence[str | Path]:
    work = out.with_name(f".{out.name}.work")
    return ("package", signed, "-w", work, "--request-dir", request, "--fingerprint", fingerprint, "--force")


def _unpacked(out: Path, name: str) -> Path:
    """The kit where it belongs: FLARE puts it deep below a workspace."""
    work = out.with_name(f".{out.name}.work")
    (made,) = work.glob(f"*/prod_00/{name}")
    os.replace(made, out)
    shutil.rmtree(work)
    for private in (*out.glob("startup/*.key"), *out.glob("startup/*.crt"), *out.glob("startup/*.json")):
        private.chmod(0o600)
    return out


def harden(kit: Path, role: Role, owner: Path, *, classes: tuple[str, ...] | None = None) -> None:
    """Write the settings that only this party decides: no job and no other party can change them.

    Args:
        kit: a kit of `package`.
        owner: the site's or the coordinator's folder.
        classes: what a job may have built here; default this toolkit's one class of the role.

    Guarantees:
        A job that names another class is refused, and so is one that brings code. Nobody has shell commands. Logs are
        not streamed to another party. Job processes write below the kit. The parts of FLARE's own that do none of what
        we need (log streaming, storage under /tmp) are gone.
    """
    local = kit / "local"
    settings = json.loads((local / "resources.json.default").read_text())
    settings["class_list_enforcement_mode"] = "enforce"
    settings["class_allow_list"] = list(classes or ((CONTROLLER,) if role == "server" else (EXECUTOR,)))
    settings["allow_log_streaming"] = False
    parts = {part["id"]: part for part in settings["components"]}
    for streaming in ("site_log_streamer", "log_receiver"):
        parts.pop(streaming, None)
    if role == "server":
        settings["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
        parts["job_manager"]["args"]["uri_root"] = str(kit / "jobs")
    else:
        parts["process_launcher"]["path"] = LAUNCHER
    settings["components"] = list(parts.values())
    files.write(local / "resources.json", json.dumps(settings, indent=1).encode())
    files.write(local / "authorization.json", json.dumps(_rights(role), indent=1).encode())
    files.write(local / "log_config.json", json.dumps(_logs(local), indent=1).encode())
    files.write(local / OWN, json.dumps({"folder": str(owner.absolute())}).encode())


def owner_of(local: Path) -> Path:
    """The folder that a kit's ``local/`` belongs to."""
    return Path(json.loads(files.read(local / OWN))["folder"])


def _rights(role: Role) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("submit_job", "clone_job", "manage_job", "download_job", "operate", "shell_commands", "byoc"), "none"
    )
    lead = {
        **nothing,
        "submit_job": "any",
        "manage_job": "n:submitter" if role == "server" else "any",
        "view": "any",
        "server-predeployed-flwr": "none",
    }
    # "project_admin" may do anything by default, and "org_admin" and "member" are roles that this toolkit gives nobody
    return {
        "format_version": "1.0",
        "permissions": {
            "lead": lead,
            "project_admin": {**nothing, "view": "any"},
            "org_admin": {**nothing, "view": "any"},
            "member": {**nothing, "view": "any"},
        },
    }


def _logs(local: Path) -> dict[str, Any]:
    """FLARE's own settings, with one file instead of four, of warnings and what this toolkit says."""
    settings: dict[str, Any] = json.loads((local / "log_config.json.default").read_text())
    settings["handlers"] = {"logFileHandler": settings["handlers"]["logFileHandler"]}
    settings["loggers"] = {"root": {"level": "INFO", "handlers": ["logFileHandler"]}}
    return settings
