"""Studies: one question, many runs, one table with intervals."""

from .plan import Cell, Study, cells, load_study
from .results import Results, collect
from .runner import run_study

__all__ = ["Cell", "Results", "Study", "cells", "collect", "load_study", "run_study"]
