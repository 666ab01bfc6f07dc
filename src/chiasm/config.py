"""TOML in, frozen dataclasses out, and back: the only place that knows TOML.

A recipe is one TOML file. ``build`` turns a nested mapping into nested frozen dataclasses; an unknown key or a wrong
type raises ``ConfigError`` with the dotted field name and, where one is near, the name that was probably meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from chiasm.errors import ConfigError

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        ConfigError: When the file is absent or is not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe `{path.name}` does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe `{path.name}` cannot be read: {type(error).__name__}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"`{path.name}` is not valid TOML: {error}") from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a deep copy of ``values`` with ``dotted.key=value`` overrides applied (values are parsed as TOML)."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override `{item}` has no `=`", hint="write it as `--set optim.lr=1e-4`")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        node = result
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"`{key}` cannot be set: `{parent}` is a value, not a table")
        node[leaf] = value
    return result


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Return dataclass ``cls`` filled from a mapping, recursively.

    Args:
        cls: A dataclass; its own ``__post_init__`` may validate and raise ``ConfigError``/``ValueError``.
        values: What a TOML table holds.
        where: Dotted prefix for messages.

    Raises:
        ConfigError: Unknown key, missing key, or a value of the wrong type; the message names the dotted field.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            meant = f"; did you mean `{where}{near[0]}`?" if near else ""
            raise ConfigError(f"unknown field `{where}{key}`{meant}", hint=f"known fields: {', '.join(fields)}")
    filled: dict[str, Any] = {}
    for name, f in fields.items():
        if name in values:
            filled[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing field `{where}{name}`")
    try:
        return cls(**filled)
    except ConfigError as error:
        raise _located(error, fields, where) from error.__cause__
    except ValueError as error:
        raise ConfigError(f"in `{where.rstrip('.') or cls.__name__}`: {error}") from error


def _located(error: ConfigError, fields: Mapping[str, Any], where: str) -> ConfigError:
    """Return the error with the dotted name of its field: a dataclass of several tables cannot know which one it is."""
    name = re.match(r"`(\w+)`", error.message)
    if name is None or name[1] not in fields:
        return error
    return ConfigError(f"`{where}{error.message[1:]}", hint=error.hint)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        problem: ConfigError | None = None
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                problem = problem or error
        raise problem or ConfigError(f"`{where}` has an unusable value")
    if hint is Any:
        return value
    if origin is Literal:
        allowed = get_args(hint)
        if value in allowed:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"`{where}` is `{value}`{meant}", hint=f"one of: {', '.join(map(str, allowed))}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` must be a table, got {type(value).__name__}")
        return build(hint, value, where=f"{where}.")
    if origin in (tuple, list) and isinstance(value, Sequence) and not isinstance(value, str):
        args = get_args(hint)
        if origin is list or (len(args) == 2 and args[1] is Ellipsis):
            items = [_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
        else:
            if len(args) != len(value):
                raise ConfigError(f"`{where}` must have {len(args)} items, got {len(value)}")
            items = [_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))]
        return items if origin is list else tuple(items)
    if (
        origin is dict or (origin is not None and isinstance(origin, type) and issubclass(origin, Mapping))
    ) and isinstance(value, Mapping):
        _, inner = get_args(hint)
        return {str(k): _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"`{where}` must be a finite number, got {value}")
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    expected = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"`{where}` must be {expected}, got {type(value).__name__}")


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain values; None fields are left out, as TOML has no null."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is not None:
            result[f.name] = _plain(value)
    return result


def changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults as plain values, for digests that must last."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = getattr(config, f.name)
        if value != default:
            is_nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
            changed[f.name] = changed_fields(value) if is_nested else _plain(value)
    return changed


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def to_toml(config: Any) -> str:
    """Return a dataclass or a mapping as TOML text that :func:`read_toml` and :func:`build` read back."""
    values = config if isinstance(config, Mapping) else to_mapping(config)
    lines: list[str] = []
    _write_table(_plain(values), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(values: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    tables = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in tables.items():
        lines.extend(["", f"[{prefix}{_key(key)}]"])
        _write_table(value, f"{prefix}{_key(key)}.", lines)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
    return key if bare else _string(key)


def _string(text: str) -> str:
    # JSON escapes are a subset of TOML's basic-string escapes, except DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    raise ConfigError(f"a value of type {type(value).__name__} cannot be written as TOML")
