"""Words that the field has a better word for do not come back: one list, here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BETTER = {
    r"misfit": "consistency error",
    r"yardstick": "reference set",
    r"tournament": "ranking (of models)",
    r"belongings": "device state",
    r"glimpse": "snapshot",
    r"pretended": "simulated",
    r"hangs? on": "depends on",
    r"put back": "rolled back, or restored",
    r"cut to length": "clipped to L2 norm",
    r"lets? anybody guess": "what anyone can infer",
    r"called (by|from) [`a-z]": "delete the sentence: a search answers who calls",
    r"\bdear\b": "costly",
    r"bare (update|figures|mean|metrics|sum)": "without noise",
    r"shrunken": "degraded, or low-resolution",
    r"(drawn|made) (faces?|people)": "synthetic (rendered) or generated faces",
    r"keeps? (a|the|this|its|no) promise": "meets the privacy target",
    r"a promise per": "the privacy unit is",
    r"\bkept answers?\b": "stored replies",
    r"made (image|picture)s?": "generated images",
    r"made large again": "upsampled",
    r"figures that devices": "metrics that devices",
    r"nobody's business": "private",
    r"a folder is no": "reject folders",
    r"\banybody\b": "anyone",
    r"\btwins?\b": "reference (implementation), or copy",
    r"\bslips?\b": "typo, or error",
    r"at the door": "at construction, or before ...",
    r"for free": "at no privacy cost",
    r"\bchances?\b": "rng, or probability",
    r"\bbook(s|ed|ings?)?\b": "record(ed), entry, or ledger",
    r"(?<!there )\b(is|are) no (ledger|picture|pictures|index|text|file|CSV|evidence|refusal)\b": "is not a ...",
    r"\bunpromised\b": "without DP",
    r"\bnobody\b(?!\")": "no one, or name who",
    r"\bbare\b": "without noise, or alone",
    r"in_words": "describe",
    r"\b(told|wanted)\b": "reported; expected",
    r"\bleft_out\b": "skipped",
}


def test_every_pattern_finds_what_it_is_for() -> None:
    """A pattern with a mistake would forbid nothing."""
    assert re.search(next(p for p in BETTER if "called" in p), "called by `x`", re.I)
    assert all(re.compile(pattern) for pattern in BETTER)


TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("fedface", "clients", "server", "experiments", "docs", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml", ".html") and path != Path(__file__).resolve()
} | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}


@pytest.mark.parametrize("pattern", BETTER)
def test_the_field_has_a_better_word(pattern: str) -> None:
    """In code, documentation, experiments and tests."""
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert not found, f"write {BETTER[pattern]!r} instead of {pattern!r}:\n" + "\n".join(found)
