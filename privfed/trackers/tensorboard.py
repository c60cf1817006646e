"""A run as a TensorBoard event file."""

import io
from pathlib import Path

from privfed.errors import ConfigError, RunFolderError
from privfed.watching import Watcher

from .figures import epsilon_is, facts, figures, identity

FILE = "events.out.tfevents.privfed"


def write(watcher: Watcher, out: Path) -> Path:
    """Bring the run's file below ``out`` up to date.

    The same rounds give the same bytes: a second time changes nothing, and rounds that came since are appended, which
    a TensorBoard that is open sees. A file that is not a beginning of the run's is replaced.

    Args:
        watcher: has looked at the run.
        out: TensorBoard's log directory; the run gets a folder of its own in it.

    Raises:
        ConfigError: TensorBoard is not installed.
        RunFolderError: there is no run yet, or the file can not be written.
    """
    run, began = identity(watcher)
    content = _content(watcher, began)
    path = out / run / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.read_bytes() if path.exists() else b""
        if content.startswith(there):
            with path.open("ab") as file:
                file.write(content[len(there) :])
        else:
            draft = path.with_name(".draft")
            draft.write_bytes(content)
            draft.replace(path)
    except OSError as error:
        raise RunFolderError(f"can not write {path}: {error.strerror}") from None
    return path


def _content(watcher: Watcher, began: float) -> bytes:
    """The whole file. Time is the run's own: when it began, and the seconds of its rounds."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard is not here ({error}): pip install -c constraints.txt '.[tensorboard]'"
        ) from None
    about = facts(watcher)
    words = {
        "global": f"mean {about['metric']}, {about['figures']}",
        "personalized": f"mean {about['metric']}, {about['figures']}",
        "epsilon_max": epsilon_is(watcher),
        "epsilon_max_VOID": epsilon_is(watcher),
    }
    buffer, now = io.BytesIO(), began
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
    for row in watcher.rows:
        now += row.seconds
        values = [
            Summary.Value(
                tag=name,
                simple_value=value,
                metadata=SummaryMetadata(summary_description=words.get(name, "")) if row.round == 0 else None,
            )
            for name, value in figures(watcher, row).items()
        ]
        event = Event(wall_time=now, step=row.round + 1, summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return buffer.getvalue()
