"""One private step: each unit's own gradient, clipped, summed and noised. The photo ends here.

Called from training/gan.py (the discriminator's real half), private_descent.py and prior.py; this is the only file
that knows Opacus. A unit is what one promise covers: a photo, or all photos of an occasion. Units join a step by
secret coins of a public probability, the sum of a unit's gradients is clipped, the sum over units is divided by a
public constant, and the noise comes from `SecretNoise`, never from a seed or from Opacus.

Which photos of a large occasion a step looks at, and how the sums of units are built in bounded memory:
training/unit_clipping.py.

For a GAN call this for the real photos only, and add the ordinary gradient of the fake half: fakes are
post-processing. Adaptive augmentation that looks at real scores, R1 on real photos and minibatch statistics
all read photos outside the promise: leave them out or put them inside the loss of one photo.

A loss may also average over random draws of its own, such as the times and noises of a flow ("noise
multiplicity": Dockhorn et al. 2022, arXiv:2210.09929). They are drawn outside and handed in, one row per
photo, and cost nothing, however many:

* Averaging comes before clipping, so that one photo still adds a vector of length `clip_norm` at most.
* Given the row of every photo, joined or not, a step is the same Poisson-sampled Gaussian sum as without
  draws. The rows are independent of the photos, of one another, of coins and noise, so that what is released
  is a mixture over them, and the hockey-stick divergence is jointly convex (Balle et al. 2018,
  arXiv:1807.01647): no mixture is further apart than its parts.
* The second point needs rows that the receiver cannot know. Rows from a public seed are handed out in the
  order of the joined photos, and one photo more would shift every row behind it. A promised step therefore
  takes its rows from `SecretNoise`, like its coins.

Gradients may be scaled weight by weight before they are clipped (AdaDPS, Li et al. 2022, arXiv:2202.05963). The
scales are public, fixed before a photo is seen: what is clipped, summed and noised is then another vector of the
same photo, of length `clip_norm` at most, and the price is the same. Scales from the photos themselves would be a
release of their own.

Microbatches always have the same number of pictures, grey ones filling up the last, and at least one is computed: how
kernels round hangs on that number alone, so that a photo's gradient is the same to the last bit whoever else joined
(`deterministic_microbatch` looks whether this machine's kernels keep that, and falls back to photos one by one). Otherwise a
hostile network, whose numbers cancel and are then blown up, could turn roundings into gradients as long as the clip
norm, and memory could tell how many joined.

Source: Abadi et al. (2016), arXiv:1607.00133, Algorithm 1; Opacus, Yousefpour et al. (2021),
arXiv:2109.12298.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fedface.errors import PrivacyError
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.randomness import SecretNoise
from fedface.tensor_types import Images, KeptImages
from fedface.training.per_example_gradients import (
    Draw,
    PerExampleLoss,
    clipped_unit_sum,
    compute_per_example_gradients,
    trainable_parameters,
    vmap_gradients,
)
from fedface.training.unit_clipping import NoiseSource, clipped_sum, sample_photos, unit_members

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class LayerByLayer:
    """Contract what each layer read with its output's gradient, where autograd's record shows that this is all.

    Elsewhere (demodulation, adapters, penalties) it differentiates the whole network; see training/per_example_gradients.py. The
    fastest on all our networks: 1.0 to 1.5 times an ordinary step, noise included (docs/speed.md).
    """


@dataclass(frozen=True)
class WholeNetwork:
    """Differentiate the whole network per photo with torch.func: right for every layer.

    Costs 1.2 to 1.9 times an ordinary step, noise included (docs/speed.md).
    """


@dataclass(frozen=True)
class OpacusLayers:
    """Differentiate layer by layer with Opacus's functorch mode, for networks that torch.func refuses.

    Wrong where a weight is read outside its own module's forward; `check_per_example_gradients` finds that out.
    Opacus refuses layers with buffers, and with them the StyleGAN2 discriminator's blur filters. Costs 2.1 to 2.5
    times an ordinary step (175k-parameter discriminator without filters).
    """


Engine = LayerByLayer | WholeNetwork | OpacusLayers


def per_example_gradients(
    module: nn.Module,
    loss: PerExampleLoss,
    photos: Images,
    *,
    draws: Tensor | None = None,
    engine: Engine | None = None,
) -> list[Tensor]:
    """The gradient of each photo's own loss, unclipped: never let one leave the device.

    Args:
        module: The network; its `.grad` fields are left alone.
        loss: One loss per photo; photo i's loss must depend on photo i alone.
        photos: Shape (n, ...), n >= 1.
        draws: One row per photo, (n, ...), as the loss's third argument; None for a loss of two arguments.
        engine: How to differentiate; LayerByLayer() if None.

    Returns:
        One tensor (n, *weight.shape) per trained parameter.

    Raises:
        PrivacyError: Opacus's engine was given draws, of which it cannot see which belong together, or a
            network that it refuses.
    """
    chosen: Engine = LayerByLayer() if engine is None else engine
    match chosen:
        case LayerByLayer():
            return compute_per_example_gradients(module, loss, photos, draws=draws)
        case WholeNetwork():
            return vmap_gradients(module, loss, (photos,) if draws is None else (photos, draws))
        case OpacusLayers():
            if draws is not None:
                raise PrivacyError(
                    "a loss with draws of its own needs the engine LayerByLayer or WholeNetwork, got OpacusLayers"
                )
            return _by_opacus_layers(module, loss, photos)
        case _:
            assert_never(chosen)


def _by_opacus_layers(module: nn.Module, loss: PerExampleLoss, photos: Images) -> list[Tensor]:
    weights = list(trainable_parameters(module).values())
    kept = [weight.grad for weight in weights]
    try:
        wrapped = GradSampleModule(module, loss_reduction="sum", force_functorch=True)
    except NotImplementedError as error:
        raise PrivacyError(f"Opacus cannot differentiate this network layer by layer: {error}") from error
    try:
        torch.autograd.backward(loss(wrapped, photos).sum())
        return [_one_tensor(weight, len(photos)) for weight in weights]
    finally:
        wrapped.to_standard_module()
        for weight, gradient in zip(weights, kept, strict=True):
            weight.grad = gradient


def _one_tensor(weight: nn.Parameter, count: int) -> Tensor:
    """Opacus's per-sample gradient: a list if the weight was used more than once, None if it was not used."""
    sampled: Any = getattr(weight, "grad_sample", None)
    if sampled is None:
        return torch.zeros(count, *weight.shape)
    gradient: Tensor = torch.stack(sampled).sum(0) if isinstance(sampled, list) else sampled
    return gradient.detach()


