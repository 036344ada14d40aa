"""One private step: each unit's gradient, clipped, summed and noised. Photos do not get beyond this module.

Source: Abadi et al. (2016), arXiv:1607.00133, Algorithm 1. A unit is what the privacy guarantee protects: a photo, or
all photos of an occasion. Units join a step by secret coins of a public probability, the sum of a unit's gradients is
clipped, the sum over units is divided by a public constant, and the noise comes from `SecretNoise`, never from a seed
or from Opacus, of which only the module validator is used here.

Which photos of a large occasion a step uses: training/unit_clipping. How gradients per photo are computed in bounded
memory: training/per_example_gradients.

For a GAN, call this for the real photos only and add the ordinary gradient of the fake half: fakes are
post-processing. Adaptive augmentation that looks at real scores, R1 on real photos and minibatch statistics all read
photos outside the guarantee: leave them out or put them inside the loss of one photo.

A loss may average over random draws of its own, such as the times and noises of a flow ("noise multiplicity":
Dockhorn et al. 2022, arXiv:2210.09929), one row per photo. They cost no privacy, however many:

* Averaging comes before clipping, so that one photo still adds a vector of L2 norm `clip_norm` at most.
* Given the row of every photo, joined or not, a step is the same Poisson-sampled Gaussian sum as without draws. The
  rows are independent of the photos, of one another, of coins and noise, so that what is released is a mixture over
  them, and the hockey-stick divergence is jointly convex (Balle et al. 2018, arXiv:1807.01647).
* The second point needs rows that the receiver cannot know. Rows from a public seed are assigned in the order of the
  joined photos, and one photo more would shift every row behind it. A private step therefore takes its rows from
  `SecretNoise`, like its coins.

Gradients may be scaled weight by weight before they are clipped (AdaDPS, Li et al. 2022, arXiv:2202.05963), by scales
that are public and fixed before a photo is read: what is clipped is then another vector of the same photo, and the
privacy loss is the same. Scales from the photos themselves would be a release of their own.

Microbatches always have the same number of images, padded with grey ones, and at least one is computed: how kernels
round depends on that number alone, so that a photo's gradient is the same to the last bit whoever else joined
(`with_deterministic_microbatch` tests whether this machine's kernels guarantee that, and falls back to single
photos). Otherwise a hostile network, whose numbers cancel and are then amplified, could turn rounding errors into
gradients as large as the clip norm, and memory could reveal how many joined.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedface.errors import PrivacyError
from fedface.privacy.clip_and_noise import add_noise
from fedface.privacy.distributed_noise import DistributedNoise, from_sum, noised_integers
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.privacy.plan import DPParameters
from fedface.randomness import SecretNoise
from fedface.tensor_types import Images, StoredImages, Vector
from fedface.training.per_example_gradients import (
    PerExampleProblem,
    Rows,
    clipped_unit_sum,
    per_example_gradients,
    trainable_parameters,
)
from fedface.training.unit_clipping import NoiseSource, clipped_sum, sample_photos, unit_members

NOISE_SAMPLES = 4096  # that `check_mechanism` draws


@dataclass(frozen=True)
class SampledMechanism:
    """Releases a sum over Poisson-sampled units, priced as PoissonSampled(sampling_rate, mechanism.event()).

    With rate 1 nothing is gained from sampling: the plain Gaussian mechanism, Dwork & Roth (2014), Theorem A.1, in
    the exact form of Balle & Wang (2018), arXiv:1805.06530, Theorem 8.

    Raises:
        PrivacyError: Gaussian noise was to come from a replayable generator.
        ValueError: A sampling rate outside (0, 1].
    """

    mechanism: GaussianSum | ClippedSum
    sampling_rate: float  # the public probability with which a unit joins, 0 < q <= 1
    rng: NoiseSource  # of coins and noise: SecretNoise; a replayable generator only together with ClippedSum

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}")
        if isinstance(self.mechanism, GaussianSum) and not isinstance(self.rng, SecretNoise):
            raise PrivacyError("a private step needs SecretNoise: replayable noise protects nobody")

    @staticmethod
    def of(dp: DPParameters, rng: NoiseSource) -> SampledMechanism:
        """What each step on the device releases under these parameters."""
        return SampledMechanism(dp.mechanism(), dp.schedule.sampling_rate, rng)

    def sample(self, units: Tensor) -> Tensor:
        """The positions of the photos that join, of units int64 (n,), a unit's photos adjacent; may be empty."""
        return sample_photos(units, self.sampling_rate, self.rng)

    @property
    def exact(self) -> bool:
        """Whether sums are not rounded from float64: where noise is added elsewhere, nothing may come before it."""
        return isinstance(self.mechanism, ClippedSum)

    def release(self, total: Tensor) -> Tensor:
        """The sum of clipped vectors, with Gaussian noise added once where the mechanism has some."""
        if isinstance(self.mechanism, ClippedSum):
            return total
        assert isinstance(self.rng, SecretNoise)  # __post_init__ refuses anything else
        return add_noise(total, self.mechanism, self.rng)


