"""The embedded records: a public table in simulated hospitals."""

from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import torch
from msgspec import Meta

from privfed.tasks import Task

from .columns import Numeric, encode, input_names, input_ranges
from .partition import skewed_sites
from .records import SiteData, Sites


class BreastCancer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="source", tag="breast-cancer"):
    """Wisconsin breast cancer (scikit-learn's copy), cut into simulated hospitals."""

    sites: Annotated[int, Meta(ge=1, le=40, description="simulated hospitals")] = 5
    skew: Annotated[float, Meta(ge=1, le=100, description="how much the hospitals' label rates differ; 1 is none")] = (
        3.0
    )

    @property
    def columns(self) -> tuple[Numeric, ...]:
        """The inputs. Measurements are right-skewed: a quarter up the public range is typical."""
        return tuple(
            Numeric(name=name, range=(low, high), typical=low + (high - low) / 4)
            for name, low, high in _BREAST_CANCER_RANGES
        )

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        return {"benign": ("1",), "malignant": ("0",)}

    @property
    def missing_values(self) -> tuple[str, ...]:
        return ("",)

    @property
    def header(self) -> tuple[str, ...]:
        return ()

    @property
    def separator(self) -> str:
        return ","

    @property
    def decimal(self) -> str:
        return "."

    @property
    def planned_sites(self) -> int | None:
        """How many sites there will be, where that is known before a record is read."""
        return self.sites

    @property
    def items_at(self) -> tuple[tuple[int, int], ...]:
        return ()

    def load(self, *, seed: int, task: Task | None = None) -> Sites:
        """The simulated hospitals of a public ``seed``; the ``task`` can be but the two classes."""
        from sklearn.datasets import load_breast_cancer

        table = load_breast_cancer()
        labels = 1 - table.target.astype(np.int64)  # 1 = malignant
        frame = pd.DataFrame(table.data, columns=list(table.feature_names)).map(repr).astype(str)
        inputs = torch.from_numpy(encode(frame, self.columns, missing=frozenset()))
        site = skewed_sites(labels, self.sites, skew=self.skew, seed=seed)
        everyone = SiteData(np.arange(len(labels), dtype=np.uint64), inputs, torch.from_numpy(labels))
        return Sites(
            sites={f"hospital-{number + 1}": everyone.rows(site == number) for number in range(self.sites)},
            inputs=input_names(self.columns),
            ranges=input_ranges(self.columns),
            classes=tuple(self.classes),
            simulated=True,
            description=f"Wisconsin breast cancer in {self.sites} simulated hospitals",
        )


# Name, lowest and highest value as the data set's documentation prints them (scikit-learn, "Breast cancer wisconsin
# (diagnostic) dataset", summary statistics): public, not computed from a site's records.
_BREAST_CANCER_RANGES: tuple[tuple[str, float, float], ...] = (
    ("mean radius", 6.981, 28.11),
    ("mean texture", 9.71, 39.28),
    ("mean perimeter", 43.79, 188.5),
    ("mean area", 143.5, 2501.0),
    ("mean smoothness", 0.053, 0.163),
    ("mean compactness", 0.019, 0.345),
    ("mean concavity", 0.0, 0.427),
    ("mean concave points", 0.0, 0.201),
    ("mean symmetry", 0.106, 0.304),
    ("mean fractal dimension", 0.05, 0.097),
    ("radius error", 0.112, 2.873),
    ("texture error", 0.36, 4.885),
    ("perimeter error", 0.757, 21.98),
    ("area error", 6.802, 542.2),
    ("smoothness error", 0.002, 0.031),
    ("compactness error", 0.002, 0.135),
    ("concavity error", 0.0, 0.396),
    ("concave points error", 0.0, 0.053),
    ("symmetry error", 0.008, 0.079),
    ("fractal dimension error", 0.001, 0.03),
    ("worst radius", 7.93, 36.04),
    ("worst texture", 12.02, 49.54),
    ("worst perimeter", 50.41, 251.2),
    ("worst area", 185.2, 4254.0),
    ("worst smoothness", 0.071, 0.223),
    ("worst compactness", 0.027, 1.058),
    ("worst concavity", 0.0, 1.252),
    ("worst concave points", 0.0, 0.291),
    ("worst symmetry", 0.156, 0.664),
    ("worst fractal dimension", 0.055, 0.208),
)
