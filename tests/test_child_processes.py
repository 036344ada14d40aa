"""Programs that a command starts: one at a time for each log, and none outlives its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedface.cli.child_processes import started, started_function
from fedface.errors import FederationError

ROOT = Path(__file__).resolve().parents[1]
SLEEPER = ("python", "-c", "import time; print('here', flush=True); time.sleep(600)")


def test_a_program_runs_once_for_its_log_and_ends_with_the_block(tmp_path: Path) -> None:
    """A second start must not replace the first one's output."""
    log = tmp_path / "log"
    with started(SLEEPER, log) as child:
        child.wait_until(lambda: "here" in child.output(), seconds=30)
        with pytest.raises(FederationError, match="is running already"), started(SLEEPER, log):
            pass
        assert child.running and "here" in child.output()
    assert not child.running
    with started(SLEEPER, log) as again:
        assert again.running


def sleeper() -> None:
    """A function that prints and stays."""
    print("here", flush=True)
    os.write(1, b"here too")
    time.sleep(600)


def test_a_function_runs_once_for_its_log_and_ends_with_the_block(tmp_path: Path) -> None:
    """In a process of its own, whose output goes to the log."""
    log = tmp_path / "log"
    log.write_text("of an earlier start")
    with started_function(sleeper, log=log, name="sleeper") as child:
        child.wait_until(lambda: "here too" in child.output(), seconds=30)
        assert "earlier" not in child.output()
        with pytest.raises(FederationError, match="sleeper is running already"):
            with started_function(sleeper, log=log, name="sleeper"):
                pass
        assert child.running
    assert not child.running


def test_a_program_that_ends_is_reported_with_its_words(tmp_path: Path) -> None:
    """Its exit code, and the reason that Flower's programs print."""
    words = "print('noise\\nExit Code: 305\\nthe key is unknown\\n\\nvisit us'); raise SystemExit(1)"
    with started(("python", "-c", words), tmp_path / "log") as child:
        with pytest.raises(FederationError) as failure:
            child.wait_until(lambda: False)
        sentence = str(failure.value)
    assert sentence == "python ended with exit code 1: Exit Code: 305 the key is unknown"


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="no-such-program is not installed here"):
        with started(("no-such-program",), tmp_path / "log"):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_program_ends_when_its_command_is_killed(tmp_path: Path) -> None:
    """Otherwise a SuperNode would stay online without an executor."""
    code = f"""
import time
from pathlib import Path
from fedface.cli.child_processes import started, started_function
with started({SLEEPER!r}, Path("log")) as child:
    print(child._process.pid, flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    program = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(program, signal.SIGKILL)
        pytest.fail("the program outlived its command")
