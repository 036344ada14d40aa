"""A server and up to fifty devices on this machine: memory, processor time, round times, and that nothing is lost.

    python benchmarks/soak.py [--devices 10 25 50] [--rounds 3] [--last 8] [--share-imports] [--folder DIR]

The server is `fedface server init`, `up`, `invite` and `run`, with nginx, TLS and Flower's SuperLink. Each device joins
by an invitation, with the function of `fedface device join`, and is its own `fedface device start`: a SuperNode, an
executor and, with the first task, a worker, in its own sandbox. Nothing is simulated but the network. The run begins
with the first number of devices. After some rounds it is stopped in the middle of a round, more devices are started,
and it is continued; the last number of devices then has `--last` rounds.

With `--share-imports` the devices are forked from one process that has imported what trains, and then run the function
of `fedface device start`. Each still has processes and a sandbox of its own; but fifty workers that import by
themselves need 25 GiB, and forked ones share that memory until they change it.

Networks, libraries and steps are tiny, because the coordination is measured: two cores train fifty devices one after
another. Memory is the proportional set size (PSS) of all processes of a device or of the server: pages that processes
share count once. At the end each ledger is verified: every round in which a device took part is one release in it and
there is no other, and no computation was begun twice.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import psutil

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.aggregation.protocols import make_keys
from fedface.cli.device_join import Answers, device_join
from fedface.coordinator.requests import round_config
from fedface.device.client import handle_task
from fedface.experiment import read_experiment
from fedface.messages.messages import TrainTask
from fedface.models.checkpoint import flatten_buffers, flatten_parameters, save_model, weights_hash
from fedface.models.discriminator import DiscriminatorConfig
from fedface.models.model import GanArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.photos.image_io import png_bytes
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import Attempt
from fedface.randomness import Streams
from fedface.simulation.devices import prepare, simulated_device
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.transport.client import prepare_torch

RECIPE = """
question: Does the server hold fifty devices?
name: soak
privacy: {{kind: privacy-target, epsilon: 3, delta: 1e-6}}
devices: {{kind: remote-devices, at_least: {at_least}, at_most: {at_most}}}
min_responses: {at_least}
training: {{kind: gan-training, rounds: {rounds}, steps_per_round: 1, sampling_rate: 0.5, expected_batch_size: 4,
  fake_batch_size: 4}}
