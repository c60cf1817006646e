"""What can go wrong in a run, by who has to act."""


class PrivfedError(Exception):
    """Base of the errors that the command line prints without a traceback. The message says what to do next."""


class ConfigError(PrivfedError, ValueError):
    """The configuration asks for something impossible or unknown. Nothing has been run or spent."""


class DataError(PrivfedError):
    """A data file is missing or does not hold what the configuration says."""


class RunIncomplete(PrivfedError):
    """Budgets or refusals kept the run from completing. What was learned and spent until then stands in its folder."""


class RunFolderError(PrivfedError):
    """A run folder is not what it should be; it is named, never guessed at or overwritten."""


class RunChanged(RunFolderError):
    """A file of a run is not as the run, or its ledger, has left it."""


class LedgerKeyError(RunFolderError):
    """The key beside a ledger is not the one that its entries were written under."""
