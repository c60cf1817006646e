"""Exit codes: 0 done, 1 it failed, 2 bad usage or configuration, 3 budgets or refusals, 4 a verification failed."""

import sqlite3

FAILED, BAD_USAGE, INCOMPLETE, NOT_VERIFIED = 1, 2, 3, 4


def exit_code(error: Exception) -> int | None:
    """The code of an error that the toolkit raises on purpose; None for a defect, which deserves its traceback."""
    from privfed.crypto.errors import AggregationError
    from privfed.errors import ConfigError, PrivfedError, RunChanged, RunFolderError, RunIncomplete
    from privfed.privacy.errors import BudgetExhausted, LedgerCorrupt, NoGuarantee, PrivacyError

    match error:
        case LedgerCorrupt() | RunChanged():
            return NOT_VERIFIED
        case BudgetExhausted() | RunIncomplete():
            return INCOMPLETE
        case ConfigError() | NoGuarantee() | RunFolderError():
            return BAD_USAGE
        case PrivfedError() | PrivacyError() | AggregationError() | OSError() | sqlite3.Error():
            return FAILED
    return None
