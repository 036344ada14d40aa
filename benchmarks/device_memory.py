"""Memory of a running device: while it waits, while it works on a run, warm after it, and when its worker has ended.

    python benchmarks/device_memory.py [--photos 40]

A server (SuperLink, without nginx) and one device run on this machine, each by its own command, with TLS. The run is
two rounds of GAN training and of an evaluation, on synthetic photos. Printed are sums over all processes of the device,
in MB. PSS (/proc/PID/smaps_rollup) divides a page by the number of processes that share it, RSS counts it in each. It
takes a quarter of an hour, most of which passes until the worker ends.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from png_files import write_png

from fedface.device.node_key import node_public_key
from fedface.randomness import Streams
from fedface.synthetic.faces import render_people
from fedface.transport.worker import WARM_SECONDS

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.5
DEVICE = """
name: kitchen
photos: photos
state: state
server: localhost:{port}
answer_seconds: 5
max_photos: {photos}
policy: {{max_epsilon: 8, delta: 1e-3, protocols: [plain], min_cohort_size: 1, evaluation: true}}
"""
RUN = """
question: How much memory does a device need?
name: memory
privacy: {kind: privacy-target, epsilon: 8, delta: 1e-3}
devices: {kind: remote-devices, at_least: 1}
min_responses: 1
training: {kind: gan-training, rounds: 2, steps_per_round: 2, sampling_rate: 0.5, expected_batch_size: 16}
probe: {kind: synthetic-probe, per_group: 8}
aggregation: {kind: plain}
evaluation: {epsilon_fraction: 0.2, holdout_fraction: 0.3}
upsampling: {method: {kind: pulse, steps: 5}}
attack: {photos: 2, iterations: 1, candidates: 2, trials: 2}
"""
FLWR = """
[superlink.prod]
address = "127.0.0.1:{port}"
root-certificates = "{server}/certificates/ca.crt"
"""


class Memory(NamedTuple):
    """Of all processes of a device, in MB."""

    pss: float
    rss: float
    processes: int


def memory_of(command: psutil.Process) -> Memory:
    """The memory of a process and all that it started."""
    found = []
    for process in (command, *command.children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (OSError, psutil.Error):  # it has just ended
            continue
        sizes = {line.split()[0]: int(line.split()[1]) / 1000 * 1.024 for line in lines[1:]}
        found.append((sizes["Pss:"], sizes["Rss:"]))
    return Memory(sum(pss for pss, _ in found), sum(rss for _, rss in found), len(found))


def largest(command: psutil.Process, running: Callable[[], bool]) -> Memory:
    """The largest memory while `running()` is true."""
    most = memory_of(command)
    while running():
        time.sleep(SAMPLE_SECONDS)
        most = max(most, memory_of(command))
    return most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=40)
    photos: int = parser.parse_args().photos
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        home, server = Path(name), Path(name, "server")
        environment = {
            **os.environ, "HOME": name, "FLWR_HOME": str(home / ".flwr"), "XDG_STATE_HOME": str(home / "index"),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

        def do(*command: str | Path) -> None:
            subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

        def begin(log: str, *command: str | Path) -> subprocess.Popen[bytes]:
            out = stack.enter_context((home / log).open("wb"))
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        def wait_for(log: str, words: str) -> None:
            while words not in (home / log).read_text():
                time.sleep(0.2)

        do("fedface", "server", "init", "--superlink-port", str(port), server, "localhost")
        begin("server.log", "fedface", "server", "up", server)
        (home / ".flwr").mkdir()
        (home / ".flwr" / "config.toml").write_text(FLWR.format(port=port, server=server))
        wait_for("server.log", "SuperLink listens")
        (home / "state").mkdir(mode=0o700)
        (home / "photos").mkdir()
        faces = render_people(photos, 0.5, 128, Streams(1))
        for number, face in enumerate((faces.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()):
            write_png(home / "photos" / f"{number}.png", np.ascontiguousarray(face))
        (home / "device.yaml").write_text(DEVICE.format(port=port, photos=photos))
        (home / "run.yaml").write_text(RUN)
        (home / "ca.crt").write_bytes((server / "certificates/ca.crt").read_bytes())
        (home / "node.pub").write_text(node_public_key(home / "node"))
        do("flwr", "supernode", "register", home / "node.pub", "prod")
        command = psutil.Process(begin("device.log", "fedface", "device", "start", home / "device.yaml").pid)
        wait_for("device.log", "waits for tasks")
        time.sleep(20)
        rows = {"waiting": memory_of(command)}
        do("flwr", "run", ROOT, "prod", "--run-config", f"experiment='{home}/run.yaml'")
        rows["working, at most"] = largest(
            command, lambda: (home / "device.log").read_text().count("answered in") < 4
        )
        time.sleep(5)
        rows["after a task"] = memory_of(command)
        time.sleep(WARM_SECONDS + 10)
        rows["waiting again"] = memory_of(command)
        print((home / "device.log").read_text(), file=sys.stderr)
        print("| device | PSS, MB | RSS, MB | processes |\n|---|---|---|---|")
        for state, memory in rows.items():
            print(f"| {state} | {memory.pss:.0f} | {memory.rss:.0f} | {memory.processes} |")


if __name__ == "__main__":
    main()
