"""New records through a finished run's model, with the preprocessing that the run declared."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from . import config_io, folder
from .architecture import Schema, whole_network
from .data.arrays import Arrays
from .data.columns import encode, unknown_values
from .data.files import first_line, read_frame
from .errors import ConfigError
from .evaluation import outputs_of
from .folder import RunFolder
from .parameters import to_vector

_MAXIMUM_ROWS = 2_000_000


@dataclass(frozen=True)
class Predictions:
    """What the model says of each record.

    Attributes:
        table: row (from 1), prediction, then what else its task tells: one probability a class, chances to live beyond
            each interval.
        notes: what a user should know: values that the model has never been told about.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


def predict(run: Path | str, file: Path | str, *, site: str | None = None) -> Predictions:
    """Predict the records of a table.

    Args:
        run: folder of a finished run.
        file: CSV or Parquet with the run's input columns, in any order; further columns are ignored. Of a run on
            arrays, a file with its array of inputs.
        site: use this site's personal model instead of the global one.

    Raises:
        RunFolderError: the run has not finished or its folder is damaged.
        DataError: the table can not be read, lacks a column, or holds text where a number belongs.
        ConfigError: there is no such site.
    """
    home = RunFolder.open(Path(run))
    config = config_io.load_config(home.path / folder.CONFIG)
    tensors, facts = home.load_tensors(folder.MODEL)
    inputs, classes = json.loads(facts["inputs"]), json.loads(facts["classes"])
    model = whole_network(config, Schema(features=len(inputs), classes=len(classes)))
    model.load_state_dict(tensors)  # of the run's configuration: both carry a digest
    theta = to_vector(model)
    if site is not None:
        personal, _ = home.load_tensors(folder.PERSONAL)
        if site not in personal:
            raise ConfigError(f"no site {site!r} in this run; its sites are {', '.join(map(repr, personal))}")
        theta = personal[site]
    if isinstance(config.data, Arrays):
        rows = torch.from_numpy(config.data.read_inputs(str(file), features=len(inputs)))
        said = config.task.predictions(outputs_of(model, theta, rows), classes)
        return Predictions(pd.DataFrame({"row": range(1, len(rows) + 1), **said}), ())
    columns = config.data.columns
    names = [column.name for column in columns]
    data = config.data
    # New records have no label: they may come with a line of names where the run's own files had none
    named = set(names) <= set(first_line(str(file), separator=data.separator))
    header = () if named else data.header
    frame = read_frame(str(file), names, header=header, separator=data.separator, maximum_rows=_MAXIMUM_ROWS)
    missing = frozenset(data.missing_values)
    rows = torch.from_numpy(encode(frame, columns, missing=missing, decimal=data.decimal))
    said = config.task.predictions(outputs_of(model, theta, rows), classes)
    table = pd.DataFrame({"row": frame.index, **said})
    return Predictions(table, unknown_values(frame, columns, missing=missing, decimal=config.data.decimal))
