"""Where a run of a consortium stands, from its folder at the coordinator: asking no site."""

from privfed import watching
from privfed.folder import RunFolder

from . import submission
from .consortium import LAST, Consortium


def watcher(consortium: Consortium, home: RunFolder) -> watching.Watcher:
    """Who looks at the run in ``home``: its sites are the roster's, and the last block may tell why it ended."""
    roster, last = consortium.roster(), consortium.home / LAST

    def remark() -> str:
        text = last.read_text().strip() if last.exists() else ""
        return f"the last block ended: {text}" if text else ""

    return watching.Watcher(
        home.path,
        names=[member.name for member in roster.members] if roster else (),
        working=submission.under_way,
        remark=remark,
    )
