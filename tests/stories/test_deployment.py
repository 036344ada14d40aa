"""A server and three devices, each with its own home, follow the two pages word by word, from a fresh clone to a
report, a backup that is restored, and a device that leaves.

Every shell block of the pages is run by a shell, or is listed in NOT_RUN with the reason; only host, ports, names and
the sizes of the experiment are changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from hostile_bundle import project
from png_files import write_png

from fedface.privacy.ledger import Ledger
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.transport.executor import ACQUIRE

ROOT = Path(__file__).resolve().parents[2]
OPERATOR, OWNER = "docs/fifty-devices.md", "docs/my-device.md"
CHANGED = {
    "pip install -c constraints.txt": (
        "pip install --quiet --no-index --no-deps --no-build-isolation --target ~/python -c constraints.txt"
    ),
    "at_least: 40, at_most: 50, wait_minutes: 30, answer_minutes: 60": "at_least: 3",
    "min_responses: 30": "min_responses: 3",
    "min_devices: 30": "min_devices: 3",
    "rounds: 6, steps_per_round: 4, sampling_rate: 0.064, expected_batch_size: 64": (
        "rounds: 2, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: 4, fake_batch_size: 4"
    ),
    "per_group: 12}": (
        "per_group: 8}\nupsampling: {method: {kind: pulse, steps: 2}}\n"
        "attack: {photos: 2, iterations: 1, candidates: 2, trials: 2}\n"
        "evaluation: {epsilon_fraction: 0.2, holdout_fraction: 0.3}"
    ),
    "kitchen hall attic": "device-1 device-2 device-3",
    "kitchen": "device-1",
    "--run family": "--run family --yes",
    "device erase ": "device erase --yes ",
}
NOT_RUN = {
    (OPERATOR, "A device without an invitation", 0): "without nginx alone",
}

HOSTILE_PROJECT = project("hostile.py", server="hostile:server", client="hostile:client")
# It runs on the server as well, which shows that it would write the file.
HOSTILE = """
import os, time
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
open(os.path.expanduser("~/marker"), "w").close()
client = ClientApp()
server = ServerApp()
@client.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.5)
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(asked, timeout=120):
        print("answer:", reply.error.reason if reply.has_error() else "hostile code", flush=True)
