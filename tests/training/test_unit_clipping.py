"""Units larger than a photo: whose gradients are summed, when they are clipped, and how they are sampled."""

from __future__ import annotations

import pytest
import torch
from pytest import approx
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.randomness import SecretNoise, Streams
from fedface.training.dp_sgd import SampledMechanism, private_gradient, private_sum
from fedface.training.per_example_gradients import PerExampleProblem, clipped_unit_sum, per_example_gradients
from fedface.training.unit_clipping import MAX_PHOTOS_PER_UNIT, sample_photos

CLIP = 0.5


def network() -> nn.Module:
    """A small convolution."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 1))


def loss(module: nn.Module, photos: Tensor) -> Tensor:
    """One number per photo."""
    return module(photos).squeeze(1).square()


def photos(count: int) -> Tensor:
    """Random images."""
    return torch.rand(count, 3, 8, 8, generator=Streams(3).generator("photos"))


def slow_sum(module: nn.Module, pictures: Tensor, units: Tensor) -> list[Tensor]:
    """One backward pass for each unit, clipped by hand."""
    totals = [torch.zeros_like(weight) for weight in module.parameters()]
    for unit in units.unique().tolist():
        summed = torch.autograd.grad(loss(module, pictures[units == unit]).sum(), list(module.parameters()))
        length = torch.cat([part.flatten() for part in summed]).norm()
        scale = min(1.0, CLIP / float(length))
        totals = [total + scale * part for total, part in zip(totals, summed, strict=True)]
    return totals


class Operations(TorchDispatchMode):
    """The operations of a computation, each with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.done.append((str(func), tuple(part.shape for part in found if isinstance(part, Tensor))))
        return result


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("extreme", [1e30, float("inf"), float("nan"), 0.0])
def test_work_and_memory_do_not_depend_on_the_gradient_of_a_photo(extreme: float, grouped: bool) -> None:
    """One without a finite norm adds nothing, with the same operations on the same shapes as any other."""
    logs = []
    for value in (0.5, extreme):
        pictures = photos(5)
        pictures[3] = value
        problem = PerExampleProblem(network(), loss, microbatch=4)
        units = torch.tensor([0, 0, 1, 2, 2]) if grouped else None
        with Operations() as operations:
            clipped_unit_sum(problem, pictures, clip_norm=CLIP, units=units)
        logs.append(operations.done)
    assert logs[0] == logs[1] and len(logs[0]) > 100


def one_step(units: Tensor, microbatch: int, pictures: Tensor) -> list[Tensor]:
    """A step without noise, in which every unit takes part."""
    sampled = SampledMechanism(ClippedSum(clip_norm=CLIP), 1.0, torch.Generator().manual_seed(1))
    problem = PerExampleProblem(network(), loss, microbatch=microbatch)
    return private_gradient(problem, pictures, sampled, expected_batch_size=1, units=units)


@pytest.mark.parametrize("microbatch", [1, 2, 5, 64])
def test_a_unit_is_clipped_as_a_whole_across_microbatches(microbatch: int) -> None:
    """Units of 1, 3 and 7 photos, in any order, equal one backward pass per unit to 1e-5."""
    units = torch.tensor([2, 0, 1, 2, 2, 1, 2, 2, 1, 2, 2])
    pictures = photos(len(units))
    ours, slow = one_step(units, microbatch, pictures), slow_sum(network(), pictures, units)
    length = torch.cat([part.flatten() for part in slow]).norm()
    for one, other in zip(ours, slow, strict=True):
        assert float((one - other).norm() / length) < 1e-5


def test_forty_photos_of_one_occasion_move_a_step_no_more_than_one_photo() -> None:
    """With units the sum moves by at most the clip norm; per photo it moves several times as far."""
    birthday = photos(1).repeat(40, 1, 1, 1)
    together = torch.cat([p.flatten() for p in one_step(torch.zeros(40, dtype=torch.int64), 8, birthday)])
    alone = torch.cat([p.flatten() for p in one_step(torch.arange(40), 8, birthday)])
    assert float(together.norm()) <= CLIP * (1 + 1e-5)
    assert float(alone.norm()) > 5 * CLIP


