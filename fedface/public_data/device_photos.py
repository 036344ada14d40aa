"""The photos of synthetic and labelled devices, which are public: one device's, a sample of all, and a description."""

from __future__ import annotations

from functools import lru_cache
from typing import assert_never

import torch

from fedface.errors import FederationError
from fedface.experiment import Experiment, LabelledDevices, LabelledProbe, RemoteDevices, SyntheticDevices
from fedface.photos.client_partition import partition
from fedface.photos.labelled_faces import read_face_folder
from fedface.public_data.labelled_sets import facing_camera, find_labelled_set, first_per_group
from fedface.randomness import Streams
from fedface.synthetic.faces import render_occasions, render_people
from fedface.tensor_types import Images


def device_name(number: int) -> str:
    """`device-03`."""
    return f"device-{number:02d}"


def describe_devices(experiment: Experiment) -> list[tuple[str, str, int | None]]:
    """Name, public description and photo count (None where that is private) of every device."""
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            return [
                (device_name(i), f"drawn faces, {share:.0%} light skin (Monk 1-5)", devices.photos_per_device)
                for i, share in enumerate(devices.light_fractions)
            ]
        case LabelledDevices():
            parts = _partition(experiment)
            return [(device_name(i), _mix(experiment, part), len(part)) for i, part in enumerate(parts)]
        case RemoteDevices():
            return [(f"real device {i + 1}", "photos of its owner; nothing else is known", None)
                    for i in range(devices.count)]  # fmt: skip
        case _:
            assert_never(devices)


def device_faces(experiment: Experiment, count: int, size: int, *, part: int = 0) -> Images | None:
    """About `count` public faces mixed like all devices together; None where devices are real.

    Parts with different numbers share no face, as long as there are so many.
    """
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            streams = Streams(experiment.seed).child("like the devices" + f"/{part}" * bool(part))
            each = -(-count // devices.count)
            return torch.cat(
                [
                    render_people(each, share, size, streams.child(str(i)))
                    for i, share in enumerate(devices.light_fractions)
                ]
            )[torch.randperm(each * devices.count, generator=streams.generator("order"))[:count]]
        case LabelledDevices():
            everyone = torch.cat([device_photos(experiment, i, size) for i in range(devices.count)])
            rng = Streams(experiment.seed).generator("like the devices")
            return everyone[torch.randperm(len(everyone), generator=rng)[part * count : (part + 1) * count]]
        case RemoteDevices():
            return None
        case _:
            assert_never(devices)


@lru_cache(maxsize=64)
def device_photos(experiment: Experiment, number: int, size: int) -> Images:
    devices = experiment.devices
    match devices:
        case SyntheticDevices():
            streams = Streams(experiment.seed).child(device_name(number))
            each = devices.photos_per_occasion
            return render_occasions(
                devices.photos_per_device // each, each, devices.light_fractions[number], size, streams
            )
        case LabelledDevices():
            images, _ = _labelled(experiment, size)
            return images[_partition(experiment)[number]]
        case RemoteDevices():
            raise FederationError("a real device's photos are not here")
        case _:
            assert_never(devices)


@lru_cache(maxsize=2)
def _labelled(experiment: Experiment, size: int) -> tuple[Images, tuple[str, ...]]:
    """All photos that pretended devices share out, and their groups."""
    devices = experiment.devices
    if not isinstance(devices, LabelledDevices):
        raise FederationError("only labelled devices share out a folder")
    path, shared = find_labelled_set(devices.folder, devices.set)
    faces, _ = facing_camera(read_face_folder(path, size=size, label=devices.label), devices.profile_faces)
    if shared and isinstance(experiment.probe, LabelledProbe):
        holdout_fraction = set(first_per_group(faces.groups, experiment.probe.per_group))
        faces = faces.select([i for i in range(len(faces)) if i not in holdout_fraction])
    return faces.images, faces.groups


@lru_cache(maxsize=2)
def _partition(experiment: Experiment) -> list[list[int]]:
    devices = experiment.devices
    if not isinstance(devices, LabelledDevices):
        raise FederationError("only labelled devices share out a folder")
    _, groups = _labelled(experiment, experiment.start().size)
    rng = Streams(experiment.seed).numpy("partition")
    return [part.tolist() for part in partition(groups, devices.count, devices.split, rng)]


def _mix(experiment: Experiment, part: list[int]) -> str:
    _, groups = _labelled(experiment, experiment.start().size)
    counts: dict[str, int] = {}
    for i in part:
        counts[groups[i]] = counts.get(groups[i], 0) + 1
    top = sorted(counts.items(), key=lambda item: -item[1])[:3]
    return "public photos: " + ", ".join(f"{count / len(part):.0%} {name}" for name, count in top)
