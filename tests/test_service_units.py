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
OTHER_VERSION = 0.3  # by which another version of systemd may judge otherwise


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_valid_and_restricted(unit: str, tmp_path: Path) -> None:
    """As its README says, by systemd's own judgement; with programs that exist here in place of /opt/fedface."""
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
    stated = re.search(r"gives\s+it\s+([\d.]+)\s+of\s+10", (ROOT / unit).with_name("README.md").read_text())
    assert found is not None and stated is not None
    assert float(found[1]) <= float(stated[1]) + OTHER_VERSION, scored.stdout[-300:]
