"""YAML to dataclasses: every error is reported with file, line and key, and nothing in a file is executed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.codec import encode
from fedface.config import dump, keys_of, parse, read, section
from fedface.errors import ConfigError
from fedface.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class RoundTable:
    """One of two choices."""

    kind: ClassVar[str] = "round-table"

    seats: int = 4

    def __post_init__(self) -> None:
        if self.seats < 1:
            raise ValueError(f"seats must be at least 1, got {self.seats}")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The other."""

    kind: ClassVar[str] = "bench"

    length: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    """A section with every type of our configs."""

    owner: str
    area: float = 10.0
    furniture: RoundTable | BenchConfig = field(default_factory=RoundTable)
    colour: Literal["red", "green"] = "red"
    heights: tuple[float, ...] = ()
    warm: bool = True
    door: Path | None = None
    prices: dict[str, int] = field(default_factory=dict)


def kitchen(text: str, **changes: str) -> Kitchen:
    """Parse a kitchen from the text of `k.yaml`."""
    return parse(text, Kitchen, name="k.yaml", changes=changes)


def test_every_type_is_read_as_written() -> None:
    """Numbers, text, choices, lists, paths, mappings."""
    written = """
owner: 'Ada'
area: 12
furniture: {kind: bench, length: 2.5}
colour: green
heights: [0.8, 1]
warm: no
door: a/b
prices: {tea: 3}
"""
    assert kitchen(written) == Kitchen(
        owner="Ada",
        area=12.0,
        furniture=BenchConfig(length=2.5),
        colour="green",
        heights=(0.8, 1.0),
        warm=False,
        door=Path("a/b"),
        prices={"tea": 3},
    )


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("owner: Ada\naera: 3", 'k.yaml:2: aera: unknown key; did you mean "area"?'),
        ("owner: Ada\nzzzz: 3", "k.yaml:2: zzzz: unknown key; known keys: owner, area"),
        ("area: 3", "k.yaml:1: the key owner is missing"),
        ("owner: Ada\n\narea: big", 'k.yaml:3: area: expected a number, got "big"'),
        ('owner: Ada\narea: "3"', 'k.yaml:2: area: expected a number, got "3"'),
        ("owner: Ada\narea: .nan", "k.yaml:2: area: expected a number"),
        ("owner: Ada\narea: 1e999", "k.yaml:2: area: expected a number"),
        ("owner: Ada\narea:", "k.yaml:2: area: expected a number, got nothing"),
        ("owner: Ada\nwarm: 1", "k.yaml:2: warm: expected true or false"),
        ("owner: [Ada]", "k.yaml:1: owner: expected a text, got a list"),
        ("owner: Ada\nheights: 3", "k.yaml:2: heights: expected a list in brackets, each a number"),
        ("owner: Ada\nheights: [1, x]", "k.yaml:2: heights.1: expected a number"),
        ("owner: Ada\nowner: Bob", "k.yaml:2: owner: the key appears twice"),
        ("owner: Ada\nprices: {tea: 1, tea: 2}", "k.yaml:2: prices.tea: the key appears twice"),
        ("owner: A\ncolour: gren", 'k.yaml:2: colour: expected one of red, green, got "gren"; did you mean "green"?'),
        ("owner: A\nfurniture:\n  kind: bensh", "k.yaml:3: furniture.kind: expected one of round-table, bench, got"),
        ("owner: A\nfurniture: {seats: 3}", "k.yaml:2: furniture: the key kind is missing: one of round-table, bench"),
        ("owner: A\nfurniture: bench", "k.yaml:2: furniture: expected keys with kind one of round-table, bench"),
        ("owner: A\nfurniture:\n  kind: round-table\n  seats: 0", "k.yaml:4: furniture.seats: must be at least 1"),
        ("owner: A\nfurniture:\n  kind: round-table\n  seats: 1.5", "k.yaml:4: furniture.seats: expected a whole"),
        ("", "k.yaml:1: the file is empty; expected a kitchen section"),
        ("- owner", "k.yaml:1: expected a kitchen section with keys owner, area"),
        ("owner: 'Ada", "k.yaml:1: not valid YAML"),
        ("owner: Ada\n---\nowner: Bob", "not valid YAML"),
    ],
)  # fmt: skip
def test_an_error_is_reported_with_its_line(text: str, result: str) -> None:
    """One sentence with file, line, key, expected and actual value."""
    with pytest.raises(ConfigError, match=re.escape(result)):
        kitchen(text)


def test_changes_override_the_file_and_add_to_it() -> None:
    """`--set area=3 --set furniture.length=2`, the second in a section that is missing in the file."""
    changes = {"area": "3", "furniture.kind": "bench", "furniture.length": "2"}
    assert kitchen("owner: Ada\narea: 9", **changes) == Kitchen(
        owner="Ada", area=3.0, furniture=BenchConfig(length=2.0)
    )


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("area", "", "--set area: needs a value"),
        ("area", "[", "--set area: not valid YAML"),
        ("owner.first", "x", "--set owner.first: owner has no parts"),
        ("aera", "3", "k.yaml, as changed: aera: unknown key"),
        ("area", "wide", "k.yaml, as changed: area: expected a number"),
    ],
)
def test_a_wrong_change_is_reported_by_key(key: str, value: str, result: str) -> None:
    """Errors in `--set`."""
    with pytest.raises(ConfigError, match=re.escape(result)):
        kitchen("owner: Ada", **{key: value})


