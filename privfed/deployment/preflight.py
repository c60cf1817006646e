"""What can be known to be wrong before a run begins: at the coordinator, and in a job that looks at every site."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import msgspec

from privfed import config_io
from privfed.config import Config
from privfed.engines.contract import Engine
from privfed.errors import PrivfedError
from privfed.privacy.errors import PrivacyError
from privfed.privacy.ledger import utc_now

from . import files, jobs, kits, runs, submission, survey
from .consortium import ADMIN, JOB, MEMBERS, SERVER, Consortium
from .files import DeploymentError
from .inspection import Order
from .survey import Finding

PREFLIGHT = "preflight"
"""Folder at the coordinator: an experiment that a job looks at, and what it found."""

SOON = timedelta(days=30)
_CONNECT_SECONDS = 20.0
_JOB_SECONDS = 300.0


def check(
    consortium: Consortium,
    config: Config | None,
    *,
    clock: Callable[[], datetime] = utc_now,
    waiting: Callable[[str], None] = lambda what: None,
) -> tuple[Finding, ...]:
    """All findings. Nothing is spent, and no site tells anything about its records.

    Args:
        waiting: told what takes a while.
    """
    findings = [*_certificates(consortium, clock()), *_plan(consortium, config)]
    try:
        session = submission.connect(consortium, seconds=10.0)
    except DeploymentError as error:
        return (*findings, Finding("server", False, str(error), "start it; its log.txt says what is wrong"))
    try:
        terms = consortium.terms
        findings.append(Finding("server", True, f"{terms.host}:{terms.port} answers over mTLS"))
        roster = consortium.roster()
        if roster is None:
            return tuple(findings)
        members = {member.name for member in roster.members}
        here = _wait_for(members, session)
        findings += _connected(members, here)
        if members & here:
            waiting(f"asking {len(members & here)} sites, and adding up zeros")
            findings += _from_job(consortium, config, session)
    finally:
        with suppress(Exception):
            session.close()
    return tuple(findings)


def answer(consortium: Consortium, order: Order, engine: Engine, present: Callable[[set[str]], set[str]]) -> None:
    """The job's side: look at the sites and leave the findings where `check` waits for them."""
    folder = consortium.home / PREFLIGHT
    asked = folder / f"{order.preflight}.toml"
    try:
        config = config_io.load_config(asked) if asked.exists() else None
        found = survey.survey(consortium, config, order, engine, present)
    except (PrivfedError, PrivacyError) as error:
        found = (Finding("sites", False, str(error), "put that right, and try again"),)
    files.write(folder / f"{order.preflight}.json", msgspec.json.encode(found))


def _certificates(consortium: Consortium, now: datetime) -> Iterator[Finding]:
    """The coordinator's own, and the sites' as they were signed here."""
    paths = {f"certificate of the {kit}": consortium.home / kit / "startup" for kit in (SERVER, ADMIN)}
    for what, folder in paths.items():
        (path,) = (*folder.glob("server.crt"), *folder.glob("client.crt"))
        yield _validity(what, *kits.validity(files.read(path)), now)
    wrong = []
    for member in consortium.members:
        signed = consortium.home / MEMBERS / f"{member.name}.signed.zip"
        finding = _validity(member.name, *kits.signed_validity(signed), now)
        wrong += [finding] if not finding.ok else []
    yield (
        Finding("certificates signed here", True, f"all {len(consortium.members)} count")
        if not wrong
        else Finding(
            "certificates signed here",
            False,
            "; ".join(f"{finding.what}: {finding.found}" for finding in wrong),
            wrong[0].next,
        )
    )


def _validity(what: str, begin: datetime, end: datetime, now: datetime) -> Finding:
    if now < begin:
        return Finding(
            what,
            False,
            f"does not count before {begin:%Y-%m-%d %H:%M} UTC",
            "set this machine's clock: NTP, or by hand",
        )
    if now > end - SOON:
        return Finding(
            what,
            now <= end,
            f"valid until {end:%Y-%m-%d}",
            "have it made anew: a site by privfed consortium request, approve and kit; a server by a new consortium",
        )
    return Finding(what, True, f"valid until {end:%Y-%m-%d}")


def _plan(consortium: Consortium, config: Config | None) -> Iterator[Finding]:
    """The roster, and whether the experiment can be run with it."""
    roster = consortium.roster()
    if roster is None:
        yield Finding("roster", False, "there is none", f"privfed consortium roster {consortium.home}")
        return
    names = ", ".join(member.name for member in roster.members)
    yield Finding("roster", True, f"version {roster.version}: {names}")
    if config is None:
        return
    try:
        noise = runs.plan(config, consortium, roster).noise_multiplier
        yield Finding("experiment", True, f"it can run; noise multiplier {noise:g}")
    except (PrivfedError, PrivacyError) as error:
        yield Finding("experiment", False, str(error), "change the experiment's file")


def _wait_for(members: set[str], session: Any) -> set[str]:
    """Who is connected, when all are or the time is over: one that was just started needs a while."""
    end = time.monotonic() + _CONNECT_SECONDS
    while not members <= (here := set(jobs.clients(session))) and time.monotonic() < end:
        time.sleep(1.0)
    return here


def _connected(members: set[str], here: set[str]) -> Iterator[Finding]:
    missing, strange = sorted(members - here), sorted(here - members)
    if missing:
        then = "start it there: privfed site start; its log.txt says what keeps it out (network, certificate, clock)"
        yield Finding("connections", False, f"missing: {', '.join(missing)}", then)
    else:
        yield Finding("connections", True, f"all {len(members)} sites, over mTLS")
    if strange:
        yield Finding("others", True, f"connected, but in no roster, and so never asked: {', '.join(strange)}")


def _from_job(consortium: Consortium, config: Config | None, session: Any) -> tuple[Finding, ...]:
    """What a job finds out that asks every site."""
    order, folder = Order.new(), consortium.home / PREFLIGHT
    asked, found = folder / f"{order.preflight}.toml", folder / f"{order.preflight}.json"
    try:
        if config is not None:
            files.write(asked, config_io.to_toml(config).encode())
        place = consortium.home / f"{JOB}.{PREFLIGHT}"
        jobs.write_job(place, order.to_text(), sites=1)
        job = session.submit_job(str(place))
        end = time.monotonic() + _JOB_SECONDS
        while not found.exists():
            if time.monotonic() > end or jobs.is_over(jobs.status(session, job)):
                if found.exists():
                    break
                with suppress(Exception):
                    session.abort_job(job)
                then = f"look into {consortium.home / SERVER / 'log.txt'} and the sites' log.txt"
                return (Finding("sites", False, "the job that looks at them did not come to its end", then),)
            time.sleep(0.3)
        return msgspec.json.decode(files.read(found), type=tuple[Finding, ...])
    finally:
        for path in (asked, found):
            path.unlink(missing_ok=True)
