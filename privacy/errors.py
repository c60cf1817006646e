"""What can go wrong in the privacy layer, and whose fault it is."""

from pathlib import Path


class PrivacyError(Exception):
    """Base of every error that the privacy layer raises on purpose."""


class NoGuarantee(PrivacyError, ValueError):
    """This combination carries no privacy guarantee, so it is refused instead of being given an ε."""


class UnsupportedEvent(PrivacyError):
    """No accountant here bounds this event. Fail closed: an unknown event never costs less than it should."""


class ChargeConflict(PrivacyError):
    """A different spend is already recorded for this site, run, round and attempt.

    A repeated round must release the same bytes. Fresh noise on the same round is a second release: it needs a new
    `attempt`, and is paid for again.
    """


class BudgetExhausted(PrivacyError):
    """The next release would cost more than the budget allows. Nobody's fault: the release must not happen.

    Attributes:
        site: whose budget it is.
        spent: ε of what is recorded so far, at `delta`.
        would_be: ε after the refused release, at `delta`.
        limit: the budget's ε.
        delta: the budget's δ.
    """

    def __init__(self, site: str, *, spent: float, would_be: float, limit: float, delta: float) -> None:
        self.site, self.spent, self.would_be, self.limit, self.delta = site, spent, would_be, limit, delta
        super().__init__(
            f"site {site!r} has spent ε = {spent:.6g} of {limit:.6g} at δ = {delta:g}; this release would make it "
            f"{would_be:.6g}. Stop here, raise the budget's epsilon, or run fewer rounds with more noise"
        )

    def __reduce__(self) -> tuple[object, ...]:  # the keyword-only signature does not survive pickling by default
        return _rebuild_exhausted, (self.site, self.spent, self.would_be, self.limit, self.delta)


def _rebuild_exhausted(site: str, spent: float, would_be: float, limit: float, delta: float) -> BudgetExhausted:
    return BudgetExhausted(site, spent=spent, would_be=would_be, limit=limit, delta=delta)


class LedgerCorrupt(PrivacyError):
    """The ledger is not what was written. Nothing is charged to it until a person has looked.

    Attributes:
        path: the ledger file.
        entry: the first bad entry ("site 'a', entry 3"), or None when the file as a whole is bad.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str, entry: str | None = None) -> None:
        self.path, self.reason, self.entry = path, reason, entry
        where = f"{path}: {entry}" if entry else str(path)
        super().__init__(f"{where}: {reason}. Restore the file from a copy; do not start a new one over it")

    def __reduce__(self) -> tuple[object, ...]:
        return LedgerCorrupt, (self.path, self.reason, self.entry)