def private_gradient(
    problem: PerExampleProblem,
    photos: StoredImages,
    sampled: SampledMechanism,
    *,
    expected_batch_size: int,
    units: Tensor | None = None,
) -> list[Tensor]:
    """One step of DP-SGD on a device's photos (Abadi et al. 2016, Algorithm 1).

    Guarantees:
        * One unit more or less moves the sum before noise by at most `clip_norm`: the gradients of its photos are
          summed, and their sum is clipped.
        * Noise is added exactly once, also when no unit joined: an empty batch is still a step.
        * Nothing in the result but the joined units' clipped gradients depends on how many there are.
        * Exactly `microbatch` per-example gradients are in memory at once, and one unit's sum.

    Args:
        problem: Its draws must be secret for a private step (see the head of this file).
        photos: All photos of the device, (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        sampled: Who joins, clip norm and noise.
        expected_batch_size: What the sum is divided by, a public constant >= 1.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.

    Returns:
        One tensor per trained parameter, in the order of `network.parameters()`: the gradient to descend.

    Raises:
        ValueError: A number out of bounds, or units that do not fit the photos.
    """
    if expected_batch_size < 1:
        raise ValueError(f"expected_batch_size must be at least 1, got {expected_batch_size}")
    total = private_step_sum(problem, photos, sampled, units=units) / expected_batch_size
    weights = problem.weights()
    parts = torch.split(total, [weight.numel() for weight in weights])
    return [part.view(weight.shape).to(weight) for part, weight in zip(parts, weights, strict=True)]


def private_step_sum(
    problem: PerExampleProblem,
    photos: StoredImages,
    sampled: SampledMechanism,
    *,
    units: Tensor | None = None,
) -> Vector:
    """The sum of a `private_gradient`, divided by nothing, shape (d,); float64 where no noise is added to it here."""
    members = unit_members(photos, units)
    joined = sampled.sample(members)
    totals = clipped_unit_sum(
        problem,
        photos[joined],
        clip_norm=sampled.mechanism.clip_norm,
        units=None if units is None else members[joined],
        exact=sampled.exact,
    )
    # One draw of noise for all weights: one for each weight would take longer than the clipping.
    return sampled.release(torch.cat([total.flatten() for total in totals]))


def private_sum(vectors: Tensor, sampled: SampledMechanism, *, units: Tensor | None = None) -> Tensor:
    """The noised sum of one clipped vector per unit.

    Guarantees:
        * One unit more or less moves the sum before noise by at most `clip_norm`: the vectors of its photos that
          joined are summed, and their sum is clipped.
        * A unit with a non-finite number adds nothing; noise is added once, also to an empty sum.

    Args:
        vectors: One vector per photo of the device, (n, d), n >= 0; row i depends on photo i alone.
        sampled: Who joins, clip norm and noise.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.

    Returns:
        Shape (d,), not divided by anything; float64 where no noise is added to it here.
    """
    return private_sum_of(
        lambda positions: vectors[positions], vectors.shape[1], unit_members(vectors, units), sampled
    )


def private_sum_of(
    rows: Callable[[Tensor], Tensor], width: int, units: Tensor, sampled: SampledMechanism
) -> Tensor:
    """`private_sum` of vectors that are computed only for the photos that joined.

    Args:
        rows: Positions of photos, int64 (m,) -> their vectors (m, width); each depends on its photo alone.
        width: d.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps.
        sampled: Who joins, clip norm and noise.
    """
    joined = sampled.sample(units)
    if not len(joined):
        return sampled.release(torch.zeros(width, dtype=torch.float64 if sampled.exact else None))
    numbers, place = torch.unique_consecutive(units[joined], return_inverse=True)
    sums = torch.zeros(len(numbers), width).index_add_(0, place, rows(joined))
    return sampled.release(clipped_sum([sums], sampled.mechanism.clip_norm, exact=sampled.exact)[0])


def check_mechanism(mechanism: GaussianSum, rng: SecretNoise) -> None:
    """Refuse a mechanism whose clipping or noise is not what the ledger prices. Run it before the first step.

    A vector of ten times the clip norm, one without direction and one that is not finite are clipped; the noise of
    `NOISE_SAMPLES` numbers must have mean 0 and the priced standard deviation, each within six standard errors, so
    that 7 % too little is noticed, and two draws must differ. Other paths of clipping are tested, not checked here.

    Raises:
        PrivacyError: What is wrong, and by how much.
    """
    _check_clipping(mechanism.clip_norm)
    sigma = mechanism.sigma * mechanism.clip_norm
    zeros = torch.zeros(NOISE_SAMPLES)
    one, two = (add_noise(zeros, mechanism, rng).double() for _ in range(2))
    error = sigma / NOISE_SAMPLES**0.5  # of the mean; that of the deviation is smaller by sqrt(2)
    spread = float(one.std())
    if (
        abs(float(one.mean())) > 6 * error
        or abs(spread - sigma) > 6 * error / 2**0.5
        or torch.equal(one, two)
    ):
        raise PrivacyError(
            f"the noise has mean {float(one.mean()):.3g} and standard deviation {spread:.6g}, expected 0 and "
            f"{sigma:.6g}, or repeats itself; nothing was computed"
        )


