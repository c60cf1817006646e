"""What several commands refuse before any work is done."""


def check_delta(delta: float) -> None:
    """Raises ConfigError unless δ is in (0, 1)."""
    from privfed.errors import ConfigError

    if not 0 < delta < 1:
        raise ConfigError(f"--delta must be between 0 and 1, got {delta:g}")
