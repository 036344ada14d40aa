"""YAML files to dataclasses, with errors that give the line and a correction.

The only module that imports yaml. Nodes become plain data, which codec.py decodes; what it refuses is reported with
the line: `experiments/a.yaml:5: privacy.epsilom: unknown key; did you mean "epsilon"?`. Nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedface.codec import CodecError, Key, Unquoted, decode, did_you_mean, encode, title_of
from fedface.errors import ConfigError

T = TypeVar("T")

PLAIN_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")  # without code


def read(
    path: Path, expected: type[T], *, changes: Mapping[str, str] | None = None, leave_out: Sequence[str] = ()
) -> T:
    """Read a YAML file as the dataclass `expected`.

    Args:
        path: The file.
        expected: A frozen dataclass; its fields' types and ranges define what is allowed.
        changes: Dotted keys with new values, such as {"privacy.epsilon": "3"}, which override the file.
        leave_out: Top-level keys that are read elsewhere.

    Raises:
        ConfigError: The file is missing, is not YAML, or has something that `expected` does not allow.
    """
    return parse(text_of(path), expected, name=str(path), changes=changes, leave_out=leave_out)


def parse(
    text: str,
    expected: type[T],
    *,
    name: str,
    changes: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
) -> T:
    """Like `read`, from a text; `name` is the file name in errors."""
    node = _compose(text, name)
    if node is None:
        raise ConfigError(f"{name}:1: the file is empty; expected {title_of(expected)}")
    plain, changed = _plain(node, name), set[tuple[Key, ...]]()
    if isinstance(plain, dict):
        plain = {key: value for key, value in plain.items() if key not in leave_out}
    for key, value in (changes or {}).items():
        _change(plain, key, value, changed)
    try:
        return decode(expected, plain)
    except CodecError as error:
        raise _located(error, node, name, changed) from error


def section(path: Path, key: str) -> Any:
    """One top-level key of a YAML file as plain lists, dicts, numbers and strings; None where it is missing.

    Raises:
        ConfigError: The file is missing or not YAML.
    """
    node = _compose(text_of(path), str(path))
    plain = None if node is None else _plain(node, str(path))
    return _resolved(plain.get(key)) if isinstance(plain, dict) else None


def keys_of(path: Path) -> tuple[str, ...]:
    """The top-level keys of a YAML file; empty where it holds something else.

    Raises:
        ConfigError: The file is missing or not YAML.
    """
    node = _compose(text_of(path), str(path))
    return tuple(str(key.value) for key, _ in node.value) if isinstance(node, yaml.MappingNode) else ()


def local_path(path: Path, folder: Path) -> Path:
    """A path that a file names: relative to the folder of that file, `~` for the home folder.

    Raises:
        ConfigError: It begins with `~`, and this user has no home folder.
    """
    try:
        return folder / path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: this user has no home folder; set HOME, or write the path without ~"
        ) from error


def dump(value: Any) -> str:
    """A dataclass tree as YAML text."""
    return str(yaml.safe_dump(encode(value), sort_keys=False, allow_unicode=True))


def text_of(path: Path) -> str:
    """The text of a file; raises ConfigError with a similar name if it does not exist."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{did_you_mean(path.name, near)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; expected a file in it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise ConfigError(f"{path}: is not a text file")
    return text


def _compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a text; raises ConfigError as `file:line: reason` in one line."""
    line, reason = 1, ""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = "it holds a character that does not occur in text"
    except RecursionError:
        reason = "it is nested too deeply"
    raise ConfigError(f"{name}:{line}: not valid YAML: {' '.join(reason.split())}")


@dataclass
class _Builder:
    """Nodes to plain data. A node referenced by several aliases is built once, so nested aliases do not expand
    exponentially."""

    name: str
    built: dict[int, Any]

    def build(self, node: yaml.Node, path: tuple[Key, ...]) -> Any:
        if id(node) not in self.built:
            self.built[id(node)] = _UNFINISHED
            self.built[id(node)] = self._build(node, path)
        if self.built[id(node)] is _UNFINISHED:
            raise self._error(node, path, "expected plain YAML, got an alias for a part of itself")
        return self.built[id(node)]

    def _build(self, node: yaml.Node, path: tuple[Key, ...]) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            raise self._error(node, path, f"expected plain YAML without tags, got {node.tag:.80}")
        if isinstance(node, yaml.SequenceNode):
            return [self.build(part, (*path, index)) for index, part in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if node.tag.endswith(":null"):
            return None
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        return str(node.value) if quoted else Unquoted(node.value)

    def _mapping(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, path, "expected a text as key, got a list or keys and values")
            if key in result:
                raise self._error(key_node, (*path, key), "the key appears twice; delete one")
            result[key] = self.build(value_node, (*path, key))
        return result

    def _error(self, node: yaml.Node, path: tuple[Key, ...], text: str) -> ConfigError:
        return ConfigError(f"{self.name}:{node.start_mark.line + 1}: {CodecError(path, text)}")


_UNFINISHED = object()


def _plain(node: yaml.Node, name: str) -> Any:
    """Nodes as plain data: mappings, lists, quoted texts, unquoted scalars and None."""
    try:
        return _Builder(name, {}).build(node, ())
    except RecursionError as error:
        raise ConfigError(f"{name}:1: not valid YAML: it is nested too deeply") from error


def _resolved(plain: Any) -> Any:
    """Plain data with each unquoted scalar converted to the type that it looks like."""
    match plain:
        case dict():
            return {key: _resolved(value) for key, value in plain.items()}
        case list():
            return [_resolved(value) for value in plain]
        case Unquoted():
            return plain.resolved()
        case _:
            return plain


def value_of(key: str, text: str) -> Any:
    """The value of `--set KEY=TEXT` as plain data with unresolved unquoted scalars; raises ConfigError."""
    try:
        node = _compose(text, key)
        value = None if node is None else _plain(node, key)
    except ConfigError as error:
        raise ConfigError(f"--set {key}: not valid YAML: {text}") from error
    if node is None:
        raise ConfigError(f"--set {key}: needs a value after the equals sign")
    return value


def _change(plain: Any, key: str, text: str, changed: set[tuple[Key, ...]]) -> None:
    """Set a dotted key, creating missing sections, and record what was changed."""
    value = value_of(key, text)
    *sections, last = parts = key.split(".")
    for depth, part in enumerate(sections):
        if not isinstance(plain, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parts[:depth])} has no parts")
        if part not in plain:
            changed.add(tuple(parts[: depth + 1]))
        plain = plain.setdefault(part, {})
    if not isinstance(plain, dict):
        raise ConfigError(f"--set {key}: {'.'.join(sections)} has no parts")
    plain[last] = value
    changed.add(tuple(parts))


def _located(error: CodecError, root: yaml.Node, name: str, changed: set[tuple[Key, ...]]) -> ConfigError:
    """An error with file and line; without a line if the value is not from the file."""
    path = error.path
    if any(path[:end] in changed for end in range(1, len(path) + 1)):
        return ConfigError(f"{name}, as changed: {error}")
    node, line = root, root.start_mark.line
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == part]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            pairs = [(node.value[part], node.value[part])]
        else:
            pairs = []
        if not pairs:
            break
        line, node = pairs[0][0].start_mark.line, pairs[0][1]
    return ConfigError(f"{name}:{line + 1}: {error}")
