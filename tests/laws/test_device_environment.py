"""A device needs neither Ray nor the packages of reports, web page and optional detectors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from test_doors import foreign
from test_floors import DEVICE_ROOTS, TREES, reached
from tiny import tiny_experiment, tiny_gan, train_task

from fedface.messages.messages import to_message

ROOT = Path(__file__).resolve().parents[2]
REFUSED = ("ray", "matplotlib", "fastapi", "starlette", "uvicorn", "cv2")
ANSWER = """
import json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"not installed on a device: {name}", name=name)

sys.meta_path.insert(0, Refuse())
import clients.app
from fedface.device.client import handle_task
from fedface.device.device import load_device
from fedface.messages.messages import Message
from fedface.messages.parsing import read_task

home = Path(sys.argv[1])
header, *names = json.loads((home / "task.json").read_text())
task = read_task(Message(header=header, blobs={name: (home / name).read_bytes() for name in names}))
print(type(handle_task(task, load_device(home / "device.yaml"))).__name__)
assert not set(REFUSED) & {name.split(".")[0] for name in sys.modules}
"""
DEVICE = """
name: kitchen
photos: photos
state: state
answer_seconds: 0
policy: {max_epsilon: 20, delta: 1e-3, min_cohort_size: 2, protocols: [plain]}
"""


@pytest.mark.slow
def test_a_device_answers_a_task_without_the_optional_packages(tmp_path: Path) -> None:
    """The installed ClientApp is imported and trains, in a process that cannot import any of them."""
    (tmp_path / "device.yaml").write_text(DEVICE)
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "photos").mkdir()
    message = to_message(train_task(tiny_experiment(tmp_path / "run"), tiny_gan()))
    (tmp_path / "task.json").write_text(json.dumps([message.header, *message.blobs]))
    for name, blob in message.blobs.items():
        (tmp_path / name).write_bytes(blob)
    script = f"REFUSED = {REFUSED!r}\n{ANSWER}"
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "TrainResult"


def test_the_base_installation_is_the_device() -> None:
    """Every refused package is declared by an extra, and none by the project's own dependencies."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    base = " ".join(project["dependencies"])
    for word in ("matplotlib", "fastapi", "uvicorn", "opencv", "simulation", "ray"):
        assert not re.search(rf"\b{word}\b", base), word
    assert set(project["optional-dependencies"]) == {"reports", "server", "web", "simulation", "yunet", "dev"}


# A bound for typer's version; imported as dlib; files alone.
USED_OTHERWISE = {"click", "dlib-bin", "face_recognition_models"}


def test_a_device_uses_all_that_the_base_installation_brings() -> None:
    """Each dependency is imported by what trains on a device or by the commands of its owner."""
    commands = [f"fedface.cli.{name}" for name in ("console", "device", "ledger", "photos", "policy")]
    with (ROOT / "pyproject.toml").open("rb") as file:
        base = tomllib.load(file)["project"]["dependencies"]
    used = set().union(*(foreign(TREES[module]) for module in reached([*DEVICE_ROOTS, *commands])))
    installed = packages_distributions()  # reads the metadata of every package
    brought = {distribution for name in used for distribution in installed.get(name, ())}
    declared = {re.match(r"[\w-]+", line)[0] for line in base}  # type: ignore[index]
    normal = {name.lower().replace("_", "-") for name in brought}
    assert {
        name for name in declared - USED_OTHERWISE if name.lower().replace("_", "-") not in normal
    } == set()
