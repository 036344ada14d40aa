"""The photos of synthetic and labelled devices, which are public: one device's, a sample of all, and a description."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import assert_never

import torch

from fedface.errors import FederationError
from fedface.experiment import Experiment, LabelledDevices, LabelledProbe, RemoteDevices, SyntheticDevices
from fedface.photos.client_partition import partition
from fedface.photos.labelled_faces import first_per_group, read_face_folder
from fedface.public_data.labelled_sets import facing_camera, find_labelled_set
from fedface.randomness import Streams
from fedface.synthetic.faces import render_occasions, render_people
from fedface.tensor_types import Images


def device_name(number: int) -> str:
    """`device-03`."""
    return f"device-{number:02d}"


def describe_devices(experiment: Experiment) -> list[tuple[str, str, int]]:
    """Name, public description and photo count of every simulated device; none of remote ones, which say nothing."""
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            return [
                (
                    device_name(i),
                    f"synthetic faces, {devices.light_fraction(i):.0%} light skin (Monk 1-5)",
                    devices.photos_per_device,
                )
                for i in range(devices.count)
            ]
        case LabelledDevices():
            _, groups = _labelled_faces(devices, experiment.probe, experiment.start().size)
            return [
                (device_name(i), _group_shares([groups[photo] for photo in photos]), len(photos))
                for i, photos in enumerate(_partition(experiment, devices))
            ]
        case RemoteDevices():
            return []
        case _:
            assert_never(devices)


def device_faces(experiment: Experiment, count: int, size: int, *, part: int = 0) -> Images | None:
    """About `count` public faces distributed like those of all devices together; None for remote devices.

    Parts with different numbers are disjoint if there are enough faces.
    """
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            streams = Streams(experiment.seed).child("like the devices" + f"/{part}" * bool(part))
            each = -(-count // devices.count)
            faces = [
                render_people(each, devices.light_fraction(i), size, streams.child(str(i)))
                for i in range(devices.count)
            ]
            order = torch.randperm(each * devices.count, generator=streams.generator("order"))
            return torch.cat(faces)[order[:count]]
        case LabelledDevices():
            everyone = torch.cat([device_photos(experiment, i, size) for i in range(devices.count)])
            rng = Streams(experiment.seed).generator("like the devices")
            return everyone[torch.randperm(len(everyone), generator=rng)[part * count : (part + 1) * count]]
        case RemoteDevices():
            return None
        case _:
            assert_never(devices)


def device_photos(experiment: Experiment, number: int, size: int) -> Images:
    """The photos of one device, (n, 3, size, size), rendered or read. Raises FederationError for remote devices."""
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            streams = Streams(experiment.seed).child(device_name(number))
            each = devices.photos_per_occasion
            return render_occasions(
                devices.photos_per_device // each, each, devices.light_fraction(number), size, streams
            )
        case LabelledDevices():
            images, _ = _labelled_faces(devices, experiment.probe, size)
            return images[_partition(experiment, devices)[number]]
        case RemoteDevices():
            raise FederationError("the photos of a remote device stay on it")
        case _:
            assert_never(devices)


@lru_cache(maxsize=2)
def _labelled_faces(devices: LabelledDevices, probe: object, size: int) -> tuple[Images, tuple[str, ...]]:
    """All photos that are distributed among labelled devices, and their groups."""
    path, shared = find_labelled_set(devices.folder, devices.set)
    faces, _ = facing_camera(read_face_folder(path, size=size, label=devices.label), devices.profile_faces)
    if shared and isinstance(probe, LabelledProbe):
        in_probe = set(first_per_group(faces.groups, probe.per_group))
        faces = faces.select([i for i in range(len(faces)) if i not in in_probe])
    return faces.images, faces.groups


@lru_cache(maxsize=2)
def _partition(experiment: Experiment, devices: LabelledDevices) -> list[list[int]]:
    """Which of the labelled photos each device holds."""
    _, groups = _labelled_faces(devices, experiment.probe, experiment.start().size)
    rng = Streams(experiment.seed).numpy("partition")
    return [part.tolist() for part in partition(groups, devices.count, devices.split, rng)]


def _group_shares(groups: list[str]) -> str:
    top = Counter(groups).most_common(3)
    return "public photos: " + ", ".join(f"{count / len(groups):.0%} {name}" for name, count in top)
