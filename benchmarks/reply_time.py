"""What the time of a reply shows about one photo: two libraries that differ by one photo, in real time on this machine.

    python benchmarks/reply_time.py [--rounds 10]

Every photo joins every step, and 16 photos fill a microbatch, so that the 17th costs a second one. For each library the
same rounds are requested in turns. Printed is the AUC of the reply time as a test for the 17th photo (0.5: a guess),
once for replies that leave at once and once for replies that leave when device/reply_time.py says, beside the AUC that
the recorded price of each round's floor allows (Gaussian mechanism with multiplier 200: Dong, Roth and Su 2019,
arXiv:1905.02383).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import first_device, tiny_experiment, tiny_gan, train_task

from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.messages.messages import TrainResult, TrainTask
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.mechanism import ROUND_FLOOR_MULTIPLIER

SLOT = 12.0  # s; one includes the time allowed for reading 17 photos, 8.5 s


def auc(without: list[float], with_photo: list[float]) -> float:
    """The probability that a reply with the photo takes longer, ties counted half."""
    pairs = [(a, b) for a in without for b in with_photo]
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


def reply_seconds(device: Device, task: TrainTask, slot: float) -> float:
    """Seconds from a request to its reply; whole slots from the next one on, where there are slots."""
    if slot:
        time.sleep(slot - time.time() % slot)
    started = time.time()
    assert isinstance(handle_task(task, device), TrainResult)
    elapsed = time.time() - started
    return elapsed if not slot else round(elapsed / slot)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder = Path(tempfile.mkdtemp())
    changes = {
        "training.sampling_rate": "1.0",
        "training.rounds": str(rounds + 1),
        "training.steps_per_round": "8",
    }
    experiment = tiny_experiment(folder, changes=changes)
    task = train_task(experiment, tiny_gan())
    for slot in (0.0, SLOT):
        times: dict[int, list[float]] = {16: [], 17: []}
        devices = {}
        for count in times:
            own = DeviceDataset.independent(torch.rand(count, 3, 16, 16))
            device = first_device(experiment, folder / f"{slot}-{count}")
            devices[count] = replace(
                device, photos=lambda size, own=own: own, answer_seconds=slot, max_photos=17
            )
        for device in devices.values():  # warm caches
            reply_seconds(device, task, slot)
        for number in range(2, rounds + 2):
            for count, device in devices.items():
                times[count].append(reply_seconds(device, replace(task, round=number), slot))
        unit = "slots" if slot else "s"
        print(
            f"{'at public times' if slot else 'at once':16} AUC {auc(times[16], times[17]):.3f} "
            f"(median {median(times[16]):.4g} and {median(times[17]):.4g} {unit}, {rounds} replies each)"
        )
    mu = 1 / ROUND_FLOOR_MULTIPLIER
    print(f"allowed by the floor of one round: {NormalDist().cdf(mu / math.sqrt(2)):.4f}")
    error = math.sqrt((2 * rounds + 1) / (12 * rounds**2))
    print(f"standard error of an AUC of 0.5 with {rounds} replies each: {error:.3f}")


if __name__ == "__main__":
    main()