def private_gradient(
    module: nn.Module,
    photos: KeptImages,
    loss: PerExampleLoss,
    *,
    mechanism: GaussianSum | ClippedSum,
    expected_batch_size: int,
    sampling_rate: float,
    rng: NoiseSource,
    units: Tensor | None = None,
    draw: Draw | None = None,
    scales: Sequence[Tensor] | None = None,
    microbatch: int = 16,
) -> list[Tensor]:
    """One step of DP-SGD on a device's photos, priced as PoissonSampled(sampling_rate, mechanism.event()).

    Guarantees:
        * One unit more or less moves the sum before noise by at most `mechanism.clip_norm`: the gradients of its
          photos are summed, and their sum is clipped.
        * Noise is added exactly once, also when no unit was drawn: an empty batch is still a step.
        * Nothing in the result but the drawn units' clipped gradients depends on how many there are.
        * Exactly `microbatch` per-photo gradients are in memory at once, grey pictures filling up, and one unit's sum.

    Args:
        module: The network; neither its weights nor its `.grad` fields change.
        photos: All photos of the device, (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        loss: (network, photos) -> one loss per photo; call the network that it is given, not `module`. With
            `draw`, (network, photos, draws).
        mechanism: `terms.mechanism()`: GaussianSum, or ClippedSum where the device promises nothing.
        expected_batch_size: What the sum is divided by, a public constant >= 1.
        sampling_rate: The public probability with which a unit joins this step, 0 < q <= 1.
        rng: SecretNoise; a replayable generator only together with ClippedSum.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.
        draw: Gives the loss's own random draws, fresh for every microbatch, one row per photo; secret for a
            promise (see the head of this file).
        scales: Public factors of the gradient's numbers, one tensor (*weight.shape) per trained parameter; what
            comes back is scaled. None leaves gradients as they are.
        microbatch: How many photos are differentiated at once, >= 1.

    Returns:
        One tensor per trained parameter, in the order of `module.parameters()`: the gradient to descend.

    Raises:
        PrivacyError: A promised step was given replayable chance.
        ValueError: A number out of bounds, or units that do not fit the photos.
    """
    if expected_batch_size < 1 or microbatch < 1:
        raise ValueError(
            f"expected_batch_size, microbatch must be >= 1, got {expected_batch_size}, {microbatch}"
        )
    release = _release(mechanism, rng)
    members = unit_members(photos, units)
    drawn = sample_photos(members, _rate(sampling_rate), rng)
    totals = clipped_unit_sum(
        module,
        loss,
        photos[drawn],
        clip_norm=mechanism.clip_norm,
        units=None if units is None else members[drawn],
        draw=draw,
        scales=scales,
        microbatch=microbatch,
    )
    # One draw of noise for all weights: a fresh one for each would cost more than the clipping.
    noised = release(torch.cat([total.flatten() for total in totals])) / expected_batch_size
    return [
        part.view_as(total)
        for part, total in zip(torch.split(noised, [total.numel() for total in totals]), totals, strict=True)
    ]


