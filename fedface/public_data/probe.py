"""The public probe: labelled faces that no device has, for comparing methods and models by group."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import assert_never

import torch

from fedface.audits.sample_quality import TONE_GROUPS
from fedface.experiment import LabelledProbe, SyntheticProbe
from fedface.photos.labelled_faces import first_per_group, read_face_folder
from fedface.photos.skin_tone import ToneReading, measure_tone
from fedface.public_data.labelled_sets import facing_camera, find_labelled_set
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces
from fedface.tensor_types import Images


@dataclass(frozen=True, kw_only=True)
class PublicProbe:
    """Labelled faces that no device has."""

    images: Images  # (n, 3, size, size)
    groups: tuple[str, ...]  # n of them
    expected: tuple[str, ...]  # every group, light to dark where that is known
    tone: ToneReading  # measured on the images
    description: str  # which faces, and how many were left out


def public_faces(probe: SyntheticProbe | LabelledProbe, seed: int, size: int) -> PublicProbe:
    """The faces of a probe; deterministic in the seed."""
    match probe:
        case SyntheticProbe():
            return _synthetic_probe(probe, size, Streams(seed).child("probe"))
        case LabelledProbe():
            return _labelled_probe(probe, size)
        case _:
            assert_never(probe)


def _synthetic_probe(probe: SyntheticProbe, size: int, streams: Streams) -> PublicProbe:
    rng, each = streams.generator("faces"), probe.per_group
    count, light = each * 200, 0.5
    if probe.light_fraction is not None:
        count, light = each * len(TONE_GROUPS), probe.light_fraction
    everyone = sample_faces(count, ToneMix(light_fraction=light), rng)
    group = ((everyone.tone - 0.5) / 2).floor().clamp(0, 4).long()
    chosen = torch.cat([torch.nonzero(group == g)[:each, 0] for g in range(5)])
    description = f"{len(chosen)} synthetic faces, {each} in each group of true Monk tone, with camera noise"
    if probe.light_fraction is not None:
        chosen = torch.arange(count)
        description = f"{count} synthetic faces, {light:.0%} of them light (Monk 1-5), with camera noise"
    faces = everyone[chosen]
    images = render(faces, size, noise=streams.generator("camera"))
    return PublicProbe(
        images=images,
        groups=tuple(TONE_GROUPS[g] for g in group[chosen].tolist()),
        expected=TONE_GROUPS,
        tone=measure_tone(images),
        description=description,
    )


def _labelled_probe(probe: LabelledProbe, size: int) -> PublicProbe:
    path, _ = find_labelled_set(probe.folder, probe.set)
    everyone, turned = facing_camera(
        read_face_folder(path, size=size, label=probe.label), probe.profile_faces
    )
    faces = everyone.select(first_per_group(everyone.groups, probe.per_group))
    unseen = Counter({**everyone.missed}) + Counter({**everyone.unreadable})
    reasons = [
        f"{reason}: " + ", ".join(f"{group} {count}" for group, count in sorted(counts.items()))
        for reason, counts in (("no face found or unreadable", unseen), ("turned away", turned))
        if counts
    ]
    skipped = (
        f"; left out of {len(everyone) + sum(unseen.values()) + sum(turned.values())}: " if reasons else ""
    )
    return PublicProbe(
        images=faces.images,
        groups=faces.groups,
        expected=tuple(sorted({*everyone.groups, *unseen, *turned})),
        tone=measure_tone(faces.images),
        description=f"{len(faces)} labelled photos grouped by {probe.label}, up to {probe.per_group} each"
        + skipped
        + "; ".join(reasons),
    )
