"""``privfed accountant report``: what a compliance officer reads, recomputed from ledgers and runs.

    report = audit_report.build([Path("runs/heart")], keys=Path("keys-from-the-sites.json"))
    Path("audit.html").write_text(audit_report.html(report))

It is supporting evidence, not a legal determination.
"""

from .build import assemble, build
from .evidence import Evidence, Statement, gather, read_statement
from .formats import html, pdf, schema, to_json
from .model import AuditReport, Finding, Verdict

__all__ = [
    "AuditReport",
    "Evidence",
    "Finding",
    "Statement",
    "Verdict",
    "assemble",
    "build",
    "gather",
    "html",
    "pdf",
    "read_statement",
    "schema",
    "to_json",
]
