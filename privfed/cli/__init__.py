"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from .app import main

__all__ = ["main"]