aggregation: {{kind: homomorphic, min_devices: 3}}
probe: {{kind: synthetic-probe, per_group: 8}}
upsampling: {{method: {{kind: pulse, steps: 2}}}}
attack: {{photos: 2, iterations: 1, candidates: 2, trials: 2}}
base: {base}
"""
PHOTOS = 4  # of each device
SAMPLE_SECONDS = 60.0
FEDFACE = [sys.executable, "-m", "fedface.cli"]


@dataclass
class Party:
    """A device or the server: its processes, and their memory and processor time at each sample."""

    process: psutil.Process
    pss: list[float] = field(default_factory=list)  # MiB
    cpu: dict[int, float] = field(default_factory=dict)  # seconds by process, also of those that have ended

    def sample(self) -> None:
        """Measure now."""
        total, running = 0.0, list[psutil.Process]()
        with suppress(psutil.NoSuchProcess):
            running = [self.process, *self.process.children(recursive=True)]
        for each in running:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += each.memory_full_info().pss / 2**20
                times = each.cpu_times()
                self.cpu[each.pid] = times.user + times.system
        self.pss.append(total)

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        return sum(self.cpu.values())


class Soak:
    """One server with its devices in a folder."""

    def __init__(self, home: Path, most: int, rounds: int, *, share_imports: bool) -> None:
        self.home, self.server, self.devices = home, home / "server", list[Party]()
        self.most, self.rounds = most, rounds
        self.environment = os.environ | {
            "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        self.up: Party | None = None
        self.most_memory = 0.0  # GiB of all devices together, at any sample
        self.begun = time.monotonic()
        self.forking: subprocess.Popen[str] | None = None
        if share_imports:
            command = [sys.executable, __file__, "--fork-devices"]
            self.forking = subprocess.Popen(
                command,
                env=self.environment,
                cwd=home,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{(time.monotonic() - self.begun) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    def do(self, *command: str) -> str:
        """A command of fedface to its end."""
        done = subprocess.run(
            [*FEDFACE, *command], env=self.environment, cwd=self.home, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, log: Path, *command: str) -> subprocess.Popen[bytes]:
        """A command of fedface that goes on."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*FEDFACE, *command], env=self.environment, cwd=self.home, stdout=out, stderr=out
            )

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 1200.0) -> None:
        """Wait, with a sample from time to time."""
        end, sampled = time.monotonic() + seconds, time.monotonic()
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"{what}: not within {seconds:.0f} s")
            if time.monotonic() - sampled > SAMPLE_SECONDS:
                self.sample()
                sampled = time.monotonic()
            time.sleep(0.5)

    def sample(self) -> None:
        """Memory and processor time of everybody."""
        for party in (*([self.up] if self.up else []), *self.devices):
            party.sample()
        self.most_memory = max(self.most_memory, sum(device.pss[-1] for device in self.devices) / 1024)

    def prepare(self, at_least: int) -> None:
        """The server runs, and each device has joined by its invitation."""
        base, recipe = self.home / "base.safetensors", self.home / "soak.yaml"
        write_model(base)
        text = RECIPE.format(at_least=at_least, at_most=self.most, rounds=self.rounds, base=base)
        recipe.write_text(text)
        ports = [str(port) for port in free_ports(3)]
        self.do(
            "server", "init", "--listen", "127.0.0.1", "--port", ports[0], "--superlink-port", ports[1],
            "--enrolment-port", ports[2], str(self.server), "localhost",
        )  # fmt: skip
        self.up = Party(
            psutil.Process(self.start(self.home / "up.log", "server", "up", str(self.server)).pid)
        )
        self.until(lambda: "devices can connect" in (self.home / "up.log").read_text(), "server up", 120)
        names = [f"device-{number:02d}" for number in range(self.most)]
        self.do("server", "invite", "--csv", "codes.csv", str(self.server), *names, str(recipe))
        with (self.home / "codes.csv").open() as file:
            codes = [
                next(cell for cell in row if cell.startswith("FEDFACE1-"))
                for row in list(csv.reader(file))[1:]
            ]
        experiment = read_experiment(recipe)
        keys = make_keys(experiment.aggregation, experiment.agreement)
        assert keys is not None and len(codes) == self.most
        self.say("the server runs; devices join")
        for name, code in zip(names, codes, strict=True):
            self.join(name, code, keys)
        self.say(f"{self.most} devices have joined")

    def join(self, name: str, code: str, keys: HomomorphicKeys) -> None:
        """One device with its photos and the shared key."""
        folder, streams = self.home / name, Streams(3).child(name)
        photos = self.home / f"photos-{name}"
        photos.mkdir()
        faces = sample_faces(PHOTOS, ToneMix(light_fraction=0.5), streams.generator("faces"))
        for number, face in enumerate(render(faces, 96, noise=streams.generator("camera"))):
            pixels = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            (photos / f"{number}.png").write_bytes(png_bytes(pixels))
        answers = Answers(photos=str(photos), name=None, epsilon=None, hours=None, ask=False)
        with redirect_stdout(io.StringIO()):
            device_join(code, folder, answers, service=False)
        file = folder / "device.yaml"
        text = file.read_text().replace("# answer_seconds: 60", "answer_seconds: 5\nmax_photos: 10")
        file.write_text(text)
        keys.save(folder / "state" / "sum.key")

    def start_devices(self, count: int) -> None:
        """As many devices as that run; those that do not yet are started two at a time."""
        while len(self.devices) < count:
            for number in range(len(self.devices), min(len(self.devices) + 2, count)):
                log = self.home / f"device-{number:02d}.log"
                file = self.home / f"device-{number:02d}" / "device.yaml"
                log.touch()
                if self.forking is None:
                    pid = self.start(log, "device", "start", str(file)).pid
                else:
                    assert self.forking.stdin is not None and self.forking.stdout is not None
                    print(json.dumps([str(file), str(log)]), file=self.forking.stdin, flush=True)
                    pid = int(self.forking.stdout.readline())
                self.devices.append(Party(psutil.Process(pid)))
            self.until(lambda: all(map(self.connected, range(len(self.devices)))), "devices connect", 300)

    def connected(self, number: int) -> bool:
        """Whether a device said that it is connected."""
        return "is connected" in (self.home / f"device-{number:02d}.log").read_text()

    def records(self) -> list[dict]:
        """The rounds that are on disk."""
        state = self.server / "runs" / "soak" / "state.json"
        return json.loads(state.read_text())["rounds"] if state.exists() else []

    def run_until(self, rounds: int) -> float:
        """Start or continue the run, and stop it once so many rounds are stored, unless it ends by itself.

        Returns:
            MiB of a device after the first of these rounds, the mean.
        """
        begun = len(self.records())
        run = self.start(self.home / "run.log", "server", "run", str(self.server), "soak.yaml")
        self.until(lambda: run.poll() is not None or len(self.records()) > begun, "the first round", 1800)
        self.sample()
        memory = mean([device.pss[-1] for device in self.devices])
        last = rounds >= self.rounds
        self.until(
            lambda: run.poll() is not None or (not last and len(self.records()) >= rounds), "rounds", 3000
        )
        if not last and run.poll() is None:
            self.do("server", "stop", str(self.server))
            run.wait(120)
        elif run.returncode:
            printed = (self.home / "run.log").read_text()[-2000:]
            raise SystemExit(f"the run ended with exit code {run.returncode}: {printed}")
        return memory

    def check(self) -> Counter[str]:
        """Verify every ledger against the rounds of the run; what was counted."""
        rounds, counted = self.records(), Counter[str]()
        assert len(rounds) == self.rounds
        for number in range(len(self.devices)):
            name = f"device-{number:02d}"
            took_part = [record["round"] for record in rounds if name in record["participants"]]
            with Ledger.open(self.home / name / "state" / "ledger.sqlite") as ledger:
                snapshot = ledger.read()
            releases = [(entry.round, entry.attempt) for entry in snapshot.entries]
            assert releases == [(round, 1) for round in took_part], (name, releases, took_part)
            begun = sum(isinstance(record, Attempt) for record in snapshot.records)
            updates = [sent for sent in snapshot.transmissions if sent.kind == "update"]
            assert begun == len(releases) and {sent.round for sent in updates} == set(took_part), name
            counted += Counter(
                releases=len(releases), resent=sum(sent.resent for sent in updates), updates=len(updates),
                decrypted=sum(sent.kind == "update sum" for sent in snapshot.transmissions),
                refusals=sum(sent.kind == "refusal" for sent in snapshot.transmissions),
            )  # fmt: skip
        counted["left out by the server"] = sum(len(r["refusals"]) + len(r["dropped"]) for r in rounds)
        return counted

    def stop(self) -> None:
        """End every process that was started here."""
        running = [party.process for party in (*self.devices, *([self.up] if self.up else []))]
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(running, timeout=90)
        for process in left:
            process.kill()
        if self.forking is not None:
            self.forking.kill()
            self.forking.wait()