"""


def blocks(page: str) -> dict[tuple[str, str, int], str]:
    """The shell blocks of a page, by page, heading and number below that heading."""
    found, heading, text = {}, "", (ROOT / page).read_text(encoding="utf-8")
    for title, block in re.findall(r"^## ([^\n]+)$|^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if block:
            found[page, heading, sum(key[1] == heading for key in found)] = block
    return found


BLOCKS = blocks(OPERATOR) | blocks(OWNER)


@dataclass
class Home:
    """One party's machine: a home folder, and the processes that run there."""

    folder: Path
    port: int  # the SuperLink's
    entry: int  # where devices connect: nginx's, or the SuperLink's where nginx is not installed
    enrolment: int  # the enrolment service's
    running: dict[subprocess.Popen[bytes], Path]
    clone: Path
    used: set[tuple[str, str, int]]  # blocks of the pages that were run

    def block(self, page: str, heading: str, number: int = 0) -> str:
        """One shell block of a page."""
        self.used.add((page, heading, number))
        return BLOCKS[page, heading, number]

    def changed(self, commands: str) -> str:
        """Commands, or a file, with the port and the sizes of this test."""
        for old, new in {
            "fedface.example.org:8443": f"localhost:{self.entry}",
            "fedface.example.org": "localhost",
            "server init": f"server init --listen 127.0.0.1 --port {self.entry} --superlink-port {self.port} "
            f"--enrolment-port {self.enrolment}",
            **CHANGED,
        }.items():
            commands = commands.replace(old, new)
        return commands

    @property
    def environment(self) -> Mapping[str, str]:
        """The tester's own home is neither read nor written."""
        stored = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "XDG_"))}
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
        installed = self.folder / "python"
        path = os.pathsep.join([f"{installed}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**stored, **quiet, "HOME": str(self.folder), "PATH": path, "PYTHONPATH": str(installed)}

    def do(self, commands: str) -> str:
        """Run commands to their end, in the clone."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.changed(commands)],
            cwd=self.clone, env=self.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, commands: str, name: str) -> subprocess.Popen[bytes]:
        """Start long-running commands; their output goes to a file in the home."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", self.changed(commands)],
                cwd=self.clone, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.running[process] = log
        return process


def free_ports(count: int) -> list[int]:
    """Ports that no process listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that git has of this checkout, as they are now."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout of git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0")[:-1]:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


@pytest.fixture
def homes(tmp_path: Path, clone: Path) -> Iterator[list[Home]]:
    """The server's home and three devices'; all processes started there are ended."""
    (port, entry, enrolment), running, used = free_ports(3), {}, set()  # type: ignore[var-annotated]
    if shutil.which("nginx") is None:
        entry = port
    folders = [tmp_path / name for name in ("server", "device-1", "device-2", "device-3")]
    for folder in folders:
        folder.mkdir(mode=0o700)
    yield [Home(folder, port, entry, enrolment, running, clone, used) for folder in folders]
    for expected in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, expected)
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue


def save_photos(folder: Path, count: int, light_fraction: float, name: str) -> None:
    """Synthetic faces of 128 px, saved as a camera would."""
    folder.mkdir()
    streams = Streams(3).child(name)
    faces = sample_faces(count, ToneMix(light_fraction=light_fraction), streams.generator("faces"))
    for i, face in enumerate(render(faces, 128, noise=streams.generator("camera"))):
        pixels = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        write_png(folder / f"{i:02d}.png", np.ascontiguousarray(pixels))


def until_true(condition: Callable[[], bool], seconds: float, what: str, homes: list[Home]) -> None:
    """Poll once a second; print every log on timeout."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(1)
    logs = "\n".join(
        f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in homes[0].running.values()
    )
    pytest.fail(f"{what} within {seconds:.0f} s\n{logs}")


def listening(port: int) -> bool:
    """Whether a process listens."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


START = "exec fedface device start ~/fedface/device.yaml"


def check_refused(device: Home) -> None:
    """A device whose key the server does not accept says so at its start."""
    device.do(f"! {START.removeprefix('exec ')} 2> ~/refused")
    assert "register this device's public key" in (device.folder / "refused").read_text()


def join(server: Home, device: Home) -> None:
    """By an invitation, which admits the run alone."""
    letter = (server.folder / "letters" / f"{device.folder.name}.txt").read_text()
    (code,) = re.findall("FEDFACE1-[A-Z2-7]+", letter)
    device.do(device.block(OWNER, "2. Join").replace("FEDFACE1-...", f"{code} --yes --no-service"))


def check_unregistered(server: Home, device: Home) -> None:
    """A device with the server's certificate and a key of its own is refused."""
    device.do(blocks("clients/README.md")["clients/README.md", "Without an invitation", 0])
    file, given = device.folder / "fedface" / "device.yaml", server.folder / "fedface-server"
    text = device.changed(file.read_text()).replace("name: my-device", f"name: {device.folder.name}")
    text = text.replace("evaluation: false", "evaluation: true")
    file.write_text(text)
    shutil.copy(given / "certificates/ca.crt", device.folder / "fedface")
    check_refused(device)


def register(server: Home, device: Home) -> None:
    """By files and a key that are exchanged by hand; without nginx nothing else reaches the server."""
    check_unregistered(server, device)
    shutil.copy(device.folder / "fedface/node.pub", server.folder / "device.pub")
    registered = BLOCKS[OPERATOR, "A device without an invitation", 0].replace("kitchen", device.folder.name)
    server.do(f"cd {server.folder}\n{registered}")


def check_local_programs(server: Home) -> None:
    """Another program of the server's machine gets no task of SuperLink without the secret, here a ServerApp's."""
    certificate = (server.folder / "fedface-server/certificates/ca.crt").read_bytes()
    for interceptors in (
        [],
        [SuperExecAuthHttpInterceptor(master_secret=b"guessed", protected_methods=frozenset({ACQUIRE}))],
    ):
        client = RuntimeHttpClient.from_server_address(
            f"localhost:{server.port}", False, certificate, interceptors
        )
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))


