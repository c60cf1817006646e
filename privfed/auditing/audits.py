"""All levels on one target, and the file that they leave."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from privfed.privacy.audit.result import Audit
from privfed.privacy.events import PrivacyUnit

from ..errors import ConfigError, RunFolderError
from .federated import audit_run
from .noises import audit_noise
from .personal import audit_personal
from .releases import audit_releases
from .target import Progress, Target

LEVELS = (1, 2, 3, 4)
AUDIT = "audit.json"
FORMAT = "privfed audit/1"


class AuditFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """audit.json: what the audits of a run, or of a configuration, found.

    Args:
        format: of this file.
        run: the run's id, or the configuration's name.
        created: when the latest of them ended, UTC.
        audits: one for each level, and two for level 4.
    """

    format: str
    run: str
    created: str
    audits: tuple[Audit, ...]

    @property
    def violated(self) -> bool:
        """Whether some audit found its claim broken."""
        return any(audit.verdict == "violation" for audit in self.audits)


def audit(
    target: Target,
    *,
    levels: Sequence[int] | None = None,
    trials: int | None = None,
    seed: int = 0,
    progress: Progress = lambda level, done, total: None,
) -> AuditFile:
    """Attack a run or a configuration.

    Args:
        levels: of 1 to 4; default all that apply to the target.
        trials: releases of each kind (level 1), canaries (level 3), shadow models of a site (level 4); each level has
            its own default.
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
                    found.extend(audit_personal(target, shadows=trials, seed=seed, progress=told))
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


def write(target: Target, found: AuditFile, out: Path | None = None) -> Path | None:
    """Leave audit.json, for its owner alone, in the run's folder, where other levels' results stay, or at ``out``.

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


def read(path: Path) -> AuditFile:
    """An audit.json. Raises `RunFolderError` if it is not one."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=AuditFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged ({type(error).__name__}): move it away, or restore it") from None
    if found.format != FORMAT:
        raise RunFolderError(f"{path} has format {found.format!r}, this version reads {FORMAT!r}")
    return found


def _text(found: AuditFile) -> str:
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"


def _create(path: Path, text: str) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunFolderError(f"{path} exists already: nothing was changed; give another --out") from None
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {error.strerror}") from None
