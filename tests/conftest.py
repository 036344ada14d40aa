"""Fixtures for all tests; one thread for each process, since the processes of a run share the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import quick
import torch

from fedface.cli.server_certificates import make_certificates

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


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and the certificate of a server on this machine."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ["localhost"])
    return folder


@pytest.fixture
def quick_detection() -> Iterator[None]:
    """See tests/quick.py."""
    with quick.detection():
        yield


@pytest.fixture
def quick_charts() -> Iterator[None]:
    """See tests/quick.py."""
    with quick.charts():
        yield