def restart_after_a_kill(
    server: Home, running: subprocess.Popen[bytes], up: str, homes: list[Home]
) -> subprocess.Popen[bytes]:
    """SuperLink is killed: the others end with it, and the same command starts them again."""
    (superlink,) = (
        one for one in psutil.Process(running.pid).children() if "flower-superlink" in " ".join(one.cmdline())
    )
    superlink.kill()
    assert running.wait(60) == 2
    started = server.start(up, "server-again")
    until_true(lambda: listening(server.entry), 60, "the server does not listen again", homes)
    return started


def check_leave(server: Home, devices: list[Home], running: list[subprocess.Popen[bytes]]) -> None:
    """Owners look at what left, stop their devices, and one of them leaves."""
    first = devices[0]
    assert "Everything works." in first.do(first.block(OWNER, "3. Check"))
    watched = first.do(first.block(OWNER, "4. Watch"))
    assert "An update of a network's weights, for family, round 2" in watched
    page = first.start("exec " + first.block(OWNER, "4. Watch", 1), "page")
    until_true(lambda: "http://" in first.running[page].read_text(), 60, "the page is not there", [server])
    page.terminate()
    for process, device in zip(running, devices, strict=True):
        process.terminate()
        assert process.wait(30) == 0
        assert "stopped" in (device.folder / "device.log").read_text()
        assert not list((device.folder / "fedface" / "state").glob("*.secret"))
    first.do(first.block(OWNER, "Back up and restore"))
    left = first.do(first.block(OWNER, "6. Leave"))
    assert "You have withdrawn from family" in left and "What stays: your photos" in left
    assert not (first.folder / "fedface/state/signing.key").exists()


