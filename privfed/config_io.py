"""Configurations from TOML and back: strict in, commented out."""

import difflib
import json
import re
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import tomlkit

from privfed.privacy.events import NoiseSite, PrivacyUnit

from .config import Config
from .errors import ConfigError
from .methods.server import Plain
from .models import MLP


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file, with ``key=value`` overrides on top; the defaults where nothing is said.

    Args:
        path: a TOML file; None is the main job on the embedded data.
        overrides: dotted keys with TOML values, e.g. ``"privacy.target_epsilon=2"``.

    Raises:
        ConfigError: names the key, its value, what is allowed and the nearest valid key.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"can not read the configuration {path}: {reason}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(table, override)
    return decode(table)


def decode(table: dict[str, Any]) -> Config:
    """A `Config` from plain tables, or a `ConfigError`."""
    table = _with_default_tags(table)
    _refuse_unknown_keys(table, Config, "")
    try:
        return msgspec.convert(table, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), table)) from None


def check(config: Config) -> None:
    """Return if every value is in its range: structs built in Python are not checked when they are made.

    Raises:
        ConfigError: as `load_config` does.
    """
    decode(msgspec.to_builtins(config))


def check_used(config: Config) -> None:
    """Return if no setting that changes a promise is given where nothing reads it.

    Raises:
        ConfigError: the setting would do nothing, and whoever set it believes that it does.
    """
    privacy, evaluation = config.privacy, config.evaluation
    beside = evaluation.release == "private" or privacy.standardise_epsilon is not None
    by_record = privacy.unit is PrivacyUnit.PATIENT and privacy.sampling == "record"
    idle = (
        (
            "privacy.colluders",
            privacy.colluders is not None and privacy.noise is not NoiseSite.DISTRIBUTED and not beside,
            "noise in shares: privacy.noise = 'distributed' or evaluation.release = 'private'",
        ),
        (
            "privacy.clip = 'adaptive'",
            privacy.clip == "adaptive" and not config.method.sends,
            "a method that sends updates",
        ),
        (
            "privacy.clip_quantile or clip_rate",
            privacy.clip == "fixed" and (privacy.clip_quantile, privacy.clip_rate) != (0.5, 0.2),
            "privacy.clip = 'adaptive'",
        ),
        (
            "privacy.sampling = 'record'",
            privacy.sampling == "record" and privacy.unit is not PrivacyUnit.PATIENT,
            "privacy.unit = 'patient'",
        ),
        (
            "privacy.max_records",
            privacy.max_records is not None and not by_record,
            "privacy.unit = 'patient' with privacy.sampling = 'record'",
        ),
        (
            "evaluation.target_epsilon",
            evaluation.target_epsilon is not None and evaluation.release != "private",
            "evaluation.release = 'private'",
        ),
        (
            "model.norm = 'group'",
            isinstance(config.model, MLP) and config.model.norm == "group" and not config.model.hidden,
            "model.hidden, whose values it normalises",
        ),
        (
            f"server.name = {type(config.server).__struct_config__.tag!r}",
            not isinstance(config.server, Plain) and not config.method.sends,
            "a method that sends updates",
        ),
        (
            "evaluation.unseen_records",
            evaluation.unseen_records is not None and not (evaluation.unseen_sites or evaluation.unseen_fraction),
            "evaluation.unseen_sites or evaluation.unseen_fraction",
        ),
        (
            "evaluation.unseen_sites and evaluation.unseen_fraction",
            bool(evaluation.unseen_sites or evaluation.unseen_fraction) and evaluation.release == "private",
            "figures of single sites: evaluation.release = 'internal' or 'public-cohort'",
        ),
        (
            "evaluation.public_sites",
            bool(evaluation.public_sites) and evaluation.release != "public-cohort",
            "evaluation.release = 'public-cohort'",
        ),
    )
    for key, unread, needed in idle:
        if unread:
            raise ConfigError(f"{key} does nothing in this run: it belongs to {needed}. Leave it out, or set that too")


def to_toml(config: Config) -> str:
    """The whole configuration as TOML, one comment a key; `load_config` of it gives the same configuration back."""
    lines = ["# privfed configuration: every key, its value in this run, and what it means."]
    _render(config, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _with_default_tags(table: dict[str, Any]) -> dict[str, Any]:
    """A section that does not say which source or method it is for means the default one."""
    defaults = Config()
    filled = dict(table)
    for name in ("data", "task", "model", "transfer", "method", "server"):
        settings = type(getattr(defaults, name)).__struct_config__
        if isinstance(table.get(name), dict):
            filled[name] = {settings.tag_field: settings.tag, **table[name]}
    return filled


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set takes key=value, e.g. --set privacy.target_epsilon=2, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = _bare(text.strip())
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])} is a value, not a section: {override!r} can not be set"
            )
        table = below
    table[last] = value


