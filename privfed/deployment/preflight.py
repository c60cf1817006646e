"""What can be known to be wrong before a run begins, without asking a site for anything about its records."""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography.x509 import load_pem_x509_certificate

from privfed.config import Config
from privfed.errors import PrivfedError
from privfed.privacy.errors import PrivacyError

from . import files, jobs, runs, submission
from .consortium import ADMIN, SERVER, Consortium


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str


def check(consortium: Consortium, config: Config | None) -> tuple[Finding, ...]:
    """All findings; nothing is spent, and no site is asked for more than that it is there."""
    findings = [_certificate(consortium.home / kit) for kit in (SERVER, ADMIN)]
    roster = consortium.roster()
    members = {member.name for member in roster.members} if roster else set()
    described = f"version {roster.version}: {', '.join(sorted(members))}" if roster else "there is none"
    findings.append(Finding("roster", roster is not None, described))
    if config is not None and roster is not None:
        try:
            noise = runs.plan(config, consortium, roster).noise_multiplier
            findings.append(Finding("experiment", True, f"it can run; noise multiplier {noise:g}"))
        except (PrivfedError, PrivacyError) as error:
            findings.append(Finding("experiment", False, str(error)))
    try:
        session = submission.connect(consortium, seconds=10.0)
    except files.DeploymentError as error:
        return (*findings, Finding("server", False, str(error)))
    here = set(jobs.clients(session))
    session.close()
    findings.append(Finding("server", True, f"{consortium.terms.host}:{consortium.terms.port} answers over mTLS"))
    missing, strange = sorted(members - here), sorted(here - members)
    there = f"{len(members & here)} of {len(members)} are connected"
    findings.append(Finding("sites", not missing, there + (f"; missing: {', '.join(missing)}" if missing else "")))
    if strange:
        findings.append(
            Finding("others", True, f"connected, but in no roster, and so never asked: {', '.join(strange)}")
        )
    return tuple(findings)


def _certificate(kit: Path) -> Finding:
    (path,) = (*kit.glob("startup/server.crt"), *kit.glob("startup/client.crt"))
    end = load_pem_x509_certificate(files.read(path)).not_valid_after_utc
    return Finding(f"certificate of the {kit.name}", end > datetime.now(UTC), f"valid until {end:%Y-%m-%d}")
