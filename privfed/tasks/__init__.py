"""What a run learns to predict, one task a file."""

from .classification import Classification
from .cox import Cox
from .number import Rating, Regression
from .survival import Survival
from .task import LOWER_IS_BETTER, Labels, Task

__all__ = ["LOWER_IS_BETTER", "Classification", "Cox", "Labels", "Rating", "Regression", "Survival", "Task"]
