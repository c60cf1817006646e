"""A run's folder: what it leaves behind, written so that a kill at any instant loses nothing that stood there."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .config import SideNoise
from .errors import RunChanged, RunFolderError
from .methods import State

RUN, DATASETS, CONFIG, METRICS, CHECKPOINT = (
    "run.json",
    "datasets.json",
    "config.toml",
    "metrics.jsonl",
    "checkpoint.safetensors",
)
MODEL, PERSONAL, SUMMARY, REPORT = "model.safetensors", "personal.safetensors", "summary.json", "report.html"
LEDGER, KEYS, JOURNAL, LOCK = "ledger.db", "keys.json", "journal.db", ".lock"


class RunFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """run.json: what a run was started with and a resumed one must find again.

    Args:
        run: its id.
        ledger: path of the ledger; relative to the folder if it stands inside.
        noise_multiplier: σ/C; 0 without a claim.
        side_noise: σ/C of what is released beside the updates.
        config_sha256: of config.toml; written by `RunFolder.create`.
    """

    run: str
    ledger: str
    noise_multiplier: float
    side_noise: SideNoise = SideNoise()
    config_sha256: str = ""


class Checkpoint(msgspec.Struct, frozen=True):
    """Where a run stands between two rounds.

    Attributes:
        sites: private state, by site.
        kept: the server's state after the best round, if it is looked for.
        shared: shared state, by site.
    """

    next_round: int
    server: State
    sites: Mapping[str, State]
    retired: Mapping[str, str]
    kept: State = {}
    shared: Mapping[str, State] = {}


@contextmanager
def locked(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the folder ``path`` for one process; the system lets go of it when the process ends, however it ends.

    Args:
        wait_seconds: how long another process may take to let go.

    Raises:
        RunFolderError: another process is at work in it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path / LOCK, flags, 0o600), "r+") as file:
        end = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise RunFolderError(f"another process is running in {path}: wait for it or stop it") from None
            time.sleep(0.02)
        yield


def held(path: Path) -> bool:
    """Whether a process holds the lock file ``path``. For who only looks on: nothing is written, not even the file.

    Whoever wants the lock at this very instant finds it taken: give those a moment to wait.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look on do not see each other
        except BlockingIOError:
            return True
    return False


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, facts: RunFacts, config: str) -> "RunFolder":
        """A new folder with the run's facts and its effective configuration.

        Raises:
            RunFolderError: something is there already, or it can not be written. Nothing was changed.
        """
        require_empty(path)
        folder = cls(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = msgspec.structs.replace(facts, config_sha256=hashlib.sha256(config.encode()).hexdigest())
            folder.write(CONFIG, config)
            # Last: with it the folder is a run's, and can be resumed
            folder.write(RUN, msgspec.json.format(msgspec.json.encode(facts), indent=2).decode() + "\n")
        except OSError as error:
            raise RunFolderError(f"can not write to {path}: {error.strerror}") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started.

        Raises:
            RunFolderError: it is not one, or its facts can not be read.
            RunChanged: its configuration is not as it was written.
        """
        if not path.is_dir():
            raise RunFolderError(f"there is no folder {path}")
        for name in (RUN, CONFIG):
            if not (path / name).is_file():
                raise RunFolderError(f"{path} is not a run's folder: it has no {name}")
        folder = cls(path)
        if hashlib.sha256((path / CONFIG).read_bytes()).hexdigest() != folder.facts().config_sha256:
            raise RunChanged(
                f"{path / CONFIG} is not the configuration that the run began with: nothing was changed; restore it, "
                f"or start a new run from it with --ledger {folder.ledger()}"
            )
        return folder

    def require_whole(self) -> None:
        """Return if everything is there that the rounds done so far have left.

        Without its ledger a run would forget what it spent, and without its journal or its key it would be another.

        Raises:
            RunFolderError: names what is missing. Nothing was changed.
        """
        ledger = self.ledger()
        begun = (self.path / DATASETS).exists()
        if not begun and any((self.path / name).exists() for name in (CHECKPOINT, METRICS)):
            raise RunFolderError(
                f"{self.path / DATASETS} is missing: nothing tells which records the run began with. Restore it from "
                "your copy"
            )
        needed = [ledger, self.path / JOURNAL] if begun else [ledger] if not ledger.is_relative_to(self.path) else []
        for path in needed:
            if not path.is_file():
                raise RunFolderError(f"{path} is missing: the run can not go on without it. Restore it from your copy")

    @contextmanager
    def locked(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Holds the folder for one process; the system lets go of it when the process ends, however it ends.

        Raises:
            RunFolderError: another process is at work in it.
        """
        with locked(self.path, wait_seconds):
            yield

    def facts(self) -> RunFacts:
        """What the run was started with. Raises RunFolderError if run.json is damaged."""
        try:
            return msgspec.json.decode((self.path / RUN).read_bytes(), type=RunFacts)
        except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as error:
            raise self._damaged(RUN, error) from None

    def datasets(self, now: Mapping[str, str]) -> dict[str, str]:
        """Site → keyed fingerprint of the records that the run began with; ``now`` if it begins now."""
        path = self.path / DATASETS
        if not path.exists():
            self.write(DATASETS, msgspec.json.encode(now).decode() + "\n")
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(DATASETS, error) from None

    def ledger(self) -> Path:
        """Where the run's ledger is."""
        return self.path / self.facts().ledger  # an absolute path stays itself

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round to metrics.jsonl, durably."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path / METRICS, flags, 0o600), "a", encoding="utf-8") as file:
            file.write(msgspec.json.encode(line).decode() + "\n")  # a number that is not finite becomes null
            file.flush()
            os.fsync(file.fileno())

    def metrics(self, rounds: int | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of the first ``rounds`` rounds.

        A last line cut short by a kill is left out: its round is done again.

        Raises:
            RunFolderError: a line in the middle is damaged, one of the first ``rounds`` is missing, or more rounds are
                there than the one that may have been cut short.
        """
        path = self.path / METRICS
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        whole = texts[:-1]  # what follows the last line end was cut short
        lines = []
        for number, text in enumerate(whole):
            try:
                line = json.loads(text)
                if line["round"] != number:
                    raise ValueError
            except (ValueError, KeyError, TypeError) as error:
                raise RunFolderError(f"{path}: line {number + 1} is damaged ({type(error).__name__})") from None
            lines.append(line)
        if rounds is not None and len(lines) < rounds:
            raise RunFolderError(f"{path} has {len(lines)} whole lines, the checkpoint stands at round {rounds}")
        if rounds is not None and len(lines) > rounds + 1:
            raise RunFolderError(
                f"{self.path / CHECKPOINT} is missing or old: it stands at round {rounds}, {path} has {len(lines)} "
                "rounds. Restore it from your copy"
            )
        return lines[:rounds]

    def keep_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl by ``lines``."""
        self.write(METRICS, "".join(msgspec.json.encode(line).decode() + "\n" for line in lines))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Where the run stands, replacing the last one in one step. For the owner alone: it holds personal models."""
        tensors = {f"server/{name}": tensor for name, tensor in checkpoint.server.items()}
        tensors |= {f"kept/{name}": tensor for name, tensor in checkpoint.kept.items()}
        for owner, states in (("site", checkpoint.sites), ("shared", checkpoint.shared)):
            for site, state in states.items():
                tensors |= {f"{owner}/{site}/{name}": tensor for name, tensor in state.items()}
        facts = {"next_round": str(checkpoint.next_round), "retired": json.dumps(dict(checkpoint.retired))}
        self.save_tensors(CHECKPOINT, tensors, facts)

    def load_checkpoint(self) -> Checkpoint | None:
        """Where the run stands; None before its first round ended.

        Raises:
            RunFolderError: it is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            tensors, facts = _read_tensors(path)
            server: dict[str, Tensor] = {}
            kept: dict[str, Tensor] = {}
            sites: dict[str, dict[str, dict[str, Tensor]]] = {"site": {}, "shared": {}}
            for key, tensor in tensors.items():
                owner, _, rest = key.partition("/")
                if owner == "server":
                    server[rest] = tensor
                elif owner == "kept":
                    kept[rest] = tensor
                else:
                    site, _, name = rest.rpartition("/")
                    sites[owner].setdefault(site, {})[name] = tensor
            retired = json.loads(facts["retired"])
            return Checkpoint(int(facts["next_round"]), server, sites["site"], retired, kept, sites["shared"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(CHECKPOINT, error) from None

    def next_round(self) -> int:
        """The round at which the checkpoint stands; 0 before the first ended. No tensor is read, no digest checked.

        Raises:
            RunFolderError: it is damaged.
        """
        path = self.path / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                return int((file.metadata() or {})["next_round"])
        except FileNotFoundError:
            return 0
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(CHECKPOINT, error) from None

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Named tensors as a safetensors file, in one step, with a digest of their content."""
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        self._replace(name, save(whole, {**facts, _DIGEST: _digest(whole, facts)}))

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A safetensors file's tensors and metadata.

        Raises:
            RunFolderError: it is not there (the run has not finished) or damaged.
        """
        path = self.path / name
        if not path.exists():
            raise RunFolderError(
                f"{self.path} has no {name}: its run has not finished; go on with --resume {self.path}"
            )
        try:
            return _read_tensors(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(name, error) from None

    def write(self, name: str, text: str) -> None:
        """A whole text file, replaced in one step."""
        self._replace(name, text.encode())

    def _replace(self, name: str, content: bytes) -> None:
        """Replaces a file in one step, for the owner alone: figures of single sites stand in most of them.

        Raises OSError, with what stood there still there.
        """
        temporary = self.path / (name + ".new")
        try:
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            _settle(temporary, self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}: {self.path / name} could not be written") from None

    def _damaged(self, name: str, error: Exception) -> RunFolderError:
        return RunFolderError(f"{self.path / name} is damaged ({type(error).__name__}): nothing was changed")


_DIGEST = "sha256"


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and facts. Raises ValueError if they are not those that were saved."""
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata() or {})
    tensors = load_file(path)
    expected = facts.pop(_DIGEST, "")
    if _digest(tensors, facts) != expected:
        raise ValueError("its content does not match its digest")
    return tensors, facts


def require_empty(path: Path) -> None:
    """Raise `RunFolderError` unless ``path`` is new or an empty folder."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    remedy = "give another folder with --out"
    if (path / RUN).exists():
        remedy = (
            f"continue its run with --resume {path}, or start a new one in another folder that counts what was spent "
            f"here: --out NEW --ledger {path / LEDGER}"
        )
    raise RunFolderError(f"{path} is not empty: nothing was changed; {remedy}")


def _settle(temporary: Path, path: Path) -> None:
    """Make ``temporary`` durable and give it its name: a reader sees the old file or the new one, never half of it."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