def private_sum(
    vectors: Tensor,
    *,
    mechanism: GaussianSum | ClippedSum,
    sampling_rate: float,
    rng: NoiseSource,
    units: Tensor | None = None,
) -> Tensor:
    """The noised sum of one clipped vector per unit, priced as PoissonSampled(sampling_rate, mechanism.event()).

    With rate 1 every coin lands heads and nothing is claimed from sampling: the plain Gaussian mechanism, Dwork
    & Roth (2014), Theorem A.1, in the exact form of Balle & Wang (2018), arXiv:1805.06530, Theorem 8.

    Guarantees:
        * One unit more or less moves the sum before noise by at most `mechanism.clip_norm`: the vectors of its
          photos that joined are summed, and their sum is clipped.
        * A unit with a number that is not finite adds nothing; noise is added once, also to an empty sum.

    Args:
        vectors: One vector per photo of the device, (n, d), n >= 0; row i depends on photo i alone.
        mechanism: `terms.mechanism()`: GaussianSum, or ClippedSum where the device promises nothing.
        sampling_rate: The public probability with which a unit joins, 0 < q <= 1.
        rng: SecretNoise; a replayable generator only together with ClippedSum.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps; None: each its own.

    Returns:
        Shape (d,), not divided by anything.

    Raises:
        PrivacyError: A promised sum was given replayable chance.
    """
    return private_sum_of(
        lambda positions: vectors[positions],
        vectors.shape[1],
        unit_members(vectors, units),
        mechanism=mechanism,
        sampling_rate=sampling_rate,
        rng=rng,
    )


def private_sum_of(
    rows: Callable[[Tensor], Tensor],
    width: int,
    units: Tensor,
    *,
    mechanism: GaussianSum | ClippedSum,
    sampling_rate: float,
    rng: NoiseSource,
) -> Tensor:
    """`private_sum` of vectors that are computed only for the photos that joined.

    Args:
        rows: Positions of photos, int64 (m,) -> their vectors (m, width); each depends on its photo alone.
        width: d.
        units: Which unit each photo belongs to, int64 (n,), numbered from 0 without gaps.
        mechanism: As for `private_sum`.
        sampling_rate: As for `private_sum`.
        rng: As for `private_sum`.

    Returns:
        Shape (d,), not divided by anything.
    """
    release = _release(mechanism, rng)
    drawn = sample_photos(units, _rate(sampling_rate), rng)
    if not len(drawn):
        return release(torch.zeros(width))
    numbers, place = torch.unique_consecutive(units[drawn], return_inverse=True)
    sums = torch.zeros(len(numbers), width).index_add_(0, place, rows(drawn))
    return release(clipped_sum([sums], mechanism.clip_norm)[0])


