"""The report as HTML, JSON and PDF."""

import msgspec

from privfed.errors import ConfigError

from .model import AuditReport


def html(report: AuditReport) -> str:
    """One self-contained page: no script, no network, light, dark and on paper."""
    from .page import page  # matplotlib and jinja2 load here

    return page(report)


def to_json(report: AuditReport) -> str:
    """The report's JSON form, of docs/audit-report.schema.json."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def schema() -> str:
    """The JSON Schema (2020-12) of the JSON form."""
    (described,), parts = msgspec.json.schema_components([AuditReport], ref_template="#/$defs/{name}")
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "privfed audit report",
        **described,
        "$defs": parts,
    }
    return msgspec.json.format(msgspec.json.encode(whole, order="sorted"), indent=2).decode() + "\n"


def pdf(report: AuditReport) -> bytes:
    """The page on paper.

    Raises:
        ConfigError: WeasyPrint is not installed; says how to install it.
    """
    try:
        import weasyprint
    except (ImportError, OSError) as error:  # OSError: Pango, a system library, is missing
        raise ConfigError(
            f"--format pdf needs WeasyPrint, which can not be loaded ({error}): "
            "pip install -c constraints.txt '.[pdf]', and the system's Pango library; or use --format html and print it"
        ) from None
    import logging

    from .page import page

    logging.getLogger("weasyprint").setLevel(logging.ERROR)  # it tells of every property that paper has no use for

    def refuse(url: str, *_: object, **__: object) -> dict[str, object]:
        raise ValueError(f"a report fetches nothing: {url}")

    written: bytes = weasyprint.HTML(string=page(report, paper=True), url_fetcher=refuse).write_pdf()
    return written
