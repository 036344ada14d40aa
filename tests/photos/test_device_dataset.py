"""Faces with their privacy units, and splits that are stable when one unit is added or removed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy_units import UNITS, Unit


def faces(count: int) -> torch.Tensor:
    """Each image contains its own number."""
    return torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def own(photos: list[int], occasions: list[int]) -> DeviceDataset:
    return DeviceDataset(
        images=faces(len(photos)),
        photos=torch.tensor(photos, dtype=torch.int64),
        occasions=torch.tensor(occasions, dtype=torch.int64),
    )


@st.composite
def libraries(draw: st.DrawFn) -> DeviceDataset:
    """Photos with distinct labels, in up to seven occasions."""
    photos = draw(st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=30))
    occasions = draw(st.lists(st.sampled_from(range(7)), min_size=len(photos), max_size=len(photos)))
    return own(photos, [7 * 10**17 * number for number in occasions])


def test_units_are_numbered_in_the_order_of_their_first_photo() -> None:
    mine = own([90, 10, 50, 70, 20], [50, 10, 50, 7, 10])
    assert mine.units("photo").tolist() == [0, 1, 2, 3, 4]
    assert mine.units("occasion").tolist() == [0, 1, 0, 2, 1]
    assert mine.units("library").tolist() == [0, 0, 0, 0, 0]
    assert len(mine) == 5 and {mine.units(unit).dtype for unit in UNITS} == {torch.int64}


def test_public_faces_are_independent_or_grouped() -> None:
    independent = DeviceDataset.independent(faces(3))
    assert independent.photos.tolist() == independent.occasions.tolist() == [0, 1, 2]
    runs = DeviceDataset.by_occasion(faces(7), 3)
    assert runs.occasions.tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert runs.units("occasion").tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("unit", UNITS)
def test_an_empty_dataset_works(unit: Unit) -> None:
    nothing = DeviceDataset.independent(faces(0))
    assert len(nothing) == 0 and nothing.units(unit).tolist() == []
    assert [len(side) for side in nothing.split(0.5, unit)] == [0, 0]


def test_selecting_keeps_images_and_labels_together() -> None:
    mine = own([90, 10, 50], [1, 2, 1])
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = mine.select(index)
        assert some.images[:, 0, 0, 0].tolist() == [
            {90: 0.0, 50: 2.0}[label] for label in some.photos.tolist()
        ]
        assert set(some.photos.tolist()) == {90, 50} and some.occasions.tolist() == [1, 1]
    with pytest.raises(ValueError, match="twice"):
        mine.select(torch.tensor([1, 1]))


@settings(deadline=None)
@given(libraries(), st.floats(0, 0.99), st.sampled_from(UNITS))
def test_a_split_is_disjoint_complete_and_splits_no_unit(
    mine: DeviceDataset, holdout_fraction: float, unit: Unit
) -> None:
    train, held = mine.split(holdout_fraction, unit)
    assert sorted(train.photos.tolist() + held.photos.tolist()) == sorted(mine.photos.tolist())
    if unit != "photo":
        assert not set(train.occasions.tolist()) & set(held.occasions.tolist())


@settings(deadline=None)
@given(libraries(), st.floats(0, 0.99), st.sampled_from(["photo", "occasion"]))
def test_removing_one_unit_moves_no_other(mine: DeviceDataset, holdout_fraction: float, unit: Unit) -> None:
    before = [set(side.photos.tolist()) for side in mine.split(holdout_fraction, unit)]
    units = mine.units(unit)
    for gone in range(int(units.max()) + 1 if len(mine) else 0):
        lost = set(mine.photos[units == gone].tolist())
        after = [
            set(side.photos.tolist()) for side in mine.select(units != gone).split(holdout_fraction, unit)
        ]
        assert after == [side - lost for side in before]
        assert not (lost & before[0]) or not (lost & before[1])


def test_nothing_is_held_out_by_default() -> None:
    mine = DeviceDataset.by_occasion(faces(50), 5)
    for unit in UNITS:
        train, held = mine.split(0.0, unit)
        assert train.photos.tolist() == mine.photos.tolist() and len(held) == 0


def test_about_the_requested_fraction_is_held_out() -> None:
    """Of 2,000 occasions 500 are expected; five standard deviations are 97."""
    mine = DeviceDataset.by_occasion(faces(4000), 2)
    held = mine.split(0.25, "occasion")[1]
    assert 403 <= len(set(held.occasions.tolist())) <= 597
    assert held.photos.tolist() == mine.split(0.25, "library")[1].photos.tolist()


def test_a_smaller_fraction_is_a_subset_of_a_larger_one() -> None:
    mine = DeviceDataset.independent(faces(300))
    few, many = (set(mine.split(share, "photo")[1].photos.tolist()) for share in (0.1, 0.4))
    assert few < many


def test_mismatched_arguments_are_refused() -> None:
    good = {"images": faces(2), "photos": torch.tensor([4, 9]), "occasions": torch.tensor([4, 4])}
    DeviceDataset(**good)
    for wrong, words in (
        ({"images": faces(3)}, "one label an image"),
        ({"images": faces(2).double()}, "float32"),
        ({"images": faces(2).to(torch.int32)}, "uint8"),
        ({"images": faces(2)[:, :1]}, r"\(n, 3, s, s\)"),
        ({"images": faces(2)[:, :, :3]}, r"\(n, 3, s, s\)"),
        ({"photos": torch.tensor([4, 4])}, "twice"),
        ({"photos": torch.tensor([4.0, 9.0])}, "photos must be int64"),
        ({"occasions": torch.tensor([4])}, r"occasions must be int64 \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            DeviceDataset(**{**good, **wrong})
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="holdout_fraction"):
            DeviceDataset(**good).split(share, "photo")
    with pytest.raises(ValueError, match="size_of_each"):
        DeviceDataset.by_occasion(faces(2), 0)
