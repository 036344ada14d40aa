"""A fictitious run for the tests of the reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import made_up_run

from fedface.reports.run_record import RunRecord


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fictitious run, with its pictures."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def record(folder: Path) -> RunRecord:
    """FIXTURE: a run in which no number was measured."""
    return made_up_run(folder)
