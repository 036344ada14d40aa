"""Simulated devices: each holds synthetic or labelled public photos, and a real ledger and key in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fedface.aggregation.protocols import make_keys
from fedface.atomic_io import replace_bytes
from fedface.device.device import Device
from fedface.errors import FederationError
from fedface.experiment import Experiment, RemoteDevices, SyntheticDevices, devices_folder
from fedface.photos.device_dataset import DeviceDataset
from fedface.public_data.device_photos import device_name, device_photos
from fedface.tensor_types import Images
from fedface.transport.run_config import read_run_config


def prepare(experiment: Experiment, folder: Path) -> None:
    """Create each simulated device's state folder, and the keys if sums are encrypted.

    The key is generated here because the simulation plays all devices; the coordinator does not receive it. The first
    device alone has the secret key, if there is a public one. Existing
    files are not replaced.
    """
    if isinstance(experiment.devices, RemoteDevices):
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    states = [folder / device_name(number) for number in range(experiment.devices.count)]
    for state in states:
        state.mkdir(exist_ok=True, mode=0o700)
    missing = [state for state in states if not (state / "sum.key").exists()]
    if 0 < len(missing) < len(states):
        raise FederationError(
            f"{missing[0]}: its key is missing although other devices have theirs; start a new run"
        )
    if missing and (keys := make_keys(experiment.aggregation, experiment.agreement)) is not None:
        for state in missing:
            (keys if state == states[0] else keys.for_others()).save(state / "sum.key")


def simulated_device(experiment: Experiment, number: int, folder: Path) -> Device:
    """Simulated device `number`, from 0; its photos are rendered or read on first use."""
    if isinstance(experiment.devices, RemoteDevices):
        raise FederationError(
            "this experiment needs remote devices; start it with `fedface server run`, "
            "or use synthetic-devices or labelled-devices"
        )
    if not 0 <= number < experiment.devices.count:
        raise FederationError(f"this experiment has {experiment.devices.count} devices, got number {number}")

    devices, state = experiment.devices, folder / device_name(number)
    per_occasion = devices.photos_per_occasion if isinstance(devices, SyntheticDevices) else 1

    def photos(size: int) -> DeviceDataset:
        return DeviceDataset.by_occasion(_photos(experiment, number, size, state), per_occasion)

    return Device(name=device_name(number), photos=photos, policy=experiment.device_policy(), state=state)


def _photos(experiment: Experiment, number: int, size: int, state: Path) -> Images:
    """Synthetic photos are rendered once and then read from the device's folder, where they take no memory."""
    if not isinstance(experiment.devices, SyntheticDevices):
        return device_photos(experiment, number, size)
    path = state / f"photos-{size}-{experiment.digest()}"
    if not path.exists():
        replace_bytes(path, device_photos(experiment, number, size).numpy().tobytes())
    # A private mapping: processes share the pages, and what one of them changes stays with it.
    stored = torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.float32)
    return stored.reshape(-1, 3, size, size)


def device_of_partition(number: int, run_config: Mapping[str, object], home: Path) -> Device:
    """The simulated device of a Flower partition, for the run that a run config names; `home` is the app's folder."""
    run = read_run_config(run_config, home)
    return simulated_device(run.experiment, number, devices_folder(run.folder))
