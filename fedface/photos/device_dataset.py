"""The faces that one device trains with, and which of them are one privacy unit.

Labels are stable, so that one photo more or less changes no other photo's side of a split. Two photos of one person on
two days are two units here: see docs/occasions.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from fedface.photos.occasions import numbered
from fedface.privacy_units import Unit
from fedface.tensor_types import StoredImages

SALT = b"fedface: held out"  # never change it: what was held out would be trained on


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceDataset:
    """Aligned faces, one a photo, with the photo and the occasion that each is from."""

    images: StoredImages  # square; as bytes, since a device holds all of its faces at once
    photos: Tensor  # int64 (n,): one label a photo, all distinct
    occasions: Tensor  # int64 (n,): equal where photos were taken together

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        kinds = (torch.float32, torch.uint8)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or self.images.dtype not in kinds:
            raise ValueError(f"images must be float32 or uint8 (n, 3, s, s), got {self.images.dtype} {shape}")
        for name, labels in (("photos", self.photos), ("occasions", self.occasions)):
            if labels.dtype != torch.int64 or tuple(labels.shape) != shape[:1]:
                expected = f"{name} must be int64 ({shape[0]},), one label an image"
                raise ValueError(f"{expected}, got {labels.dtype} {tuple(labels.shape)}")
        if len(torch.unique(self.photos)) != len(self.photos):
            raise ValueError("photos must be distinct: a photo that is here twice would count twice")

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def independent(images: StoredImages) -> DeviceDataset:
        """Each photo is an occasion of its own, as in a public set of faces."""
        return DeviceDataset.by_occasion(images, 1)

    @staticmethod
    def by_occasion(images: StoredImages, size_of_each: int) -> DeviceDataset:
        """Runs of that many photos are an occasion each; the last may be shorter."""
        if size_of_each < 1:
            raise ValueError(f"size_of_each must be >= 1, got {size_of_each}")
        photos = torch.arange(len(images))
        return DeviceDataset(images=images, photos=photos, occasions=photos - photos % size_of_each)

    def units(self, unit: Unit) -> Tensor:
        """Which unit each photo belongs to, int64 (n,): 0, 1, 2, ... in the order of first appearance."""
        match unit:
            case "photo":
                return torch.arange(len(self))
            case "occasion":
                return torch.from_numpy(numbered(self.occasions.cpu().numpy()))
            case "library":
                return torch.zeros(len(self), dtype=torch.int64)
            case _:
                assert_never(unit)

    def select(self, index: Tensor) -> DeviceDataset:
        """Some of the faces: by index, int64 (m,) without repeats, or by mask, bool (n,). All of them: no copy."""
        if index.dtype == torch.bool and bool(index.all()):
            return self
        return DeviceDataset(
            images=self.images[index], photos=self.photos[index], occasions=self.occasions[index]
        )

    def split(self, holdout_fraction: float, unit: Unit) -> tuple[DeviceDataset, DeviceDataset]:
        """The training set and the holdout set: whole units, or whole occasions where the unit is the library.

        A unit's side depends on its own label alone. So libraries that differ by one photo or occasion differ by it in
        one of the two sets, and not at all in the other.

        Args:
            holdout_fraction: The probability of each unit to be held out, in [0, 1).
            unit: What must not lie in both sets.
        """
        if not 0 <= holdout_fraction < 1:
            raise ValueError(f"holdout_fraction must lie in [0, 1), got {holdout_fraction}")
        labels = (self.photos if unit == "photo" else self.occasions).tolist()
        uniform = {label: _uniform(label) for label in set(labels)}
        held = torch.from_numpy(np.array([uniform[label] < holdout_fraction for label in labels], dtype=bool))
        return self.select(~held), self.select(held)


def _uniform(label: int) -> float:
    """A hash of the label as a number in [0, 1): the same on every machine."""
    digest = hashlib.sha256(SALT + label.to_bytes(8, "big", signed=True)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
