"""Calls the command line in this process, for the tests of its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from fedface import cli


class Result:
    """What one command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def sentence(self) -> str:
        """The one-line error."""
        assert self.code == 2 and self.out == "" and "Traceback" not in self.err, (
            self.code,
            self.out,
            self.err,
        )
        (line,) = filter(None, self.err.splitlines())
        return line.removeprefix("fedface: ")


def caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *before: str
) -> Callable[..., Result]:
    """A function that calls `fedface BEFORE WORDS...` and returns its result."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedface", *before, *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
