"""A command loads what it needs: help loads nothing heavy, and an owner's commands load nothing that trains."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from png_files import write_png
from tiny import answered_device

from fedface.cli import COMMANDS, GROUPS

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"opacus", "tenseal", "flwr", "ray", "matplotlib", "skimage", "fastapi", "safetensors"}
HEAVY = TRAINING | {"torch", "dp_accounting", "scipy", "numpy", "dlib", "PIL", "yaml"}
CALL = """
import sys
from fedface import cli
for words in sys.argv[1].split(";"):
    sys.argv = ["fedface", *words.split()]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
print("loaded:", *{name.split(".")[0] for name in sys.modules})
"""


PAGE = """
from pathlib import Path
from fedface.cli.device_web import AdmittedRuns, page
from fedface.device.state import device_state
file = Path("device.yaml")
assert "What left this device" in page(device_state(file), file, AdmittedRuns(file))
"""


def loaded(folder: Path, words: str, first: str = "") -> set[str]:
    """The packages in a process that ran a script and these commands, separated by semicolons."""
    done = subprocess.run(
        [sys.executable, "-c", first + CALL, words],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "index"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_heavy_and_is_quick(tmp_path: Path) -> None:
    """Of every command and group; half a CPU second for one."""
    names = [name for name, _, _ in COMMANDS]
    names += [f"{group} {command.name or command.callback.__name__}".replace("_command", "").replace("_", "-")
              for group, app in GROUPS.items() for command in app.registered_commands if command.callback]  # fmt: skip
    assert loaded(tmp_path, ";".join(f"{name} --help" for name in names)) & HEAVY == set()
    # Half a second on a quiet core; where others use it too, the libraries that print the help take longer as well.
    alone = cpu_seconds("import typer, rich.console, rich.progress")
    assert cpu_seconds("import fedface.cli") <= max(0.5, 2.5 * alone)


def cpu_seconds(script: str) -> float:
    """Of a Python process, the least of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_a_scan_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos" / "a.png", np.full((64, 64, 3), 90, dtype=np.uint8))
    assert loaded(tmp_path, "photos scan photos") & (TRAINING | {"torch"}) == set()


def test_a_waiting_device_loads_nothing_that_trains_or_reads_photos() -> None:
    """It waits far longer than it works; a worker has the rest (`benchmarks/device_memory.py`)."""
    script = "import sys, fedface.cli.device_start; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    kept = {"flwr", "numpy", "yaml"}  # Flower itself loads numpy
    assert set(done.stdout.split()) & (HEAVY - kept) <= {"fastapi"}


def test_an_owners_commands_load_nothing_that_trains(tmp_path: Path) -> None:
    """Neither torch, DP-SGD, encryption, models nor charts; one process runs all commands, after the page."""
    device, _ = answered_device(tmp_path)
    words = [f"ledger {verb} {device.ledger_path}" for verb in ("show", "verify", "export")]
    words += ["policy check device.yaml", "device log device.yaml --page log.html"]
    words += ["device pause device.yaml", "device status device.yaml", "device resume device.yaml"]
    words += ["device withdraw device.yaml --run tiny --yes", "device erase device.yaml --yes"]
    assert loaded(tmp_path, ";".join(words), PAGE) & (TRAINING | {"torch"}) == set()
