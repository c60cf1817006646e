"""All levels on one target, and the file that they leave."""

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from privfed.privacy.audit.result import Audit
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.ledger import Ledger

from .. import keyring
from ..errors import ConfigError, RunFolderError
from ..seals import COORDINATOR
from ..statements import AUDIT, FORMAT, AuditFile
from ..statements import read_audits as read
from ..witness import Witness
from .federated import audit_run
from .noises import audit_noise
from .personal import audit_personal
from .releases import audit_releases
from .target import Progress, Target

LEVELS = (1, 2, 3, 4)


def audit(
    target: Target,
    *,
    levels: Sequence[int] | None = None,
    trials: int | None = None,
    by: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda level, done, total: None,
) -> AuditFile:
    """Attack a run or a configuration.

    Args:
        levels: of 1 to 4; default all that apply to the target.
        trials: releases of each kind (level 1), canaries (level 3), shadow models of a site (level 4); each level has
            its own default.
        by: columns among the model's inputs, whose groups level 4 looks at besides sites and classes.
        seed: from which every random number of the audits derives. The mechanisms under attack here protect nobody.
        progress: told of every step.

    Returns:
        What was found. A violation is a result, no error.

    Raises:
        ConfigError, RunFolderError: a level that does not apply, or a target that can not be used.
    """
    chosen = sorted(set(levels)) if levels else _applicable(target)
    for level in chosen:
        if level not in LEVELS:
            raise ConfigError(f"level must be one of 1, 2, 3 and 4, got {level}")
    if trials is not None and trials < 1:
        raise ConfigError(f"trials must be at least 1, got {trials}")
    found: list[Audit] = []
    try:
        for level in chosen:

            def told(done: int, total: int, level: int = level) -> None:
                progress(level, done, total)

            match level:
                case 1:
                    found.append(audit_releases(target, trials=trials, seed=seed, progress=told))
                case 2:
                    found.append(audit_noise(target, seed=seed, progress=told))
                case 3:
                    found.append(audit_run(target, canaries=trials, seed=seed, progress=told))
                case 4:
                    found.extend(audit_personal(target, shadows=trials, by=by, seed=seed, progress=told))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from None
    return AuditFile(
        format=FORMAT, run=target.name, created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", audits=tuple(found)
    )


def _applicable(target: Target) -> list[int]:
    config = target.config
    levels = []
    if config.method.sends and config.privacy.unit is not PrivacyUnit.NONE:
        levels += [1, 2] if config.privacy.unit is PrivacyUnit.CLIENT else [1, 2, 3]
    if target.finished:
        levels.append(4)
    if not levels:
        raise ConfigError("this configuration claims nothing that could be audited; give the folder of a finished run")
    return levels


def require_recordable(target: Target) -> None:
    """Return if what will be found can be written into the run's ledger: before the waiting, not after it.

    Raises:
        RunFolderError: the ledger or its key is not there.
    """
    if target.home is None:
        return
    ledger = target.home.ledger()
    if not ledger.is_file():
        raise RunFolderError(f"there is no ledger at {ledger}: what audits find is written into it. Restore it")
    keyring.ledger_key(ledger)


def record(target: Target, found: AuditFile) -> None:
    """Have what was found in the run's ledger, signed by its coordinator; of a configuration, nothing is recorded.

    Every result stands there, the bad ones too: an audit that is made again until it looks well is seen to.

    Raises:
        RunFolderError: as `require_recordable`.
        LedgerCorrupt: the ledger is not what was written.
    """
    require_recordable(target)
    if target.home is None:
        return
    ledger = target.home.ledger()
    key = keyring.site_key(keyring.ledger_key(ledger), COORDINATOR, "ledger")
    with Ledger(ledger) as book:
        Witness(book, key, {}).audited(target.name, target.home.facts().config_sha256, found.audits)


def write(target: Target, found: AuditFile, out: Path | None = None) -> Path | None:
    """Leave audit.json, for its owner alone, in the run's folder, where other levels' results stay, or at ``out``.

    It has what the ledger has not: notes, and exact figures of records.

    Returns:
        Where it is; None for a configuration without ``out``.

    Raises:
        RunFolderError: ``out`` exists already, or what the folder holds is no audit.
    """
    if out is not None:
        _create(out, _text(found))
        return out
    if target.home is None:
        return None
    path = target.home.path / AUDIT
    if path.exists():
        levels = {audit.level for audit in found.audits}
        earlier = tuple(audit for audit in read(path).audits if audit.level not in levels)
        together = sorted((*earlier, *found.audits), key=lambda audit: audit.level)
        found = msgspec.structs.replace(found, audits=tuple(together))
    target.home.write(AUDIT, _text(found))
    return path


def _text(found: AuditFile) -> str:
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"


def _create(path: Path, text: str) -> None:
    """A new file, whole or not at all: written under another name, and given its own if that is free."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        if os.path.lexists(path):
            raise FileExistsError
        os.replace(draft, path)
    except FileExistsError:
        raise RunFolderError(f"{path} exists already: nothing was changed; give another --out") from None
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            draft.unlink()
