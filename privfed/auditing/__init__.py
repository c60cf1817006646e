"""The audits of `privfed.privacy.audit` on a run: its own doors, encodings, rounds and personal models."""

from .audits import LEVELS, AuditFile, audit, read, write
from .target import Target, target_of

__all__ = ["LEVELS", "AuditFile", "Target", "audit", "read", "target_of", "write"]
