"""Cheap replacements for the parts of a run that a test does not look at."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest


class BrightPictures:
    """In place of a face detector: finds something in every picture that is bright on average."""

    def find(self, pixels: np.ndarray) -> list[str]:
        return ["a face"] if pixels.mean() > 127 else []


@contextmanager
def detection() -> Iterator[None]:
    """Metrics that devices compute take a microsecond for each face, not the 170 ms of dlib's network.

    For tests in which nothing depends on which faces are found; tests/device/test_local_metrics.py has the network.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedface.device.local_metrics.NetworkDetector", BrightPictures)
        yield


@contextmanager
def charts() -> Iterator[None]:
    """Reports of whole runs hold nothing in place of each chart: 2 CPU seconds less for a report.

    For tests that look at other parts of a run; tests/reports/ and one run in stories/test_main_job.py have the charts.
    """
    for module in (
        "comparison_charts",
        "method_report",
    ):  # they import `face_grid` by name, and must have the real one
        importlib.import_module(f"fedface.reports.{module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedface.reports.charts.face_grid", lambda rows, columns: b"")
        patch.setattr("fedface.reports.charts.group_dots", lambda groups, series, unit: b"<svg></svg>")
        yield
