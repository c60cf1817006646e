"""What a study asks: a grid over configuration keys, crossed with named cases and seeds."""

import hashlib
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from privfed import config_io
from privfed.config import Config
from privfed.errors import ConfigError

Scalar = bool | int | float | str | list[int] | None


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """study.toml: ``base`` is a configuration; every cell of the study is a run of it with some keys changed."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="names the study's folder")] = "study"
    base: Annotated[str | None, Meta(description="a configuration, beside the study; default the main job")] = None
    seeds: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1, description="public seeds")] = (0,)
    common: Annotated[dict[str, Scalar], Meta(description="key = value for every cell")] = {}
    grid: Annotated[
        dict[str, tuple[Scalar, ...]], Meta(description="key = [values]: every combination becomes a cell")
    ] = {}
    cases: Annotated[
        dict[str, dict[str, Scalar]],
        Meta(description="name = {key = value, …}: settings that belong together, crossed with the grid"),
    ] = {}


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        case: name of its case; "" without cases.
        point: grid key → value.
        seed: public.
        config: the whole configuration.
    """

    case: str
    point: Mapping[str, Scalar]
    seed: int
    config: Config = field(repr=False)

    @property
    def id(self) -> str:
        """Names the cell's folder: the same settings, the same name, whatever else the study holds."""
        return hashlib.sha256(config_io.to_toml(self.config).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        values = [f"{key.rpartition('.')[2]}={_text(value)}" for key, value in self.point.items()]
        return ", ".join([*([self.case] if self.case else []), *values, f"seed {self.seed}"])


def load_study(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        ConfigError: names what is wrong.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(table, Study)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"can not read the study {path}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        known = ", ".join(Study.__struct_fields__)
        raise ConfigError(f"{path}: {error}; a study has {known}") from None


def cells(study: Study, folder: Path) -> tuple[Cell, ...]:
    """Every run of the study, checked, in one order.

    Args:
        folder: where ``base`` is looked for.

    Raises:
        ConfigError: a key or value that no run could have; it names the cell.
    """
    base = None if study.base is None else folder / study.base
    keys = list(study.grid)
    found: list[Cell] = []
    for case, settings in (study.cases or {"": {}}).items():
        for values in itertools.product(*(study.grid[key] for key in keys)):
            point = dict(zip(keys, values, strict=True))
            for seed in study.seeds:
                changed = {**study.common, **settings, **point, "seed": seed, "simulation.threads": 1}
                overrides = [f"{key}={_toml(value)}" for key, value in changed.items() if value is not None]
                try:
                    cell = Cell(case, point, seed, config_io.load_config(base, overrides))
                except ConfigError as error:
                    raise ConfigError(f"cell {case or '–'} {point}: {error}") from None
                found.append(cell)
    ids = [cell.id for cell in found]
    if len(set(ids)) < len(ids):
        twice = next(cell for cell in found if ids.count(cell.id) > 1)
        raise ConfigError(f"two cells of the study are the same run ({twice.label}): take one out")
    return tuple(found)


def _toml(value: Scalar) -> str:
    import tomlkit

    return str(tomlkit.item(value).as_string())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
