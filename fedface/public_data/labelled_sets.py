"""Labelled public photos: finding a set, selecting faces towards the camera, and the first of each group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from fedface.errors import ConfigError, LibraryError
from fedface.experiment import Experiment, LabelledDevices, LabelledProbe, RemoteDevices
from fedface.photos.labelled_faces import LabelledFaces, labelled_sets


def check_simulated(experiment: Experiment, file: Path) -> None:
    """Check before a run that its devices are simulated, and that their labelled photos exist.

    Raises:
        ConfigError: The experiment, read from `file`, needs remote devices.
        LibraryError: A folder is missing or holds no labelled photos.
    """
    if isinstance(experiment.devices, RemoteDevices):
        raise ConfigError(
            f"{file}: needs remote devices; start it with `fedface server run`, or use simulated devices"
        )
    for part in (experiment.devices, experiment.probe):
        if isinstance(part, LabelledDevices | LabelledProbe):
            find_labelled_set(part.folder, part.set)


def find_labelled_set(folder: Path, name: str) -> tuple[Path, bool]:
    """The path of a labelled set, and whether devices and probe must share it because there is only one."""
    if not folder.exists():
        raise LibraryError(f"{folder}: no such folder of labelled photos; give it with --photos FOLDER")
    table = folder / f"{name}.csv"
    if name and folder.is_dir() and table.is_file():
        return table, False
    if not labelled_sets(folder):
        raise LibraryError(
            f"{folder}: expected labelled photos, images beside a CSV of labels and landmarks, got none"
        )
    return folder, True


def facing_camera(faces: LabelledFaces, profile_faces: str) -> tuple[LabelledFaces, Counter[str]]:
    """The faces that look towards the camera, and how many of each group are turned away.

    FFHQ's crop of a profile in a tight photo is mostly mirrored border, which a generator of frontal faces cannot
    reproduce. A face counts as turned if its eyes are closer than 0.18 of the crop (0.26 is frontal), or if its
    nose is outside the middle 60 % between them.
    """
    if profile_faces == "include":
        return faces, Counter()
    left, right, nose = (faces.landmarks[:, point, 0] for point in range(3))
    apart = right - left
    place = (nose - left) / apart.clamp(min=1e-6)
    facing = (apart >= 0.18 * faces.images.shape[-1]) & (place > 0.2) & (place < 0.8)
    away = Counter(group for group, looks in zip(faces.groups, facing.tolist(), strict=True) if not looks)
    return faces.select(torch.nonzero(facing)[:, 0].tolist()), away