def warm_up() -> None:
    """Import what a device imports, much of it only when it trains: one simulated device answers one round."""
    for name in ("transport.worker", "cli.device_start"):
        import_module(f"fedface.{name}")
    prepare_torch()
    with tempfile.TemporaryDirectory() as home:
        base, recipe = Path(home) / "base.safetensors", Path(home) / "warm.yaml"
        write_model(base)
        recipe.write_text(RECIPE.format(at_least=3, at_most=3, rounds=1, base=base))
        devices = "{kind: synthetic-devices, light_fractions: [0.5, 0.5, 0.5], photos_per_device: 4}"
        experiment = read_experiment(recipe, changes={"devices": devices, "privacy.delta": "0.1"})
        prepare(experiment, Path(home))
        model = experiment.start()
        task = TrainTask(
            run="warm", round=1, cohort=3, seed=0, config=round_config(experiment, experiment.plan(), model),
            weights=flatten_parameters(*model.modules()), buffers=flatten_buffers(*model.modules()),
            model=weights_hash(*model.modules()),
        )  # fmt: skip
        handle_task(task, simulated_device(experiment, 0, Path(home)))


def write_model(path: Path) -> None:
    """Networks of 16 px with some thousand weights."""
    architecture = GanArchitecture(
        generator=StyleGAN2Config(
            size=16, channel_base=64, channel_max=8, latent_width=64, style_width=16, mapping_layers=2
        ),
        discriminator=DiscriminatorConfig(size=16, channel_base=64, channel_max=8),
    )
    save_model(path, build_model(architecture, Streams(5).generator("tiny")))


