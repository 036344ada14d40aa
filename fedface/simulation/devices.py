"""Pretended devices and public probes: what an experiment's words mean in pictures.

Called by flower.py (a device for each node of a simulation) and findings.py (the probe). Pretended devices
keep real ledgers and real keys in the run's folder, so that resuming a simulation obeys the same rules.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import assert_never

import torch

from fedface.aggregation.homomorphic import make_keys
from fedface.audits.sample_quality import TONE_GROUPS
from fedface.device.client import Device
from fedface.errors import FederationError, LibraryError
from fedface.experiment import (
    Experiment,
    LabelledDevices,
    LabelledProbe,
    RemoteDevices,
    SyntheticDevices,
    SyntheticProbe,
)
from fedface.photos.client_partition import partition
from fedface.photos.device_dataset import DeviceDataset
from fedface.photos.labelled_faces import LabelledFaces, labelled_sets, read_face_folder
from fedface.photos.skin_tone import ToneReading, measure_tone
from fedface.randomness import Streams
from fedface.synthetic.faces import (
    SyntheticFaces,
    ToneMix,
    render,
    render_occasions,
    render_people,
    sample_faces,
)
from fedface.tensor_types import Images


@dataclass(frozen=True, kw_only=True)
class PublicProbe:
    """Labelled faces that no device holds."""

    images: Images  # (n, 3, size, size)
    groups: tuple[str, ...]  # n of them
    expected: tuple[str, ...]  # every group, light to dark where that is known
    tone: ToneReading  # read under neutral light for drawn faces, from the photo itself otherwise
    description: str  # which faces, in words, with what was left out


def device_name(number: int) -> str:
    """`device-03`."""
    return f"device-{number:02d}"


def check_sources(experiment: Experiment) -> None:
    """Look whether labelled photos are where the experiment says, before a run is begun.

    Raises:
        LibraryError: A folder is missing or holds no labelled photos.
    """
    for part in (experiment.devices, experiment.probe):
        if isinstance(part, LabelledDevices | LabelledProbe):
            _set_path(part.folder, part.set)


def prepare(experiment: Experiment, folder: Path) -> None:
    """Make each pretended device's state folder, and the shared key where sums need one.

    Whoever starts a simulation plays all devices, so the key is made here; the coordinator is not given it.
    Nothing that exists is replaced.
    """
    if isinstance(experiment.devices, RemoteDevices):
        return
    names = [device_name(number) for number in range(experiment.devices.count)]
    states = [folder / name for name in names]
    for state in states:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    missing = [state for state in states if not (state / "sum.key").exists()]
    if not missing:
        return
    if len(missing) < len(states):
        raise FederationError(
            f"{missing[0]}: its key is gone while other devices still have theirs; start a new run"
        )
    keys = make_keys(experiment.aggregation, experiment.agreement)
    if keys is not None:
        for state in missing:
            keys.save(state / "sum.key")


def simulated_device(experiment: Experiment, number: int, folder: Path) -> Device:
    """Pretended device `number`, from 0; its photos are drawn or read when a round first needs them."""
    if isinstance(experiment.devices, RemoteDevices):
        raise FederationError(
            "this experiment waits for real devices; start it with `flwr run` against a SuperLink, "
            "or give it synthetic-devices or labelled-devices"
        )
    if not 0 <= number < experiment.devices.count:
        raise FederationError(
            f"this experiment has {experiment.devices.count} devices, asked for number {number}"
        )

    devices = experiment.devices
    together = devices.photos_per_occasion if isinstance(devices, SyntheticDevices) else 1

    def photos(size: int) -> DeviceDataset:
        return DeviceDataset.by_occasion(_photos(experiment, number, size), together)

    return Device(
        name=device_name(number),
        photos=photos,
        policy=experiment.device_policy(),
        state=folder / device_name(number),
    )


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
            parts = _dealt(experiment)
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
            everyone = torch.cat([_photos(experiment, i, size) for i in range(devices.count)])
            rng = Streams(experiment.seed).generator("like the devices")
            return everyone[torch.randperm(len(everyone), generator=rng)[part * count : (part + 1) * count]]
        case RemoteDevices():
            return None
        case _:
            assert_never(devices)


def public_faces(probe: SyntheticProbe | LabelledProbe, seed: int, size: int) -> PublicProbe:
    """The faces of a probe, the same in every call."""
    match probe:
        case SyntheticProbe():
            return _drawn_probe(probe, size, Streams(seed).child("probe"))
        case LabelledProbe():
            return _labelled_probe(probe, size)
        case _:
            assert_never(probe)


def _drawn_probe(probe: SyntheticProbe, size: int, streams: Streams) -> PublicProbe:
    rng, each = streams.generator("faces"), probe.per_group
    count, share = each * 200, 0.5
    if probe.light_fraction is not None:
        count, share = each * len(TONE_GROUPS), probe.light_fraction
    everyone = sample_faces(count, ToneMix(light_fraction=share), rng)
    group = ((everyone.tone - 0.5) / 2).floor().clamp(0, 4).long()
    chosen = torch.cat([torch.nonzero(group == g)[:each, 0] for g in range(5)])
    words = f"{len(chosen)} freshly drawn faces, {each} in each group of true Monk tone, through cameras"
    if probe.light_fraction is not None:
        chosen = torch.arange(count)
        words = f"{count} freshly drawn faces, {share:.0%} of them light (Monk 1-5), through cameras"
    faces: SyntheticFaces = everyone[chosen]
    images = render(faces, size, noise=streams.generator("camera"))
    return PublicProbe(
        images=images,
        groups=tuple(TONE_GROUPS[g] for g in group[chosen].tolist()),
        expected=TONE_GROUPS,
        tone=measure_tone(images),
        description=words,
    )


def _labelled_probe(probe: LabelledProbe, size: int) -> PublicProbe:
    path, _ = _set_path(probe.folder, probe.set)
    everyone, away = _facing(read_face_folder(path, size=size, label=probe.label), probe.profile_faces)
    faces = everyone.select(_first_of_each(everyone.groups, probe.per_group))
    unseen = Counter({**everyone.missed}) + Counter({**everyone.unreadable})
    reasons = [
        f"{words}: " + ", ".join(f"{group} {count}" for group, count in sorted(counts.items()))
        for words, counts in (("no face found or unreadable", unseen), ("turned away", away))
        if counts
    ]
    left_out = (
        f"; left out of {len(everyone) + sum(unseen.values()) + sum(away.values())}: " if reasons else ""
    )
    return PublicProbe(
        images=faces.images,
        groups=faces.groups,
        expected=tuple(sorted({*everyone.groups, *unseen, *away})),
        tone=measure_tone(faces.images),
        description=f"{len(faces)} labelled photos grouped by {probe.label}, up to {probe.per_group} each"
        + left_out
        + "; ".join(reasons),
    )


def _facing(faces: LabelledFaces, turned: str) -> tuple[LabelledFaces, Counter[str]]:
    """The faces that look towards the camera, and how many of each group do not.

    FFHQ's crop of a profile in a tight photo is mostly mirrored border, and a generator of frontal faces has
    no answer to it. A face counts as turned when its eyes are closer than 0.18 of the crop (0.26 is frontal),
    or its nose lies outside the middle 60 % between them.
    """
    if turned == "keep":
        return faces, Counter()
    left, right, nose = (faces.landmarks[:, point, 0] for point in range(3))
    apart = right - left
    place = (nose - left) / apart.clamp(min=1e-6)
    facing = (apart >= 0.18 * faces.images.shape[-1]) & (place > 0.2) & (place < 0.8)
    away = Counter(group for group, looks in zip(faces.groups, facing.tolist(), strict=True) if not looks)
    return faces.select(torch.nonzero(facing)[:, 0].tolist()), away


def _first_of_each(groups: tuple[str, ...], each: int) -> list[int]:
    seen: dict[str, int] = {}
    kept = []
    for i, group in enumerate(groups):
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= each:
            kept.append(i)
    return kept


def _set_path(folder: Path, name: str) -> tuple[Path, bool]:
    """Where a labelled set lies, and whether devices and probe must share it because there is only one."""
    if not folder.exists():
        raise LibraryError(
            f"{folder}: no such folder of labelled photos; say where it is with --photos FOLDER"
        )
    table = folder / f"{name}.csv"
    if name and folder.is_dir() and table.is_file():
        return table, False
    if not labelled_sets(folder):
        raise LibraryError(
            f"{folder}: wanted labelled photos, pictures beside a CSV of labels and landmarks, got none"
        )
    return folder, True


@lru_cache(maxsize=2)
def _labelled(experiment: Experiment, size: int) -> tuple[Images, tuple[str, ...]]:
    """All photos that pretended devices share out, and their groups."""
    devices = experiment.devices
    if not isinstance(devices, LabelledDevices):
        raise FederationError("only labelled devices share out a folder")
    path, shared = _set_path(devices.folder, devices.set)
    faces, _ = _facing(read_face_folder(path, size=size, label=devices.label), devices.profile_faces)
    if shared and isinstance(experiment.probe, LabelledProbe):
        holdout_fraction = set(_first_of_each(faces.groups, experiment.probe.per_group))
        faces = faces.select([i for i in range(len(faces)) if i not in holdout_fraction])
    return faces.images, faces.groups


@lru_cache(maxsize=2)
def _dealt(experiment: Experiment) -> list[list[int]]:
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


@lru_cache(maxsize=64)
def _photos(experiment: Experiment, number: int, size: int) -> Images:
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
            return images[_dealt(experiment)[number]]
        case RemoteDevices():
            raise FederationError("a real device's photos are not here")
        case _:
            assert_never(devices)
