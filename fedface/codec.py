"""Dataclasses to plain data (mappings, lists, numbers, texts) and back: the one codec of every format.

YAML files (config.py adds their lines), messages, run records, state and checkpoint headers are all decoded here.
A class of a union has `kind: ClassVar[str] = "gan-training"`; a format has `version: ClassVar[int] = 1`.
Both are written with the fields and checked on reading. In JSON every key is required; in YAML a missing key takes the
field's default. NaN and infinity are not valid (RFC 8259).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from fedface.errors import ConfigError, RunError

T = TypeVar("T")
Key = str | int

_MAX_WHOLE = 2**63  # whole numbers stay below it


class CodecError(ValueError):
    """A value that does not fit its type or has no place in the format: where, and what was expected."""

    def __init__(self, path: tuple[Key, ...], text: str) -> None:
        self.path, self.text = path, text
        super().__init__(f"{'.'.join(map(str, path))}: {text}" if path else text)


class Unquoted(str):
    """A YAML scalar without quotes: its expected type decides whether it is a number or a text."""

    def resolved(self) -> bool | int | float | str:
        """As a boolean or a finite number if it looks like one; 8e-4 is a number."""
        if self.lower() in ("true", "yes", "on", "false", "no", "off"):
            return self.lower() in ("true", "yes", "on")
        if re.fullmatch(r"[-+]?[0-9](_?[0-9]){0,40}", self):
            return int(self)
        try:
            number = float(self)
        except ValueError:
            return str(self)
        return number if math.isfinite(number) else str(self)


def kind_of(cls: type) -> str:
    """The `kind` of a dataclass in a union; empty if it has none."""
    kind = getattr(cls, "kind", "")
    return kind if isinstance(kind, str) and "kind" not in _field_names(cls) else ""


def version_of(cls: type) -> int:
    """The version of a format; 0 if the class is not a format."""
    version = getattr(cls, "version", 0)
    return version if isinstance(version, int) and "version" not in _field_names(cls) else 0


def encode(value: Any, *, leave_out: Collection[str] = ()) -> Any:
    """A dataclass tree as plain data.

    Args:
        value: Dataclasses, sequences, mappings with text keys, paths, texts, finite numbers and None.
        leave_out: Fields of the outermost dataclass that are stored elsewhere.

    Raises:
        ValueError: A number is NaN or infinite, or a value cannot be expressed; the text names where.
    """
    return _encode(value, (), leave_out)


def _encode(value: Any, path: tuple[Key, ...], leave_out: Collection[str] = ()) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        heading = {"kind": kind_of(type(value)), "version": version_of(type(value))}
        names = [
            field.name for field in dataclasses.fields(value) if field.init and field.name not in leave_out
        ]
        body = {name: _encode(getattr(value, name), (*path, name)) for name in names}
        return {key: entry for key, entry in heading.items() if entry} | body
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise CodecError(path, f"keys must be text, got {wrong[0]!r}")
        return {key: _encode(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(inner, (*path, index)) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise CodecError(path, f"must be finite, got {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    raise CodecError(path, f"must be plain text, numbers, lists or mappings, got {type(value).__name__}")


def dumps(value: Any, *, leave_out: Collection[str] = ()) -> str:
    """JSON text of a dataclass tree, keys in the order of its fields; raises ValueError as `encode` does."""
    return (
        json.dumps(encode(value, leave_out=leave_out), allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    )


def loads(expected: type[T], text: str) -> T:
    """The dataclass that `dumps` wrote.

    Raises:
        CodecError: Not JSON, or a key is unknown, missing or twice, or a value does not fit.
    """
    return decode(expected, read_json(text), complete=True)


def load(expected: type[T], path: Path, *, given: Mapping[str, Any] | None = None) -> T:
    """Like `loads`, from a file; `given` are values of fields that `dumps` left out.

    Raises:
        FileNotFoundError: There is none.
        RunError: It cannot be read as `expected`; the text names the file.
    """
    try:
        plain = read_json(path.read_text(encoding="utf-8"))
        return decode(
            expected, plain | dict(given or {}) if isinstance(plain, dict) else plain, complete=True
        )
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: expected UTF-8 text, got other bytes") from error
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def read_json(text: str) -> Any:
    """JSON text as plain data; raises CodecError if it is invalid, has a key twice or contains NaN."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise CodecError(
            (), f"expected JSON, got something else at line {error.lineno}: {error.msg}"
        ) from error
    except CodecError:
        raise
    except (ValueError, RecursionError) as error:
        raise CodecError((), "expected JSON, got numbers or nesting without end") from error


