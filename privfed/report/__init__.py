"""``report.html``: one self-contained page about a finished run, made from its folder alone."""

from pathlib import Path


def render(folder: Path) -> str:
    """The page about the run in ``folder``, as HTML text that fetches nothing and needs no script.

    The same folder gives the same page, byte for byte: it reads ``config.toml``, ``summary.json`` and
    ``metrics.jsonl``, and no clock. Names of sites and reasons of refusals are user text and are escaped.

    Args:
        folder: what ``privfed run`` left behind.

    Raises:
        RunFolderError: it is not a run's folder, the run has not ended, or a file of it is damaged.
        ConfigError: its configuration is of another version.

    Guarantees:
        Figures of accuracy stand on the page exactly and are labelled "internal, not DP": who publishes the page
        publishes them. ε stands with δ, unit, adversary, accountant and sampling, or not at all.
    """
    from .history import read  # matplotlib and jinja2 load here, not when privfed does
    from .page import page

    return page(read(folder))


__all__ = ["render"]
