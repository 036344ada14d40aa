"""YAML -> frozen dataclasses, or one sentence that says where it is wrong and what would be right.

Called by experiment.py, the device's policy and the command line. The only door to yaml. A choice between
several dataclasses is made by the key `kind`: `kind: homomorphic` picks `HomomorphicConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from fedface.errors import ConfigError

T = TypeVar("T")

PLAIN_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")  # YAML's own, without code


_CHANGED = "is_changed"  # a mark on nodes that are not as the file says


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a file a value stands, for error messages."""

    file: str
    line: int  # from 1
    key: str  # dotted path, "" at the top
    changed: bool = False  # not as the file says: by --set, --photos or a file that varies its recipe

    def error(self, text: str) -> ConfigError:
        """`file:line: key: text`; without a line where the value is not the file's own."""
        if self.changed:
            return ConfigError(f"{self.file}, as changed: {self.key}: {text}")
        return ConfigError(f"{self.file}:{self.line}: {self.key + ': ' if self.key else ''}{text}")

    def at(self, node: yaml.Node, key: str) -> Place:
        """The place of a part."""
        said = self.changed or getattr(node, _CHANGED, False)
        return Place(self.file, node.start_mark.line + 1, f"{self.key}.{key}" if self.key else key, said)


def read(
    path: Path,
    wanted: type[T],
    *,
    changes: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
) -> T:
    """Read a YAML file as the dataclass `wanted`.

    Args:
        path: The file.
        wanted: A frozen dataclass; its fields' types say what is allowed, its `__post_init__` which ranges.
        changes: Dotted keys with new values, such as {"privacy.epsilon": "3"}, which win over the file.
        leave_out: Top-level keys that somebody else reads.

    Raises:
        ConfigError: The file is missing, is no YAML, or says something that `wanted` does not allow.
    """
    return parse(text_of(path), wanted, name=str(path), changes=changes, leave_out=leave_out)


def text_of(path: Path) -> str:
    """The text of a file; raises ConfigError where there is none, with a neighbour's name."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{_suggest(path.name, near)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; wanted a file in it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise ConfigError(f"{path}: is not a text file")
    return text


def _not_yaml(text: str, name: str, error: yaml.YAMLError | RecursionError) -> ConfigError:
    """The parser's complaint, which has several lines and names no file, as `file:line: reason` in one."""
    line, reason = 1, "not valid YAML"
    match error:
        case yaml.MarkedYAMLError():
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            reason = ", ".join(filter(None, (error.context, error.problem)))
        case yaml.reader.ReaderError():
            line = text.count("\n", 0, error.position) + 1
            reason = "it holds a character that no text has"
        case RecursionError():
            reason = "it is nested too deeply"
        case _:
            reason = str(error)
    return ConfigError(f"{name}:{line}: not valid YAML: {' '.join(reason.split())}")


class _PlainLoader(yaml.SafeLoader):
    """Plain data, in which 8e-4 is a number: YAML 1.1 wants a point in it, people do not."""


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def section(path: Path, key: str) -> Any:
    """One top-level key of a YAML file as plain lists, dicts, numbers and strings; None where it is missing.

    Raises:
        ConfigError: The file is missing or no YAML.
    """
    text = text_of(path)
    try:
        everything = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(text, str(path), error) from error
    return everything.get(key) if isinstance(everything, dict) else None


def keys_of(path: Path) -> tuple[str, ...]:
    """The top-level keys of a YAML file; empty where it holds something else.

    Raises:
        ConfigError: The file is missing or no YAML.
    """
    text = text_of(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(text, str(path), error) from error
    return tuple(str(key.value) for key, _ in node.value) if isinstance(node, yaml.MappingNode) else ()


def parse(
    text: str,
    wanted: type[T],
    *,
    name: str,
    changes: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
) -> T:
    """Like `read`, from a text; `name` stands for the file in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(text, name, error) from error
    if node is None:
        raise ConfigError(f"{name}:1: the file is empty; expected {_title(wanted)}")
    if isinstance(node, yaml.MappingNode):
        node.value = [(key, value) for key, value in node.value if key.value not in leave_out]
    for key, value in (changes or {}).items():
        _change(node, key, value)
    return cast(T, _read(node, wanted, Place(name, node.start_mark.line + 1, "")))


def plain(value: Any) -> Any:
    """A dataclass tree as plain dicts, lists, numbers and strings, with `kind` where a choice was made."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        body = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": kind_of(type(value)), **body}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def dump(value: Any) -> str:
    """Plain data as YAML text."""
    return str(yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True))


def kind_of(choice: type) -> str:
    """The word that picks a dataclass in YAML: `HomomorphicConfig` -> "homomorphic", `SyntheticDevices` -> "synthetic-devices"."""
    words = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])", "-", choice.__name__.removesuffix("Config").removesuffix("Architecture")
    )
    return words.lower()


def _change(node: yaml.Node, key: str, value: str) -> None:
    parts = key.split(".")
    try:
        fresh = yaml.compose(value, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--set {key}: not valid YAML: {value}") from error
    for depth, part in enumerate(parts):
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"--set {key}: {'.'.join(parts[:depth])} has no parts")
        slot = next((i for i, (name, _) in enumerate(node.value) if name.value == part), None)
        if slot is None:
            name = yaml.ScalarNode("tag:yaml.org,2002:str", part, node.start_mark, node.end_mark)
            setattr(name, _CHANGED, True)
            inner: yaml.Node = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
            node.value.append((name, inner))
            slot = len(node.value) - 1
        if depth == len(parts) - 1:
            if fresh is None:
                raise ConfigError(f"--set {key}: needs a value after the equals sign")
            fresh.start_mark = node.value[slot][0].start_mark
            setattr(node.value[slot][0], _CHANGED, True)
            node.value[slot] = (node.value[slot][0], fresh)
        node = node.value[slot][1]