def fork_devices() -> None:
    """For each line on standard input, a device file and a log: fork a process that is that device; print its id."""
    warm_up()
    gc.collect()
    gc.freeze()  # a collection would change pages of what is imported here, and so copy them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a device that ends leaves nothing behind
    for line in sys.stdin:
        file, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for number in (1, 2):
                os.dup2(out, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            import_module("fedface.cli.device_start").device_start(Path(file))
            sys.exit(0)
        print(pid, flush=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of none."""
    return statistics.fmean(values) if values else 0.0


def table(soak: Soak, counts: Sequence[int], rounds: int) -> None:
    """Run all phases and print one row for each."""
    heads = (
        "devices", "idle: MiB per device", "CPU s per device and minute", "first round, s",
        "later rounds, s (median)", "MiB per device after the first round", "at the end", "all at most, GiB",
        "CPU s per device and round", "server: MiB before", "at the end", "CPU s per round",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    assert soak.up is not None
    server = soak.up
    for place, count in enumerate(counts):
        fresh = len(soak.devices)
        soak.start_devices(count)
        soak.sample()
        new, since = soak.devices[fresh:], time.monotonic()
        before = [device.seconds for device in new]
        soak.say(f"{count} devices are connected; idle for a minute")
        time.sleep(60)
        soak.sample()
        minutes = (time.monotonic() - since) / 60
        idle = mean([device.pss[-1] for device in new])
        waiting = mean([device.seconds - b for device, b in zip(new, before, strict=True)]) / minutes
        done, at_first, busy, served = (
            len(soak.records()), server.pss[-1], sum(device.seconds for device in soak.devices), server.seconds,
        )  # fmt: skip
        warm = soak.run_until(soak.rounds if place == len(counts) - 1 else done + rounds)
        soak.sample()
        times = [record["seconds"] for record in soak.records()[done:]]
        busy = sum(device.seconds for device in soak.devices) - busy
        cells = (
            f"{count}", f"{idle:.0f}", f"{waiting:.1f}", f"{times[0]:.0f}",
            f"{statistics.median(times[1:] or times):.0f}", f"{warm:.0f}",
            f"{mean([device.pss[-1] for device in soak.devices]):.0f}", f"{soak.most_memory:.1f}",
            f"{busy / count / len(times):.1f}", f"{at_first:.0f}", f"{server.pss[-1]:.0f}",
            f"{(server.seconds - served) / len(times):.1f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
        free = psutil.virtual_memory().available / 2**30
        soak.say(f"{len(soak.records())} rounds are stored; {free:.1f} GiB of memory are free")


def main() -> None:
    """Parse, soak, check, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--rounds", type=int, default=3, help="before more devices are started")
    parser.add_argument("--last", type=int, default=8, help="rounds of all devices")
    parser.add_argument("--share-imports", action="store_true", help="fork all devices from one process")
    parser.add_argument("--fork-devices", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep everything here")
    arguments = parser.parse_args()
    if arguments.fork_devices:
        fork_devices()
        return
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="soak"))
    home.mkdir(exist_ok=True)
    total = arguments.rounds * (len(arguments.devices) - 1) + arguments.last
    soak = Soak(home, arguments.devices[-1], total, share_imports=arguments.share_imports)
    try:
        soak.prepare(arguments.devices[0])
        table(soak, arguments.devices, arguments.rounds)
        counted = soak.check()
    finally:
        soak.stop()
    minutes = (time.monotonic() - soak.begun) / 60
    found = ", ".join(f"{number} {what}" for what, number in counted.items())
    print(f"\nEvery ledger verifies, after {minutes:.0f} minutes. In {total} rounds: {found}.")
    if arguments.folder is None:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