def check_rolled_back(device: Home) -> None:
    """A device whose ledger was restored from a copy does not start."""
    ledger = device.folder / "fedface/state/ledger.sqlite"
    copy = ledger.read_bytes()
    device.do("fedface device withdraw --run family --yes")
    ledger.write_bytes(copy)
    assert "was rolled back or replaced" in device.do(f"! {START.removeprefix('exec ')} 2>&1")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_devices_and_a_server_follow_the_pages_word_by_word(homes: list[Home]) -> None:
    """Two rounds with TLS, node keys, masked sums and DP; each device records its releases."""
    server, *devices = homes
    nginx = server.entry != server.port
    server.do(server.block(OPERATOR, "1. Install"))
    server.do(server.block(OPERATOR, "2. Certificates, keys and proxy"))
    up = "exec " + server.block(OPERATOR, "3. Start")
    running = server.start(up, "server")
    until_true(lambda: listening(server.entry), 60, "the server does not listen", homes)
    check_local_programs(server)
    stranger = replace(devices[0], folder=server.folder.with_name("stranger"))
    (stranger.folder / "Pictures").mkdir(parents=True)
    stranger.do(stranger.block(OWNER, "1. Install"))
    check_unregistered(server, stranger)
    assert "privacy guarantee: epsilon at most 3" in server.do(server.block(OPERATOR, "4. Plan the run"))
    server.do(server.block(OPERATOR, "5. Invite"))
    server.do(server.block(OPERATOR, "5. Invite", 1))

    for number, device in enumerate(devices):
        save_photos(device.folder / "Pictures", 8, [0.9, 0.5, 0.1][number], device.folder.name)
        device.do(device.block(OWNER, "1. Install"))
        (join if nginx else register)(server, device)
        file = device.folder / "fedface" / "device.yaml"
        file.write_text(file.read_text().replace("# answer_seconds: 60", "answer_seconds: 5\nmax_photos: 10"))
        assert "Everything works." in device.do(device.block(OWNER, "3. Check"))
    waiting = [device.start(START, "device") for device in devices]
    assert "until `fedface device resume" in devices[1].do(devices[1].block(OWNER, "5. Pause"))

    # Somebody who has only ca.crt starts a run with their own code.
    hostile = server.folder / "hostile"
    hostile.mkdir()
    for name, content in {"pyproject.toml": HOSTILE_PROJECT, "hostile.py": HOSTILE, "LICENSE": ""}.items():
        (hostile / name).write_text(content)
    printed = server.do(f"FLWR_HOME=~/fedface-server/flwr flwr run {hostile} fedface --stream")
    assert printed.count("answer: expected the records fedface and blobs, got none") == 3
    assert [home.folder.name for home in homes if (home.folder / "marker").exists()] == ["server"]
    for device in devices:
        assert (
            "train request of round ?: answered with an error" in (device.folder / "device.log").read_text()
        )

    if nginx:  # from outside the control interface is not there
        config = (server.folder / "fedface-server/flwr/config.toml").read_text()
        (server.folder / "config.toml").write_text(config.replace(str(server.port), str(server.entry)))
        assert "403" in server.do(f"! FLWR_HOME=~ flwr run {hostile} fedface 2>&1")

    names = sorted(device.folder.name for device in devices)
    assert "3 registered, 3 online" in server.do(server.block(OPERATOR, "7. Watch"))
    status = json.loads(server.do("fedface server status ~/fedface-server --json"))
    assert status["devices"] == dict.fromkeys(names, "online") and status["run"] is None
    # Stopped and continued by the same command.
    run = server.start("exec " + server.block(OPERATOR, "6. Run"), "run")
    state = server.folder / "fedface-server/runs/family/state.json"
    until_true(state.exists, 120, "the run does not begin", homes)
    server.do(server.block(OPERATOR, "8. Stop, report, revoke"))
    assert run.wait(60) == 1
    running = restart_after_a_kill(server, running, up, homes)
    run = server.start("exec " + server.block(OPERATOR, "6. Run"), "run")
    until_true(lambda: run.poll() is not None, 600, "the run does not end", homes)
    shown = (server.folder / "run.log").read_text()
    assert run.returncode == 0 and "round 2 of 2: 3 devices took part" in shown, shown
    record = json.loads(state.with_name("run.json").read_text())
    assert record["command"] == "fedface server run fedface-server family.yaml"
    assert [sorted(each["participants"]) for each in record["rounds"]] == [names, names]
    assert record["rounds"][-1]["epsilon"]["upper"] <= 8
    assert record["base_hash"] != record["final_hash"]
    for device in devices:
        ledger = Ledger.open(device.folder / "fedface" / "state" / "ledger.sqlite")
        assert 0 < ledger.spent(1e-6).upper <= 8.0
        sent = [transmission.kind for transmission in ledger.read().transmissions]
        # The first evaluation may be requested again after the stop: the same bytes, at no further cost.
        assert sent.count("update") == 2 and sent.count("metrics") in (2, 3)
    assert [sorted(reported["participants"]) for reported in record["device_metrics"]] == [names, names]

    status = json.loads(server.do("fedface server status ~/fedface-server --json"))["run"]
    assert (status["state"], status["round"], sorted(status["participants"])) == ("finished", 2, names)
    server.do(server.block(OPERATOR, "8. Stop, report, revoke", 1))
    assert "revoked" in server.do("fedface server devices ~/fedface-server | grep device-1")

    until_true(lambda: waiting[0].poll() is not None, 90, "the revoked device does not end", homes)
    log = (devices[0].folder / "device.log").read_text()
    assert waiting[0].returncode == 2 and "Traceback" not in log, log
    check_refused(devices[0])

    check_leave(server, devices[1:], waiting[1:])
    server.do(server.block(OPERATOR, "9. Renew the certificate"))
    running.terminate()
    assert running.wait(60) == 0
    server.do(server.block(OPERATOR, "10. Back up and restore"))
    server.do(server.block(OPERATOR, "10. Back up and restore", 1))
    server.start(up, "restored")
    until_true(lambda: listening(server.entry), 60, "the restored server does not listen", homes)
    restored = json.loads(server.do("fedface server status ~/fedface-server --json"))
    assert restored["devices"]["device-1"] == "revoked" and restored["run"]["state"] == "finished"
    check_rolled_back(devices[2])
    if nginx:
        assert set(BLOCKS) - server.used == set(NOT_RUN)