def _read(node: yaml.Node, wanted: Any, place: Place) -> Any:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
        raise place.error(f"expected plain YAML without tags, got {node.tag:.80}")
    if typing.get_origin(wanted) is typing.Annotated:
        wanted = typing.get_args(wanted)[0]
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return _read_choice(node, list(typing.get_args(wanted)), place)
    if origin is typing.Literal:
        return _read_literal(node, typing.get_args(wanted), place)
    if origin in (tuple, list):
        return _read_sequence(node, wanted, place)
    if origin is dict:
        return _read_mapping(node, typing.get_args(wanted)[1], place)
    if dataclasses.is_dataclass(wanted):
        return _read_dataclass(node, cast(type, wanted), place)
    return _read_scalar(node, wanted, place)


def _read_dataclass(node: yaml.Node, wanted: type, place: Place) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise place.error(f"expected {_title(wanted)} with keys {_keys(wanted)}, got {_shown(node)}")
    fields = {field.name: field for field in dataclasses.fields(wanted) if field.init}
    hints = typing.get_type_hints(wanted)
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        spot = place.at(key_node, key)
        if key == "kind" and "kind" not in fields:
            if str(value_node.value) != kind_of(wanted):
                raise spot.error(f'expected "{kind_of(wanted)}", got {_shown(value_node)}')
            continue
        if key not in fields:
            raise spot.error(f"unknown key{_suggest(key, list(fields))}; known keys: {_keys(wanted)}")
        if key in values:
            raise spot.error("the key stands twice; keep one")
        values[key] = _read(value_node, hints[key], spot)
        places[key] = spot
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise place.error(f"the key {name} is missing ({_title(hints[name])})")
    try:
        return wanted(**values)
    except (ValueError, ConfigError) as error:
        text = str(error)
        named = next((name for name in values if re.match(rf"{name}\b", text)), None)
        raise (places[named] if named else place).error(
            text.removeprefix(named or "").lstrip(": ") if named else text
        ) from error


def _read_choice(node: yaml.Node, options: list[Any], place: Place) -> Any:
    if type(None) in options and isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return None
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    plains = [option for option in options if option is not type(None) and option not in classes]
    if isinstance(node, yaml.MappingNode) and classes:
        if len(classes) == 1 and not plains:
            return _read(node, classes[0], place)
        kinds = {kind_of(cast(type, option)): option for option in classes}
        for key_node, value_node in node.value:
            if key_node.value == "kind":
                word = str(value_node.value)
                if word not in kinds:
                    raise place.at(key_node, "kind").error(
                        f"expected one of {', '.join(kinds)}, got {word}{_suggest(word, list(kinds))}"
                    )
                return _read(node, kinds[word], place)
        raise place.error(f"the key kind is missing: one of {', '.join(kinds)}")
    for option in plains:
        try:
            return _read(node, option, place)
        except ConfigError:
            if option is plains[-1]:
                raise
    kinds_text = ", ".join(kind_of(cast(type, option)) for option in classes)
    raise place.error(f"expected keys with kind one of {kinds_text}, got {_shown(node)}")


def _read_literal(node: yaml.Node, options: tuple[Any, ...], place: Place) -> Any:
    if isinstance(node, yaml.ScalarNode):
        for option in options:
            if str(option) == node.value:
                return option
    words = [str(option) for option in options]
    got = node.value if isinstance(node, yaml.ScalarNode) else ""
    raise place.error(f"expected one of {', '.join(words)}, got {_shown(node)}{_suggest(got, words)}")


def _read_sequence(node: yaml.Node, wanted: Any, place: Place) -> Any:
    item = typing.get_args(wanted)[0]
    if not isinstance(node, yaml.SequenceNode):
        raise place.error(f"expected a list in brackets, each {_title(item)}, got {_shown(node)}")
    items = [_read(part, item, place.at(part, str(index))) for index, part in enumerate(node.value)]
    return tuple(items) if typing.get_origin(wanted) is tuple else items


def _read_mapping(node: yaml.Node, item: Any, place: Place) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise place.error(f"expected keys and values, got {_shown(node)}")
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in values:
            raise place.at(key_node, key).error("the key stands twice; keep one")
        values[key] = _read(value_node, item, place.at(key_node, key))
    return values


def _read_scalar(node: yaml.Node, wanted: Any, place: Place) -> Any:
    if wanted is Any:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise place.error(f"expected {_title(wanted)}, got {_shown(node)}")
    text = str(node.value)
    if wanted is Path:
        return Path(text)
    if wanted is str:
        return text
    if wanted is bool:
        if node.tag.endswith(":bool"):
            return text.lower() in ("true", "yes", "on")
    elif wanted is int:
        if re.fullmatch(r"[-+]?[0-9][0-9_]{0,40}", text):
            return int(text)
    elif wanted is float and node.style is None:
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise place.error(f"expected {_title(wanted)}, got {_shown(node)}")


def _title(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    if wanted in names:
        return names[wanted]
    if dataclasses.is_dataclass(wanted):
        return f"a {kind_of(cast(type, wanted))} section"
    return str(wanted).replace("typing.", "")


def _keys(wanted: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(wanted) if field.init)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if node.tag.endswith(":null") else f'"{node.value:.80}"'
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"


def _suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""
