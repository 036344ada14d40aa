"""Fixtures for all tests; one thread for each process, since the processes of a run share the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; a test that needs it is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(
            "needs the folder ../shared (real faces, photo files, reference vectors), which is absent here"
        )
    return SHARED


class BrightPictures:
    """In place of a face detector: finds something in every picture that is bright on average."""

    def find(self, pixels: np.ndarray) -> list[str]:
        return ["a face"] if pixels.mean() > 127 else []


@pytest.fixture(scope="module")
def quick_detection() -> Iterator[None]:
    """Metrics that devices compute take a microsecond for each face, not the 170 ms of dlib's network.

    For tests in which nothing depends on which faces are found; tests/device/test_local_metrics.py has the network.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedface.device.local_metrics.NetworkDetector", BrightPictures)
        yield


@pytest.fixture(scope="module")
def quick_charts() -> Iterator[None]:
    """Reports of whole runs hold nothing in place of each chart: 2 CPU seconds less for a report.

    For tests that look at other parts of a run; tests/reports/ and one run in stories/test_main_job.py have the charts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedface.reports.charts.face_grid", lambda rows, columns: b"")
        patch.setattr("fedface.reports.charts.group_dots", lambda groups, series, unit: b"<svg></svg>")
        yield