def check_shares(dp: DPParameters) -> None:
    """The same of distributed noise: so many honest shares have at least the priced variance, within six errors.

    Where the unit is the library, each vector's integers are measured when they are rounded.

    Raises:
        PrivacyError: What is wrong, and by how much.
    """
    mechanism = dp.released_mechanism()
    noise = DistributedNoise.of(dp, NOISE_SAMPLES, dp.honest_devices)
    assert noise is not None and isinstance(mechanism, GaussianSum)
    if dp.unit != "library":
        _check_clipping(mechanism.clip_norm)
    zeros = torch.zeros(NOISE_SAMPLES)
    one, two = (from_sum(noised_integers(zeros, noise), noise).double() for _ in range(2))
    needed = mechanism.sigma * mechanism.clip_norm / dp.honest_devices**0.5
    spread = float(one.std())
    if spread < needed * (1 - 6 / (2 * NOISE_SAMPLES) ** 0.5) or torch.equal(one, two):
        raise PrivacyError(
            f"this device's share of the noise has standard deviation {spread:.6g}, expected at least {needed:.6g}, or "
            "repeats itself; nothing was computed"
        )


def _check_clipping(norm: float) -> None:
    rows = torch.zeros(3, 64)
    rows[0], rows[2, 0] = 10.0 * norm / 8.0, torch.nan
    longest = float(torch.stack(clipped_sum([rows], norm)).double().norm())
    if not longest <= norm * (1 + 1e-6):
        raise PrivacyError(
            f"a vector was clipped to L2 norm {longest:.6g} instead of {norm:.6g}; nothing was computed"
        )


def check_per_example_gradients(problem: PerExampleProblem, photos: Images) -> None:
    """Refuse a network on which clipping would not bound one photo's influence. Run it before the first step.

    Compares each photo's gradient with a backward pass on that photo alone, then changes one photo and tests
    whether another's gradient moves. Opacus's validator passes networks that fail here.

    Args:
        problem: As it will be trained.
        photos: At least two photos, or public stand-ins of the same shape; the first two are used.

    Raises:
        PrivacyError: Which parameter's gradient mixes photos or is wrong, and by how much.
        ValueError: Fewer than two photos.
    """
    if len(photos) < 2:
        raise ValueError(f"the check needs two photos, got {len(photos)}")
    # Here, since opacus takes a CPU second to load, for every command.
    from opacus.validators import ModuleValidator  # noqa: PLC0415

    faults = ModuleValidator.validate(problem.network, strict=False)
    if faults:
        raise PrivacyError(f"this network mixes photos of a batch: {faults[0]}")
    # In float64: in float32 two correct results differ by 3e-4 when rounding puts one activation on the other
    # side of a leaky ReLU's kink, which happens in about one network and pair of a hundred.
    problem = replace(problem, network=copy.deepcopy(problem.network).double())
    pair = photos[:2].detach().double()
    draws = None if problem.draws is None else problem.draws.public(2).double()
    together = per_example_gradients(problem, pair, draws)
    names = list(trainable_parameters(problem.network))
    for photo in range(2):
        rows = (pair,) if draws is None else (pair, draws)
        alone = _ordinary_gradient(problem, tuple(part[photo : photo + 1] for part in rows))
        _compare(names, [g[photo] for g in together], alone, "is not the gradient of that photo alone")
    changed = torch.stack([pair[0], 1.0 - pair[1].flip(-1)])
    after = per_example_gradients(problem, changed, draws)
    _compare(names, [g[0] for g in after], [g[0] for g in together], "moves when another photo changes")


def _ordinary_gradient(problem: PerExampleProblem, rows: Rows) -> list[Tensor]:
    weights = problem.weights()
    gradients = torch.autograd.grad(problem.loss(problem.network, *rows).sum(), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _compare(names: list[str], actual: list[Tensor], expected: list[Tensor], fault: str) -> None:
    """Compare two gradients to 1e-4 of the whole gradient's L2 norm."""
    norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt().clamp(min=1e-12)
    for name, one, other in zip(names, actual, expected, strict=True):
        error = float((one - other).norm() / norm)
        if not error <= 1e-4:
            raise PrivacyError(f"the gradient of {name} for one photo {fault} (off by {error:.2g})")
