"""The audits of `privfed.privacy.audit` on a run: its own doors, encodings, rounds and personal models."""

from ..statements import AuditFile
from ..statements import read_audits as read
from .audits import LEVELS, audit, record, require_recordable, write
from .target import Target, target_of

__all__ = [
    "LEVELS",
    "AuditFile",
    "Target",
    "audit",
    "read",
    "record",
    "require_recordable",
    "target_of",
    "write",
]