def _bare(text: str) -> float | str:
    """What a shell user means where TOML is stricter: .5 is a number, and a bare word a string."""
    try:
        return float(text)
    except ValueError:
        return text


def _structs(hint: Any) -> list[type[msgspec.Struct]]:
    """The struct types inside an annotation."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [struct for argument in get_args(hint) for struct in _structs(argument)]


def _struct_for(hint: Any, value: Any) -> type[msgspec.Struct] | None:
    """The struct that ``value`` is meant to be: the only one there is, or the one its tag names."""
    structs = _structs(hint)
    if len(structs) <= 1:
        return structs[0] if structs else None
    for struct in structs:
        settings = struct.__struct_config__
        if isinstance(value, dict) and value.get(settings.tag_field) == settings.tag:
            return struct
    return None


def _refuse_unknown_keys(table: Any, struct: type[msgspec.Struct], prefix: str) -> None:
    if not isinstance(table, dict):
        return
    hints = get_type_hints(struct, include_extras=True)
    known = list(hints)
    if struct.__struct_config__.tag_field:
        known.append(struct.__struct_config__.tag_field)
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {prefix}{key} = {value!r}: {remedy}")
        below = _struct_for(hints.get(key), value)
        if below is not None:
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                index = f"[{number}]" if isinstance(value, list) else ""
                _refuse_unknown_keys(item, below, f"{prefix}{key}{index}.")


def _explain(message: str, table: dict[str, Any]) -> str:
    """msgspec's message with the value, the choices and the key's own sentence."""
    reason, _, where = message.partition(" - at `$")
    path = re.findall(r"[A-Za-z0-9_]+|\[\d+\]", where)
    if not path:
        return reason  # about several keys, which it names
    value: Any = table
    hint: Any = Config
    for step in path:
        if step.startswith("["):
            index = int(step[1:-1])
            value = value[index] if isinstance(value, list) and index < len(value) else None
            continue
        struct = _struct_for(hint, value)
        if struct is not None:
            hint = get_type_hints(struct, include_extras=True).get(step)
        value = value.get(step) if isinstance(value, dict) else None
    key = ".".join(path).replace(".[", "[") or "the configuration"
    tags = [str(s.__struct_config__.tag) for s in _structs(hint) if s.__struct_config__.tag_field == path[-1:][0]]
    if tags:  # the tag of a union: the hint is still the union's
        near = difflib.get_close_matches(str(value), tags, n=1)
        remedy = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key} = {value!r}: it must be one of {', '.join(map(repr, tags))}{remedy}"
    choices = [item.value for part in [hint, *get_args(hint)] if _is_enum(part) for item in part]
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        remedy = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key} = {value!r}: it must be one of {', '.join(map(repr, choices))}{remedy}"
    if reason.startswith("Expected `array`") and isinstance(value, str):
        return f"{key} = {value!r}: it must be a list; write {key} = [{json.dumps(value)}]"
    description = _description(hint)
    meaning = f" ({description})" if description else ""
    shown = f"{key} = {value!r}" if len(repr(value)) <= 80 else key  # a whole section says nothing
    return f"{shown}: {reason[:1].lower() + reason[1:].replace('`', '')}{meaning}"


def _is_enum(hint: Any) -> bool:
    import enum

    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _description(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        for extra in hint.__metadata__:
            if isinstance(extra, msgspec.Meta) and extra.description:
                return extra.description
        return _description(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return next((text for text in map(_description, get_args(hint)) if text), "")
    return ""


def _inline(value: Any) -> str:
    """A value on one line."""
    if not isinstance(value, dict):
        return str(tomlkit.item(value).as_string())
    table = tomlkit.inline_table()
    table.update(value)
    return str(table.as_string())


def _render(struct: msgspec.Struct, name: str, lines: list[str]) -> None:
    hints = get_type_hints(type(struct), include_extras=True)
    if name:
        lines += ["", f"[{name}]"]
    settings = struct.__struct_config__
    if settings.tag_field:
        lines.append(f"{settings.tag_field} = {tomlkit.item(settings.tag).as_string()}")
    sections: list[tuple[str, Any]] = []
    for field in struct.__struct_fields__:
        value = getattr(struct, field)
        if isinstance(value, msgspec.Struct):
            sections.append((field, value))
        elif isinstance(value, tuple) and any(isinstance(item, msgspec.Struct) for item in value):
            sections.append((field, value))
        else:
            text = _description(hints[field])
            comment = f"  # {text}" if text else ""
            if value is None:
                lines.append(f"# {field} ={comment.replace('  #', ' unset:', 1)}")
            else:
                lines.append(f"{field} = {_inline(msgspec.to_builtins(value))}{comment}")
    for field, value in sections:
        path = f"{name}.{field}" if name else field
        if isinstance(value, tuple):
            for item in value:
                start = len(lines)
                _render(item, path, lines)
                lines[start + 1] = f"[[{path}]]"
        else:
            _render(value, path, lines)