def test_one_unit_more_or_less_moves_the_sum_by_the_clip_norm_at_most() -> None:
    """Whatever its photos, also next to units of many photos."""
    units = torch.tensor([0, 0, 0, 1, 2, 2])
    pictures = photos(6)
    pictures[3] *= 1000.0
    whole = one_step(units, 4, pictures)
    without = one_step(torch.tensor([0, 0, 0, 1, 1]), 4, pictures[units != 1])
    moved = torch.cat([(a - b).flatten() for a, b in zip(whole, without, strict=True)]).norm()
    assert float(moved) <= CLIP * (1 + 1e-4)


def test_units_are_sampled_and_not_photos() -> None:
    """A unit's photos are sampled together, and a unit of one photo as often as one of five."""
    units = torch.tensor([0, 1, 1, 1, 1, 1])
    rng = torch.Generator().manual_seed(7)
    joined = [set(sample_photos(units, 0.3, rng).tolist()) for _ in range(3000)]
    assert all(found & {1, 2, 3, 4, 5} in (set(), {1, 2, 3, 4, 5}) for found in joined)
    for photo in (0, 1):
        times = sum(photo in found for found in joined)
        assert stats.binomtest(times, 3000, 0.3).pvalue > 1e-4


def test_of_a_large_unit_sixteen_photos_are_sampled_uniformly() -> None:
    """The cost of a step is bounded for any occasion."""
    units = torch.zeros(100, dtype=torch.int64)
    rng = torch.Generator().manual_seed(3)
    seen = torch.zeros(100)
    for _ in range(1000):
        samples = sample_photos(units, 1.0, rng)
        assert len(samples) == MAX_PHOTOS_PER_UNIT and len(set(samples.tolist())) == MAX_PHOTOS_PER_UNIT
        seen[samples] += 1
    expected = 1000 * MAX_PHOTOS_PER_UNIT / 100
    spread = float(((seen - expected) ** 2).sum() / (expected * (1 - MAX_PHOTOS_PER_UNIT / 100)))
    assert stats.chi2.cdf(spread, 99) < 0.9999


def test_the_sum_of_vectors_clips_units_and_noises_once() -> None:
    """Two equal vectors of one unit count as one; noise has the mechanism's deviation, also without a unit."""
    vectors = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.2]])
    sampled = SampledMechanism(ClippedSum(clip_norm=1.0), 1.0, torch.Generator().manual_seed(0))
    quiet = private_sum(vectors, sampled, units=torch.tensor([0, 0, 1]))
    assert quiet.tolist() == approx([1.0, 0.2], rel=1e-5) and float(quiet[0]) <= 1.0
    sampled = SampledMechanism(GaussianSum(clip_norm=2.0, sigma=1.5), 0.5, SecretNoise())
    noised = private_sum(torch.zeros(0, 20_000), sampled, units=torch.zeros(0, dtype=torch.int64))
    assert float(noised.std()) == approx(3.0, rel=0.05)


@pytest.mark.parametrize(
    "units", [torch.tensor([0, 2, 2]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1, 0, 1])]
)  # fmt: skip
def test_units_that_do_not_fit_are_refused(units: Tensor) -> None:
    with pytest.raises(ValueError, match="units must be"):
        one_step(units, 4, photos(3))


def test_by_default_each_photo_is_a_unit() -> None:
    """The same as giving each photo its own unit."""
    pictures = photos(5)
    gradients = per_example_gradients(PerExampleProblem(network(), loss), pictures)
    lengths = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (CLIP / lengths).clamp(max=1.0)
    required = [torch.einsum("n,n...->...", scale, g) for g in gradients]
    for one, other in zip(one_step(torch.arange(5), 2, pictures), required, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