def test_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    """For a typo in a file's name."""
    (tmp_path / "kitchen.yaml").write_text("owner: Ada")
    with pytest.raises(ConfigError, match='no such file; did you mean "kitchen.yaml"'):
        read(tmp_path / "kitchne.yaml", Kitchen)


def test_a_folder_or_binary_file_is_refused(tmp_path: Path) -> None:
    """In one sentence; also bytes that happen to be UTF-8."""
    for name, content in (("bytes.yaml", b"\xff\xfe\x00"), ("zeros.yaml", b"owner: Ada\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: is not a text file$"):
            read(tmp_path / name, Kitchen)
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path, Kitchen)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (
            "owner: Ada\narea: [1\nwarm: no",
            "k.yaml:3: not valid YAML: while parsing a flow sequence, expected",
        ),
        (
            "owner: Ada\n\narea: \x01",
            "k.yaml:3: not valid YAML: it holds a character that does not occur in text",
        ),
        ("owner: " + "[" * 5000, "k.yaml:1: not valid YAML: it is nested too deeply"),
    ],
)
def test_a_malformed_file_is_reported_with_its_line(tmp_path: Path, text: str, result: str) -> None:
    """The same for every reader: the whole file, one section, or only the keys."""
    (tmp_path / "k.yaml").write_text(text)
    for reading in (
        lambda path: read(path, Kitchen),
        lambda path: section(path, "owner"),
        lambda path: keys_of(path),
    ):
        with pytest.raises(ConfigError, match=re.escape(result)) as refused:
            reading(tmp_path / "k.yaml")
        assert "\n" not in str(refused.value)


def test_keys_of_a_file_are_its_top_level_keys(tmp_path: Path) -> None:
    """Whatever their values."""
    (tmp_path / "k.yaml").write_text("owner: Ada\nfurniture: {kind: bensh}\n")
    assert keys_of(tmp_path / "k.yaml") == ("owner", "furniture")
    (tmp_path / "k.yaml").write_text("[1, 2]")
    assert keys_of(tmp_path / "k.yaml") == ()


@pytest.mark.parametrize(
    "hostile",
    [
        'owner: !!python/object/apply:os.system ["true"]',
        "owner: Ada\nheights: !!python/tuple [1]\ndoor: !!python/name:os.system",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\nowner: *d",
        "owner: &a [*a]",
        "owner: Ada\nfurniture: &f {kind: bench, length: *f}",
        "owner: " + "[" * 5000,
        "owner: Ada\nfurniture: {kind: round-table, seats: " + "9" * 6000 + "}",
        "owner: Ada\n? [a, b]\n: 3",
        "owner: Ada\nfurniture: {kind: [bench]}",
        "owner: *unknown",
        "owner: Ada\x00",
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_in_one_sentence(hostile: str) -> None:
    """No object is built, nothing is expanded, and recursion and digits are limited."""
    with pytest.raises(ConfigError) as refused:
        kitchen(hostile)
    assert len(str(refused.value)) < 1000


def test_a_billion_laughs_is_not_expanded() -> None:
    """Nine levels of nine aliases would be 387 million items."""
    lines = ['a0: &a0 ["ha"]'] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="unknown key"):
        kitchen("\n".join(lines))
    with pytest.raises(ConfigError, match="heights.0: expected a number, got a list"):
        parse("heights: [" + "&a [&b [&c [1]]], *a]", _Tall, name="k.yaml")


@dataclass(frozen=True)
class _Tall:
    heights: tuple[float, ...]


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.one_of(st.builds(RoundTable, seats=st.integers(1, 10**9)), st.builds(BenchConfig)),
    st.sampled_from(["red", "green"]),
    st.lists(st.floats(0, 9)),
    st.booleans(),
)
def test_a_yaml_round_trip_is_exact(
    owner: str,
    area: float,
    furniture: RoundTable | BenchConfig,
    colour: str,
    heights: list[float],
    warm: bool,
) -> None:
    """parse(dump(value)) == value."""
    value = Kitchen(
        owner=owner,
        area=area,
        furniture=furniture,
        colour=colour,
        heights=tuple(heights),
        warm=warm,  # type: ignore[arg-type]
    )
    assert parse(dump(value), Kitchen, name="k.yaml") == value


def test_a_stored_experiment_is_read_back_as_the_same_experiment() -> None:
    """A run's experiment.yaml starts the same run again."""
    privacy = "privacy: {kind: privacy-target, epsilon: 2, delta: 1e-5}"
    text = f"question: q?\nname: n\n{privacy}\ndevices: {{kind: synthetic-devices}}"
    first = parse(text, Experiment, name="e.yaml")
    again = parse(dump(first), Experiment, name="e.yaml")
    assert again == first and encode(again) == encode(first) and again.digest() == first.digest()
