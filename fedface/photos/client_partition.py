"""Partitions of labelled public photos among simulated devices, from even to very unequal ones.

Sources: label-Dirichlet partitions, Hsu, Qi, Brown (2019), arXiv:1909.06335.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, assert_never

import numpy as np

from fedface.validation import Above, checked


@dataclass(frozen=True)
class Even:
    """Every device gets a random sample of everything: the control."""

    kind: ClassVar[str] = "even"


@dataclass(frozen=True)
class ByGroup:
    """Every device holds one group only, where there are devices enough; the far end of unequal.

    Devices are dealt to groups by size. With fewer devices than groups, whole groups share a device.
    """

    kind: ClassVar[str] = "by-group"


@dataclass(frozen=True)
@checked
class Dirichlet:
    """Each group is dealt out in Dirichlet(alpha) proportions: small alpha is unequal, large is even."""

    kind: ClassVar[str] = "dirichlet"

    alpha: Annotated[float, Above(0)]


Partition = Even | ByGroup | Dirichlet


def partition(
    labels: Sequence[str], devices: int, how: Partition, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal photos to devices.

    Guarantees:
        * Every photo goes to exactly one device.
        * Equal labels, `how` and generator state give equal parts.
        * A device may end up with no photo (Dirichlet): the caller decides what that means.

    Args:
        labels: The group of each photo, n of them.
        devices: >= 1.
        rng: Decides which photo of a group goes where.

    Returns:
        One sorted int64 array of photo numbers a device.
    """
    if devices < 1:
        raise ValueError(f"devices must be >= 1, got {devices}")
    if len(labels) == 0:
        return [np.zeros(0, dtype=np.int64) for _ in range(devices)]
    names, group_of = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    sizes = np.bincount(group_of, minlength=len(names))
    match how:
        case Even():
            shuffled = rng.permutation(len(group_of))
            return [np.sort(part) for part in np.array_split(shuffled, devices)]
        case ByGroup():
            shares = _one_group_each(sizes, devices)
        case Dirichlet():
            shares = rng.dirichlet(np.full(devices, how.alpha), size=len(names)).reshape(-1, devices)
        case _:
            assert_never(how)
    parts: list[list[np.ndarray]] = [[] for _ in range(devices)]
    for group, share in enumerate(shares):
        members = rng.permutation(np.flatnonzero(group_of == group))
        cuts = np.round(np.cumsum(share)[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def _one_group_each(sizes: np.ndarray, devices: int) -> np.ndarray:
    """Shares, (groups, devices): each next device to the group with the most photos a device."""
    shares = np.zeros((len(sizes), devices))
    if devices < len(sizes):
        load = np.zeros(devices)
        for group in np.argsort(-sizes, kind="stable"):
            lightest = int(np.argmin(load))
            shares[group, lightest] = 1.0
            load[lightest] += sizes[group]
        return shares
    owners: list[list[int]] = [[device] for device in range(len(sizes))]
    for device in range(len(sizes), devices):
        crowding = [size / len(own) for size, own in zip(sizes, owners, strict=True)]
        owners[int(np.argmax(crowding))].append(device)
    for group, own in enumerate(owners):
        shares[group, own] = 1.0 / len(own)
    return shares
