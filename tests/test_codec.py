"""The codec: dataclasses to plain data and back, for JSON and YAML."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedface.codec import CodecError, decode, dumps, encode, kind_of, load, loads
from fedface.errors import RunError


@dataclass(frozen=True)
class Circle:
    """One of two shapes."""

    kind: ClassVar[str] = "circle"

    radius: float


@dataclass(frozen=True)
class Square:
    """The other."""

    kind: ClassVar[str] = "square"

    side: float = 1.0


@dataclass(frozen=True)
class Part:
    """A class without alternatives that has a field called kind."""

    kind: str = "screw"


@dataclass(frozen=True)
class Drawing:
    """A format with a version."""

    version: ClassVar[int] = 3

    shapes: tuple[Circle | Square, ...]
    corners: tuple[int, str] = (0, "a")
    parts: dict[str, Part] = field(default_factory=dict)
    file: Path | None = None
    count: int | Square = 0
    extra: dict[str, Any] = field(default_factory=dict)


DRAWING = Drawing(
    shapes=(Circle(1.5), Square()), corners=(2, "b"), parts={"left": Part("nail")}, file=Path("a/b"),
    count=Square(2.0), extra={"deep": [1, None, {"x": True}]},
)  # fmt: skip


def test_a_json_round_trip_is_exact() -> None:
    """Kinds and the version are keys of their own; a field called kind remains a field."""
    assert loads(Drawing, dumps(DRAWING)) == DRAWING
    plain = encode(DRAWING)
    assert list(plain)[0] == "version" and plain["shapes"][0] == {"kind": "circle", "radius": 1.5}
    assert plain["parts"] == {"left": {"kind": "nail"}}
    assert (kind_of(Circle), kind_of(Part), kind_of(Drawing)) == ("circle", "", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 3', '"version": 2', "expected version 3, got 2; use the fedface that wrote it"),
        ('"version": 3,', "", "expected version 3, got nothing"),
        ('"version": 3', '"version": "3"', 'expected version 3, got "3"'),
        ('"version": 3', '"version": 3.0', "expected version 3, got 3.0"),
        (
            '"circle"',
            '"circel"',
            'shapes.0.kind: expected one of circle, square, got "circel"; did you mean "circle"?',
        ),
        ('"kind": "circle",', "", "shapes.0: the key kind is missing: one of circle, square"),
        ('"radius"', '"radios"', 'shapes.0.radios: unknown key; did you mean "radius"?; known keys: radius'),
        ("1.5", "NaN", "expected finite numbers, got NaN"),
        ("1.5", "true", "shapes.0.radius: expected a number, got True"),
        ("1.5", '"1.5"', 'shapes.0.radius: expected a number, got "1.5"'),
        ("1.5", "9" * 30, "shapes.0.radius: expected a number, got 999"),
        ("1.5", "9" * 9000, "expected JSON, got numbers or nesting without end"),
        ('"b"\n ]', '"b", 3\n ]', "corners: expected 2 values, got 3"),
        ('"file": "a/b",', "", "the key file is missing"),
        ('"file"', '"shapes"', "shapes: expected each key once, got it twice"),
        ("1.5", "[" * 5000, "expected JSON, got"),
    ],
)
def test_invalid_data_is_refused_with_its_path(old: str, new: str, message: str) -> None:
    """Each in one sentence."""
    with pytest.raises(CodecError, match=re.escape(message)):
        loads(Drawing, dumps(DRAWING).replace(old, new, 1))


def test_only_complete_data_is_read_from_json() -> None:
    """A key with a default may be missing in YAML, not in JSON."""
    assert decode(Square, {}) == Square()
    with pytest.raises(CodecError, match="the key side is missing"):
        decode(Square, {}, complete=True)


def test_a_union_of_classes_without_kinds_is_a_programming_error() -> None:
    """Not an error of the file."""
    with pytest.raises(TypeError, match="needs a kind of its own"):
        decode(Square | Part, {"kind": "square"})


def test_unsupported_values_are_not_written() -> None:
    """With their path."""
    for value, message in (
        (math.inf, "extra.a.0: must be finite, got inf"),
        ({1}, "extra.a.0: must be plain text"),
    ):
        with pytest.raises(ValueError, match=message):
            dumps(Drawing(shapes=(), extra={"a": [value]}))
    with pytest.raises(ValueError, match="extra: keys must be text, got 1"):
        dumps(Drawing(shapes=(), extra={1: 2}))  # type: ignore[dict-item]


def test_a_field_can_be_stored_elsewhere(tmp_path: Path) -> None:
    """Left out of the file and given on reading; errors in the file are reported with its name."""
    path = tmp_path / "drawing.json"
    path.write_text(dumps(DRAWING, leave_out=("file",)))
    assert load(Drawing, path, given={"file": Path("a/b")}) == DRAWING
    with pytest.raises(RunError, match=r"drawing.json: the key file is missing"):
        load(Drawing, path)
    path.write_bytes(b"\xff")
    with pytest.raises(RunError, match="drawing.json: expected UTF-8 text, got other bytes"):
        load(Drawing, path)


def test_a_class_without_alternatives_still_has_its_kind_in_json() -> None:
    """JSON has every key; YAML may omit it."""
    assert loads(Circle, dumps(Circle(2.0))) == Circle(2.0)
    with pytest.raises(CodecError, match=r"the key kind is missing \(circle\)"):
        loads(Circle, '{"radius": 2.0}')
    assert decode(Circle, {"radius": 2.0}) == Circle(2.0)