def _refuse_constant(name: str) -> NoReturn:
    raise CodecError((), f"expected finite numbers, got {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CodecError((key,), "expected each key once, got it twice")
        result[key] = value
    return result


@typing.overload
def decode(expected: type[T], value: Any, *, complete: bool = False) -> T: ...
@typing.overload
def decode(expected: Any, value: Any, *, complete: bool = False) -> Any: ...
def decode(expected: Any, value: Any, *, complete: bool = False) -> Any:
    """Plain data as `expected`: a dataclass, a union of those, a tuple, a mapping, or a plain type.

    Args:
        expected: The expected type; its dataclasses validate ranges.
        value: Plain data; a value that already has a field's type, such as bytes, is used unchanged.
        complete: Whether every key is required, also if its field has a default.

    Raises:
        CodecError: A key is unknown or missing, or a value does not fit; with its path.
    """
    return _Decoder(complete).decode(expected, value, ())


@dataclasses.dataclass(frozen=True)
class _Decoder:
    complete: bool

    def decode(self, expected: Any, value: Any, path: tuple[Key, ...]) -> Any:
        if typing.get_origin(expected) is typing.Annotated:
            expected = typing.get_args(expected)[0]
        origin = typing.get_origin(expected)
        if origin in (typing.Union, types.UnionType):
            return self._union(typing.get_args(expected), value, path)
        if origin is Literal:
            return _literal(typing.get_args(expected), value, path)
        if origin in (tuple, list):
            return self._sequence(expected, value, path)
        if origin is dict:
            if not isinstance(value, dict):
                raise CodecError(path, f"expected keys and values, got {_shown(value)}")
            item = typing.get_args(expected)[1]
            return {str(key): self.decode(item, inner, (*path, key)) for key, inner in value.items()}
        if dataclasses.is_dataclass(expected):
            return self._dataclass(expected, value, path)
        return _scalar(expected, value, path)

    def _dataclass(self, expected: Any, value: Any, path: tuple[Key, ...]) -> Any:
        fields = {field.name: field for field in dataclasses.fields(expected) if field.init}
        known = ", ".join(fields)
        if not isinstance(value, dict):
            raise CodecError(path, f"expected {title_of(expected)} with keys {known}, got {_shown(value)}")
        came = value.get("version")
        if (version := version_of(expected)) and (type(came) is not int or came != version):
            raise CodecError(
                path, f"expected version {version}, got {_shown(came)}; use the fedface that wrote it"
            )
        heading = {key for key, entry in (("kind", kind_of(expected)), ("version", version)) if entry}
        hints, values = _hints(expected), {}
        for key, inner in value.items():
            if key in fields:
                values[key] = self.decode(hints[key], inner, (*path, key))
            elif key not in heading:
                raise CodecError((*path, key), f"unknown key{did_you_mean(key, fields)}; known keys: {known}")
            elif key == "kind" and inner != kind_of(expected):
                raise CodecError((*path, key), f'expected "{kind_of(expected)}", got {_shown(inner)}')
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if name not in values and (required or self.complete):
                raise CodecError(path, f"the key {name} is missing ({title_of(hints[name])})")
        if self.complete and "kind" in heading and "kind" not in value:
            raise CodecError(path, f"the key kind is missing ({kind_of(expected)})")
        return _construct(expected, values, path)

    def _union(self, options: tuple[Any, ...], value: Any, path: tuple[Key, ...]) -> Any:
        if value is None and type(None) in options:
            return None
        classes = [option for option in options if dataclasses.is_dataclass(option)]
        others = [option for option in options if option not in (*classes, type(None))]
        if classes and (isinstance(value, dict) or not others):
            return self._kind(classes, value, path)
        return self._first(others, value, path)

    def _first(self, options: list[Any], value: Any, path: tuple[Key, ...]) -> Any:
        """The first option that the value fits; raises the error of the last one if it fits none."""
        for option in options[:-1]:
            try:
                return self.decode(option, value, path)
            except CodecError:
                continue
        return self.decode(options[-1], value, path)

    def _kind(self, classes: list[Any], value: Any, path: tuple[Key, ...]) -> Any:
        """The dataclass of the key `kind`, which is optional if there is only one."""
        if len(classes) == 1:
            return self.decode(classes[0], value, path)
        kinds = {kind_of(option): option for option in classes}
        if "" in kinds or len(kinds) < len(classes):
            raise TypeError(f"each class of a union needs a kind of its own: {classes}")
        names = ", ".join(kinds)
        if not isinstance(value, dict):
            raise CodecError(path, f"expected keys with kind one of {names}, got {_shown(value)}")
        if "kind" not in value:
            raise CodecError(path, f"the key kind is missing: one of {names}")
        word = value["kind"]
        if not isinstance(word, str) or word not in kinds:
            near = did_you_mean(word, kinds)
            raise CodecError((*path, "kind"), f"expected one of {names}, got {_shown(word)}{near}")
        return self.decode(kinds[word], value, path)

    def _sequence(self, expected: Any, value: Any, path: tuple[Key, ...]) -> Any:
        items = typing.get_args(expected)
        if not isinstance(value, list):
            raise CodecError(
                path, f"expected a list in brackets, each {title_of(items[0])}, got {_shown(value)}"
            )
        if typing.get_origin(expected) is list or items[1:] == (...,):
            items = items[:1] * len(value)
        if len(items) != len(value):
            raise CodecError(path, f"expected {len(items)} values, got {len(value)}")
        parts = enumerate(zip(items, value, strict=True))
        return typing.get_origin(expected)(self.decode(item, part, (*path, i)) for i, (item, part) in parts)


def _construct(expected: Any, values: dict[str, Any], path: tuple[Key, ...]) -> Any:
    """Construct a dataclass; an error of its validation is attributed to the field that it begins with."""
    try:
        return expected(**values)
    except (ValueError, OverflowError, ConfigError) as error:
        text = str(error)
        name = next((name for name in values if re.match(rf"{name}\b", text)), None)
        if name is None:
            raise CodecError(path, text) from error
        raise CodecError((*path, name), text.removeprefix(name).lstrip(": ")) from error


def _literal(options: tuple[Any, ...], value: Any, path: tuple[Key, ...]) -> Any:
    for option in options:
        if (type(value) is type(option) and value == option) or (
            isinstance(value, Unquoted) and value == str(option)
        ):
            return option
    words = [str(option) for option in options]
    raise CodecError(
        path, f"expected one of {', '.join(words)}, got {_shown(value)}{did_you_mean(value, words)}"
    )


def _scalar(expected: Any, value: Any, path: tuple[Key, ...]) -> Any:
    if expected in (str, Path) and isinstance(value, str) and (value or expected is str):
        return Path(value) if expected is Path else str(value)
    if expected is Any:
        return value
    plain: Any = value.resolved() if isinstance(value, Unquoted) else value
    if expected is float and type(plain) is int and abs(plain) < _MAX_WHOLE:
        plain = float(plain)
    if expected in (int, float, bool):
        too_large = expected is int and type(plain) is int and abs(plain) >= _MAX_WHOLE
        if type(plain) is expected and not too_large and math.isfinite(plain):
            return plain
    elif isinstance(expected, type) and isinstance(plain, expected):
        return plain
    raise CodecError(path, f"expected {title_of(expected)}, got {_shown(value)}")


def _field_names(cls: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def title_of(expected: Any) -> str:
    """A type in words for messages: "a whole number", "a synthetic-devices section"."""
    if typing.get_origin(expected) is typing.Annotated:
        expected = typing.get_args(expected)[0]
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    if expected in names:
        return names[expected]
    if dataclasses.is_dataclass(expected):
        name = getattr(expected, "__name__", "").removesuffix("Config").removesuffix("Architecture")
        return f"a {kind_of(expected) or re.sub('(?<=[a-z0-9])(?=[A-Z])', '-', name).lower()} section"  # type: ignore[arg-type]
    return str(expected).replace("typing.", "")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value:.80}"'
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "keys and values"
    return "nothing" if value is None else f"{value!r:.80}"


def did_you_mean(word: Any, known: Collection[str]) -> str:
    """A suggestion of the most similar known word, as the end of a sentence; empty if there is none."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) if isinstance(word, str) else []
    return f'; did you mean "{near[0]}"?' if near else ""
