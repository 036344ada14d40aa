"""Frozen dataclasses to JSON and back, strictly: every key known, every key present, every number finite.

Called by reports.run alone. A union is told apart by the names of its members' fields, so no tag is written:
`{"not_measured": "why"}` can only be a `NotMeasured`. Standards: RFC 8259 has no NaN; neither do we.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedface.errors import RunError

T = TypeVar("T")


def dumps(value: Any) -> str:
    """JSON text of a dataclass, keys in the order of its fields, indented by one.

    Raises:
        ValueError: A number is NaN or infinite, or a value has no place in JSON; the text names where.
    """
    return json.dumps(_plain(value, ""), allow_nan=False, indent=1, ensure_ascii=False) + "\n"


def loads(kind: type[T], text: str) -> T:
    """The dataclass `kind` that `dumps` wrote.

    Raises:
        RunError: Not JSON, NaN, a key twice, unknown, missing, or a value of the wrong type or out of bounds.
    """
    try:
        plain = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise RunError(f"expected JSON, got something else at line {error.lineno}: {error.msg}") from error
    value: T = _typed(kind, plain, "")
    return value


def _refuse_constant(name: str) -> float:
    raise RunError(f"expected finite numbers, got {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RunError(f"{twice}: expected each key once, got it twice")
    return result


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where}: keys must be text, got {name!r}")
        return {name: _plain(inner, f"{where}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be finite, got {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where}: must be plain text, numbers, lists or mappings, got {type(value).__name__}")


def _typed(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _typed(_member(arguments, value, where), value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, " or ".join(repr(choice) for choice in arguments), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_typed(arguments[0], inner, f"{where}[{i}]") for i, inner in enumerate(value))
        if len(value) != len(arguments):
            raise _wrong(where, f"{len(arguments)} values", value)
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_typed(part, inner, f"{where}[{i}]") for i, (part, inner) in pairs)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "a mapping", value)
        return {name: _typed(arguments[1], inner, f"{where}.{name}") for name, inner in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise _wrong(where, {float: "a number", int: "a whole number", str: "text"}.get(kind, str(kind)), value)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, f"the fields of a {kind.__name__}", value)
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in value:
        if name not in names:
            raise RunError(f"{f'{where}.{name}'.lstrip('.')}: unknown key; expected {', '.join(names)}")
    later = _later(kind)
    for name in names:
        if name not in value and name not in later:
            raise RunError(f"{f'{where}.{name}'.lstrip('.')}: missing")
    fields = {
        name: _typed(hints[name], value[name], f"{where}.{name}".lstrip("."))
        for name in names
        if name in value
    }
    try:
        return kind(**fields)
    except ValueError as error:
        raise RunError(f"{where or kind.__name__}: {error}") from error


def _later(kind: Any) -> set[str]:
    """What older records lack has a factory: an empty collection of what they did not measure."""
    return {f.name for f in dataclasses.fields(kind) if f.default_factory is not dataclasses.MISSING}


def _member(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            fields = {field.name for field in dataclasses.fields(kind)}
            if isinstance(value, dict) and fields - _later(kind) <= set(value) <= fields:
                return kind
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return kind
        elif kind in (int, str, bool) and type(value) is kind:
            return kind
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise _wrong(where, names, value)


def _wrong(where: str, wanted: str, value: Any) -> RunError:
    return RunError(f"{where or 'the record'}: expected {wanted}, got {str(value)[:60]!r}")