def _rate(sampling_rate: float) -> float:
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must lie in (0, 1], got {sampling_rate}")
    return sampling_rate


def _release(mechanism: GaussianSum | ClippedSum, rng: NoiseSource) -> Callable[[Tensor], Tensor]:
    """What turns one parameter's sum into what may be seen; refuses before anything is computed."""
    match mechanism:
        case GaussianSum():
            if not isinstance(rng, SecretNoise):
                raise PrivacyError("a promised step needs SecretNoise: replayable noise protects nobody")
            secret = rng
            return lambda total: mechanism.noise(total, secret)
        case ClippedSum():
            return lambda total: total
        case _:
            assert_never(mechanism)


def check_per_example_gradients(
    module: nn.Module,
    loss: PerExampleLoss,
    photos: Images,
    *,
    draw: Draw | None = None,
    engine: Engine | None = None,
) -> None:
    """Refuse a network on which clipping would not bound one photo's influence. Run it before the first step.

    Compares each photo's gradient with a backward pass on that photo alone, then changes one photo and looks
    whether another's gradient moves. Opacus's validator passes networks that fail here.

    Args:
        module: The network, as it will be trained.
        loss: One loss per photo.
        photos: At least two photos, or public stand-ins of the same shape; the first two are used.
        draw: Gives the loss's own random draws, as the steps will.
        engine: The engine that the steps will use.

    Raises:
        PrivacyError: Which parameter's gradient mixes photos or is wrong, and by how much.
        ValueError: Fewer than two photos.
    """
    if len(photos) < 2:
        raise ValueError(f"the check needs two photos, got {len(photos)}")
    faults = ModuleValidator.validate(module, strict=False)
    if faults:
        raise PrivacyError(f"this network mixes photos of a batch: {faults[0]}")
    # In float64: in float32 two right answers differ by 3e-4 when rounding puts one activation on the other
    # side of a leaky ReLU's kink, which happens in about one network and pair of a hundred.
    module = copy.deepcopy(module).double()
    pair = photos[:2].detach().double()
    draws = None if draw is None else draw(2).double()
    together = per_example_gradients(module, loss, pair, draws=draws, engine=engine)
    names = list(trainable_parameters(module))
    for photo in range(2):
        rows = (pair,) if draws is None else (pair, draws)
        alone = _ordinary_gradient(module, loss, tuple(part[photo : photo + 1] for part in rows))
        _compare(names, [g[photo] for g in together], alone, "is not the gradient of that photo alone")
    moved = torch.stack([pair[0], 1.0 - pair[1].flip(-1)])
    after = per_example_gradients(module, loss, moved, draws=draws, engine=engine)
    _compare(names, [g[0] for g in after], [g[0] for g in together], "moves when another photo changes")


def _ordinary_gradient(module: nn.Module, loss: PerExampleLoss, rows: tuple[Tensor, ...]) -> list[Tensor]:
    weights = list(trainable_parameters(module).values())
    gradients = torch.autograd.grad(loss(module, *rows).sum(), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _compare(names: list[str], ours: list[Tensor], theirs: list[Tensor], fault: str) -> None:
    """Compare two gradients to 1e-4 of the whole gradient's length."""
    scale = torch.stack([g.square().sum() for g in theirs]).sum().sqrt().clamp(min=1e-12)
    for name, one, other in zip(names, ours, theirs, strict=True):
        error = float((one - other).norm() / scale)
        if not error <= 1e-4:
            raise PrivacyError(f"the gradient of {name} for one photo {fault} (off by {error:.2g})")
