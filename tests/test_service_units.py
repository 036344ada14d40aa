"""The systemd units are valid and leave a service few rights."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNITS = ("clients/fedface-client.service", "server/fedface-server.service")
MAX_EXPOSURE = 2.5  # of 10; systemd calls up to 3 "OK" for a service with a network


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_valid_and_restricted(unit: str, tmp_path: Path) -> None:
    """By systemd's own judgement, with programs that exist here in place of /opt/fedface."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    copy = tmp_path / Path(unit).name
    copy.write_text(re.sub(r"/opt/fedface/bin/\S+", sys.executable, (ROOT / unit).read_text(), count=0))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=60
    )
    assert verified.returncode == 0 and copy.name not in verified.stderr, verified.stderr
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", copy],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", scored.stdout)
    assert found is not None and float(found[1]) <= MAX_EXPOSURE, scored.stdout[-300:]
