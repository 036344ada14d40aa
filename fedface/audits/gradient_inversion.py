"""Gradient inversion: how much of a photo an attacker recovers from one device's update.

The threat model is the worst case of a server that sees single updates: the attacker knows the network and one
update. Two searches: cosine distance with total variation and signed Adam (Geiping et al. 2020, arXiv:2003.14053,
section 4), and L-BFGS on the squared distance (Zhu et al. 2019, arXiv:1906.08935); each is compared with guessing
without any update. Candidate identification asks which of N known photos was in the update and detects leakage
where inversion shows only noise; its upper bound is reconstruction robustness (Hayes et al. 2023, arXiv:2302.07225).

A failed attack proves nothing about the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, assert_never

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from fedface.audits.group_metrics import mean_interval
from fedface.measurements import Interval, rate_interval
from fedface.privacy.accounting import reconstruction_success_bound
from fedface.privacy.clip_and_noise import clip_l2
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.tensor_types import Images, Vector
from fedface.validation import NonNegativeFloat, PositiveFloat, PositiveInt, checked

GradientOf = Callable[[Images], Vector]

# Published step sizes and weights assume images normalised to about zero mean and unit variance, so the
# search moves in units of a quarter of the pixel range: image = 1/2 + search / 4.
CENTRE, UNIT = 0.5, 0.25
FULL_ITERATIONS = 300  # of a search; with fewer, finding nothing is not evidence
_NUMBERS_AT_ONCE = 100_000_000  # of updates in memory
PSNR_CEILING = 100.0  # dB; equal images have no finite PSNR


@dataclass(frozen=True, kw_only=True)
@checked
class CosineSearch:
    """Cosine distance plus total variation, signed Adam with step decay, inside the box of real images."""

    kind: ClassVar[str] = "cosine-search"

    iterations: PositiveInt = 200
    step: PositiveFloat = 0.1  # in units of a quarter of the pixel range
    total_variation: NonNegativeFloat = 1e-2


@dataclass(frozen=True, kw_only=True)
@checked
class SquaredSearch:
    """Squared distance of gradients, L-BFGS with a strong Wolfe line search."""

    kind: ClassVar[str] = "squared-search"

    evaluations: PositiveInt = 200  # of the gradient, at most about this many


Search = CosineSearch | SquaredSearch


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """The result of a search."""

    images: Images  # (n, 3, h, w), inside [0, 1]
    distance: float  # between its gradient and the target, in the search's own measure, without variation


@dataclass(frozen=True, kw_only=True)
class NoDefense:
    """The gradient is released unchanged."""

    kind: ClassVar[str] = "no-defense"


Defense = NoDefense | ClippedSum | GaussianSum

THREAT_MODEL = (
    "The attacker sees one device's update and knows the network: a server without secure aggregation."
)
NOT_TESTED = (
    "a face generator as the attacker's prior",
    "several updates of one device combined",
    "a server that modifies the network to increase leakage",
)


@dataclass(frozen=True, kw_only=True)
class AttackScores:
    """How close an inversion attack came to the photos, each in an update of its own, beside a guess without them."""

    defense: Defense
    search: Search  # the one with the best mean PSNR, chosen in the attacker's favour
    psnr: Interval  # dB
    ssim: Interval
    baseline_psnr: Interval  # of the mean public face
    baseline_ssim: Interval
    gain: Interval  # dB: recovered minus guess, photo by photo

    @property
    def shortened(self) -> str:
        """Why the failure of this attack would prove nothing; empty for one of full length."""
        done = self.search.iterations if isinstance(self.search, CosineSearch) else self.search.evaluations
        if done >= FULL_ITERATIONS:
            return ""
        return (
            f"Gradient inversion was shortened to {done} of {FULL_ITERATIONS} iterations: what it did not recover is "
            "not evidence that an update is safe."
        )


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """The scores of an inversion attack, and its images."""

    scores: AttackScores
    truth: Images
    recovered: Images
    guess: Images  # the mean public face, once per photo


@dataclass(frozen=True, kw_only=True)
class CandidateIdentification:
    """How often an attacker names the photo in an update among N candidates."""

    rate: Interval  # share of trials in which the right one was named
    candidates: int  # N; guessing succeeds with probability 1 / N
    bound: float  # on the success of any attack, from the mechanism's privacy loss; 1 without noise


def apply_defense(gradient: Vector, defense: Defense, generator: torch.Generator) -> Vector:
    """What leaves the device for one photo, shape (d,), before the division by a public constant.

    The noise has the mechanism's distribution but can be replayed: this is an audit and protects nothing.
    """
    match defense:
        case NoDefense():
            return gradient
        case ClippedSum(clip_norm=clip_norm):
            return clip_l2(gradient, clip_norm)
        case GaussianSum(clip_norm=clip_norm, sigma=sigma):
            noise = torch.randn(gradient.shape, generator=generator)
            return clip_l2(gradient, clip_norm) + sigma * clip_norm * noise
        case _:
            assert_never(defense)


def invert(
    gradient_of: GradientOf,
    target: Vector,
    shape: tuple[int, int, int, int],
    search: Search,
    generator: torch.Generator,
) -> Inversion:
    """Search for images whose gradient is the target.

    Args:
        gradient_of: Images (n, 3, h, w) in [0, 1] -> gradient (d,), differentiable in the images.
        target: The released gradient, shape (d,).
        shape: (n, 3, h, w) of the images to find; the attacker is granted the number of photos.
        generator: Where the search starts.
    """
    target = target.detach()
    start = torch.randn(shape, generator=generator)
    match search:
        case CosineSearch():
            return _by_cosine(gradient_of, target, start, search)
        case SquaredSearch():
            return _by_squares(gradient_of, target, start, search)
        case _:
            assert_never(search)


def attack_update(
    gradient_of: GradientOf,
    photos: Images,
    defense: Defense,
    public_faces: Images,
    *,
    searches: Sequence[Search] = (CosineSearch(),),
    generator: torch.Generator,
) -> AttackResult:
    """Invert the update on each photo alone, and compare with guessing.

    Args:
        gradient_of: What one photo would release before clipping and noise, see `TrainingRound.per_example_release`.
        photos: (n, 3, s, s) in [0, 1]; four to eight give an interval worth printing. One update each.
        public_faces: (m, 3, s, s), public; their mean is the guess without the update.
        searches: All are run; the one with the best mean PSNR is reported.

    Raises:
        ValueError: Fewer than two photos, which have no interval, or no search.
    """
    if len(photos) < 2:
        raise ValueError(f"photos must be at least 2 to have an interval, got {len(photos)}")
    if not searches:
        raise ValueError("searches must name at least one search, got none")
    truth = photos.detach().clamp(0.0, 1.0)
    guess = public_faces.detach().clamp(0.0, 1.0).mean(dim=0, keepdim=True).expand_as(truth).clone()
    release = _as_attacker_sees(gradient_of, defense)
    shape = (1, int(truth.shape[1]), int(truth.shape[2]), int(truth.shape[3]))
    found: list[list[Images]] = [[] for _ in searches]
    for photo in truth:
        update = apply_defense(gradient_of(photo[None]).detach(), defense, generator)
        for search, images in zip(searches, found, strict=True):
            images.append(invert(release, update, shape, search, generator).images)
    scored = []
    for search, images in zip(searches, found, strict=True):
        recovered = torch.cat(images)
        scored.append((float(psnr(recovered, truth).mean()), search, recovered))
    _, search, recovered = max(scored, key=lambda entry: entry[0])
    rng = np.random.Generator(np.random.PCG64(int(torch.randint(2**62, (1,), generator=generator))))

    def mean(scores: Tensor) -> Interval:
        return mean_interval(scores.numpy(), rng)

    scores, guesses = psnr(recovered, truth), psnr(guess, truth)
    return AttackResult(
        scores=AttackScores(
            defense=defense,
            search=search,
            psnr=mean(scores),
            ssim=mean(ssim(recovered, truth)),
            baseline_psnr=mean(guesses),
            baseline_ssim=mean(ssim(guess, truth)),
            gain=mean(scores - guesses),
        ),
        truth=truth,
        recovered=recovered,
        guess=guess,
    )


def candidate_identification(
    gradient_of: GradientOf, candidates: Images, defense: Defense, *, trials: int, generator: torch.Generator
) -> CandidateIdentification:
    """How often an attacker names the photo that was in an update, among N candidates.

    Each trial puts one uniformly sampled candidate into an update of its own; the attacker, who knows all
    candidates, names the one whose gradient, clipped as the device clips, lies nearest: the maximum-likelihood
    choice under Gaussian noise.

    Returns:
        The share of trials that named the right one, with Wilson's 95 % interval over trials.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    release = _as_attacker_sees(gradient_of, defense)

    def gradient(number: int) -> Vector:
        return release(candidates[number : number + 1]).detach()

    width, right = len(gradient(0)), 0
    at_once = max(1, _NUMBERS_AT_ONCE // width)
    # Gradients are computed anew rather than stored: those of all candidates may not fit in memory.
    for first in range(0, trials, at_once):
        members, sent = [], torch.empty(min(at_once, trials - first), width)
        for update in sent:
            members.append(int(torch.randint(len(candidates), (1,), generator=generator)))
            # Clipping twice is clipping once.
            update.copy_(apply_defense(gradient(members[-1]), defense, generator))
        distances = torch.stack(
            [g.square().sum() - 2.0 * sent @ g for g in map(gradient, range(len(candidates)))]
        )
        right += int((distances.argmin(dim=0) == torch.tensor(members)).sum())
    bound = 1.0
    if isinstance(defense, GaussianSum):
        bound = reconstruction_success_bound(defense.event(), 1 / len(candidates))
    return CandidateIdentification(rate=rate_interval(right, trials), candidates=len(candidates), bound=bound)


def psnr(images: Images, truth: Images) -> Tensor:
    """Peak signal to noise ratio per image in dB, shape (n,), of images clamped to [0, 1]; at most 100."""
    error = (images.clamp(0.0, 1.0) - truth.clamp(0.0, 1.0)).square().flatten(1).mean(dim=1)
    return (-10.0 * error.log10()).clamp(max=PSNR_CEILING)


def ssim(images: Images, truth: Images) -> Tensor:
    """Structural similarity per image, shape (n,), at most 1; Gaussian window, sigma 1.5 (Wang et al. 2004).

    Raises:
        ValueError: Images smaller than the window of 11 pixels.
    """
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"images must be at least 11 pixels wide and high, got {tuple(images.shape[-2:])}")
    measure: Callable[..., float] = structural_similarity
    pairs = zip(images.clamp(0.0, 1.0), truth.clamp(0.0, 1.0), strict=True)
    scores = [
        measure(
            image.numpy(),
            true.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image, true in pairs
    ]
    return torch.tensor(scores, dtype=torch.float32)


def _as_attacker_sees(gradient_of: GradientOf, defense: Defense) -> GradientOf:
    """The gradient that a candidate photo would release, noise apart: the attacker knows the clip norm."""
    match defense:
        case NoDefense():
            return gradient_of
        case ClippedSum(clip_norm=clip_norm) | GaussianSum(clip_norm=clip_norm):
            return lambda images: clip_l2(gradient_of(images), clip_norm)
        case _:
            assert_never(defense)


def _by_cosine(gradient_of: GradientOf, target: Vector, start: Tensor, search: CosineSearch) -> Inversion:
    x = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=search.step)
    decay = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, [search.iterations * eighths // 8 for eighths in (3, 5, 7)], gamma=0.1
    )
    low, high = -CENTRE / UNIT, (1.0 - CENTRE) / UNIT
    best, least, distance = start, math.inf, math.inf
    for _ in range(search.iterations):
        gap = 1.0 - torch.nn.functional.cosine_similarity(gradient_of(CENTRE + UNIT * x), target, dim=0)
        loss = gap + search.total_variation * _total_variation(x)
        if loss.item() < least:
            best, least, distance = x.detach().clone(), loss.item(), gap.item()
        (slope,) = torch.autograd.grad(loss, [x])
        x.grad = slope.sign()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return Inversion(images=_image(best), distance=distance)


def _by_squares(gradient_of: GradientOf, target: Vector, start: Tensor, search: SquaredSearch) -> Inversion:
    # A start of full contrast saturates small networks; half of it does not.
    x = (0.5 * start).requires_grad_(True)
    scale = target.square().sum().clamp(min=1e-24)
    optimiser = torch.optim.LBFGS(
        [x],
        lr=1.0,
        max_iter=search.evaluations,
        max_eval=search.evaluations,
        history_size=100,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    best, least = start, math.inf

    def closure() -> Tensor:
        nonlocal best, least
        loss = (gradient_of(CENTRE + UNIT * x) - target).square().sum() / scale
        if loss.item() < least:
            best, least = x.detach().clone(), loss.item()
        (x.grad,) = torch.autograd.grad(loss, [x])
        return loss.detach()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return Inversion(images=_image(best), distance=least)


def _image(x: Tensor) -> Images:
    return (CENTRE + UNIT * x).clamp(0.0, 1.0)


def _total_variation(x: Tensor) -> Tensor:
    across = (x[:, :, :, :-1] - x[:, :, :, 1:]).abs().mean()
    down = (x[:, :, :-1, :] - x[:, :, 1:, :]).abs().mean()
    return across + down
