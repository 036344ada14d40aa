"""One round that leaves the generator as it is and refits the distribution that its latents are sampled from.

Each device estimates the latents of its photos with a public encoder and sends, once, the sum over its photos of a
count, the latents and their squares (or products), clipped and with Gaussian noise. The server refits the latent
prior N(mean, covariance) from the total: post-processing (Dwork and Roth 2014, Proposition 2.1), without privacy cost.
Sampling and latent search then start from the fitted prior.

An encoded latent e has L2 norm sqrt(z), so the norm of every part of a photo's vector is known in advance:

    v = clip_norm * (sqrt(a0), sqrt(a1) e / sqrt(z), sqrt(a2) (e^2 - 1) / R),   a0 + a1 + a2 = 1

with R = 1.5 sqrt(2 z), one and a half times the usual norm of e^2 - 1, to which the rare larger ones are clipped;
for products, the upper triangle of e e' - I (off the diagonal times sqrt 2) with its exact norm sqrt(z^2 - z).
So |v| <= clip_norm by construction, and clipping, on which the guarantee rests, changes nothing. Noise of the total
reaches the mean of e times sqrt(z / a1), the mean of e^2 times R / sqrt(a2), and the count, as a relative error,
times 1 / sqrt(a0). A sum of squared errors c_i / a_i is least at a_i proportional to sqrt(c_i): with an error of the
variance counting half (it is twice that of the standard deviation), first and second moments should have almost equal
shares, and the count, whose error only multiplies the size of the shift, a small one.

The count is noised because the number of photos is private as well. The squares are centred on the standard
prior: a device without photos, and noise that hides everything, leave the prior as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, assert_never

import torch
from torch import Tensor

from fedface.models.checkpoint import estimate_mean_style
from fedface.models.latent_encoder import LatentEncoder
from fedface.models.model import Architecture, EncoderArchitecture, Model
from fedface.models.stylegan2 import StyleGAN2
from fedface.privacy.plan import MAX_EXPECTED_BATCH_SIZE, DPParameters, Schedule
from fedface.randomness import Streams
from fedface.tensor_types import Latents, StoredImages, Vector, in_floats
from fedface.training.dp_sgd import SampledMechanism, private_sum
from fedface.training.training_round import Objective, PerExampleRelease, check_architecture, guaranteed_units
from fedface.training.unit_clipping import NoiseSource
from fedface.validation import In, checked

Second = Literal["none", "diagonal", "full"]

VARIANCES = (0.05, 4.0)  # of the fitted prior, in variances of the standard one
_MAX_RELATIVE_NORM = 1.5  # largest norm of e^2 - 1 that is not clipped, in its usual norms
_SAMPLES = 1024  # of the generator, from which the encoder's bias is estimated
_AT_ONCE = 128  # of them; photos are encoded one by one
_PASSES = 2  # steps of the prior towards the devices' moments


@dataclass(frozen=True, kw_only=True)
@checked
class PriorTrainingConfig:
    """How devices summarise their photos' latents; every number is public and the same on all devices."""

    kind: ClassVar[str] = "prior-training"
    objective: ClassVar[Objective] = "generator"

    second_moments: Second = "diagonal"  # none, one per coordinate of the latent, or all products
    expected_batch_size: int = 200  # public divisor of each device's sum, about the photos of a device, >= 1
    # For quantisation: larger sums are clamped
    max_photos: Annotated[int, In(f"[1, {MAX_EXPECTED_BATCH_SIZE}]")] = 2000
    clip_norm: float = 1.0  # L2 norm of one photo's vector, > 0; only its ratio to the noise matters
    # A0: share of the squared norm that counts the photo
    count_fraction: Annotated[float, In("(0, 1)")] = 0.05
    # A2 / (a1 + a2): share of second moments in the rest
    second_moment_fraction: Annotated[float, In("(0, 1)")] = 0.5

    def __post_init__(self) -> None:
        self.schedule()

    def schedule(self) -> Schedule:
        """One sum over every photo: nothing is gained from sampling."""
        return Schedule(
            rounds=1,
            steps_per_round=1,
            sampling_rate=1.0,
            expected_batch_size=self.expected_batch_size,
            clip_norm=self.clip_norm,
        )

    def describe_update(self) -> str:
        """What a device sends, in words that follow a number."""
        return "sums over photos (a count, and moments of latents)"

    def check(self, architecture: Architecture) -> None:
        """Raises ConfigError unless a model of this architecture can be trained this way."""
        check_architecture(architecture, EncoderArchitecture)

    def prepare(self, model: Model, dp: DPParameters, rng: torch.Generator) -> PriorRound:
        """A round; it changes no network, so that nothing is copied."""
        return PriorRound(model, self, dp)


@dataclass(frozen=True)
class PriorRound:
    """The one round of fitting a latent prior, see `TrainingRound`."""

    model: Model
    config: PriorTrainingConfig
    dp: DPParameters

    def update(
        self, photos: StoredImages, *, rng: NoiseSource, streams: Streams, units: Tensor | None = None
    ) -> Vector:
        """The noised sum of the photos' vectors over the public divisor, (1 + z + p,), see `photo_vectors`.

        Where noise is added to the sum over devices, the sum itself, float64: to divide it would round it before noise.

        Guarantees:
            * Photos enter only through `private_sum`, once, and each is encoded by itself: a row depends on its photo
              alone, to the last bit. In a batch the size decides which kernels run, whose roundings differ, and an
              encoder whose rows cancel would make that difference as large as a latent.
            * Without photos the result is noise alone.

        An occasion adds the sum of its photos' vectors, clipped to one photo's norm: it weighs as one photo.
        """
        encoder, schedule = self.model.network(LatentEncoder), self.dp.schedule
        config = replace(self.config, clip_norm=schedule.clip_norm)
        width = sum(_layout(encoder.latent_width, config).sizes)
        with torch.no_grad():
            # Each in memory of its own: kernels may depend on the alignment of what they read.
            rows = [
                photo_vectors(encoder(in_floats(photo).clone()), config) for photo in torch.split(photos, 1)
            ]
        total = private_sum(
            torch.cat(rows) if len(photos) else torch.zeros(0, width),
            SampledMechanism.of(self.dp, rng),
            units=guaranteed_units(self.dp, units),
        )
        return total if self.dp.sends_sums else total.float() / schedule.expected_batch_size

    def ranges(self) -> Vector:
        """Public bounds of what a device sends, for quantisation, shape (1 + z + p,), all > 0.

        The sums of `max_photos` photos whose mean latent lies within three units of the standard one, and whose
        mean squares and products within nine. What noise or more photos add beyond is clamped.
        """
        layout = _layout(self.model.network(LatentEncoder).latent_width, self.config)
        if self.dp.sends_sums:  # what is sent is then the sum itself
            return torch.ones(sum(layout.sizes))
        photos = self.config.max_photos / self.config.expected_batch_size
        bounds = torch.tensor([layout.count, 3.0 * layout.first, 9.0 * layout.squares], dtype=torch.float64)
        return (photos * bounds).float().repeat_interleave(torch.tensor(layout.sizes))

    def per_example_release(self, streams: Streams) -> PerExampleRelease:
        """The vector of a photo."""
        encoder = self.model.network(LatentEncoder)
        return lambda photos: photo_vectors(encoder(photos), self.config).mean(dim=0)

    def apply(self, total: Vector, devices: int, rng: torch.Generator) -> Model:
        """The generator with a refitted prior, and its mean style estimated anew."""
        encoder = self.model.network(LatentEncoder)
        divisor = self.dp.schedule.expected_batch_size if self.dp.sends_sums else 1
        generator = fit_latent_prior(
            self.model.network(StyleGAN2), total / divisor, devices, self.config, self.dp, encoder=encoder
        )
        estimate_mean_style(generator, rng)
        architecture = EncoderArchitecture(generator=generator.config, encoder=encoder.config)
        return Model(architecture, {"generator": generator, "encoder": encoder}, self.model.notes)


@dataclass(frozen=True)
class _Layout:
    """The factor and the width of each part of a photo's vector."""

    width: int
    second: Second
    count: float
    first: float
    squares: float  # 0 where there are none

    @property
    def pairs(self) -> int:
        match self.second:
            case "none":
                return 0
            case "diagonal":
                return self.width
            case "full":
                return self.width * (self.width + 1) // 2
            case _:
                assert_never(self.second)

    @property
    def sizes(self) -> list[int]:
        return [1, self.width, self.pairs]


def _layout(width: int, config: PriorTrainingConfig) -> _Layout:
    moments = 1.0 - config.count_fraction
    seconds = 0.0 if config.second_moments == "none" else moments * config.second_moment_fraction
    length = (
        math.sqrt(width * width - width)
        if config.second_moments == "full"
        else _MAX_RELATIVE_NORM * math.sqrt(2.0 * width)
    )
    return _Layout(
        width=width,
        second=config.second_moments,
        count=config.clip_norm * math.sqrt(config.count_fraction),
        first=config.clip_norm * math.sqrt((moments - seconds) / width),
        squares=config.clip_norm * math.sqrt(seconds) / max(length, 1.0),
    )


def photo_vectors(latents: Latents, config: PriorTrainingConfig) -> Tensor:
    """What each photo adds to the sum, before clipping.

    Args:
        latents: (n, z), of L2 norm sqrt(z) each, as an encoder estimates them.
        config: Public hyperparameters.

    Returns:
        (n, 1 + z + p) with p = 0, z or z (z + 1) / 2 by `config.second_moments`; each row's norm is at most
        `config.clip_norm`, up to float32 rounding.
    """
    layout = _layout(latents.shape[1], config)
    ones = torch.ones(len(latents), 1)
    parts = [ones * layout.count, latents * layout.first]
    match config.second_moments:
        case "none":
            pass
        case "diagonal":
            squares = latents.square() - 1.0
            max_norm = _MAX_RELATIVE_NORM * math.sqrt(2.0 * layout.width)
            scale = (max_norm / squares.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
            parts.append(squares * scale * layout.squares)
        case "full":
            products = latents[:, :, None] * latents[:, None, :] - torch.eye(layout.width)
            parts.append(_packed(products) * layout.squares)
        case _:
            assert_never(config.second_moments)
    return torch.cat(parts, dim=1)


def _packed(matrices: Tensor) -> Tensor:
    """Symmetric (n, z, z) -> (n, z (z + 1) / 2) of the same norm: off the diagonal times sqrt 2."""
    width = matrices.shape[-1]
    rows, columns = torch.triu_indices(width, width)
    weight = torch.where(rows == columns, 1.0, math.sqrt(2.0))
    return matrices[:, rows, columns] * weight


def _unpacked(packed: Vector, width: int) -> Tensor:
    """The inverse of `_packed` for one matrix."""
    rows, columns = torch.triu_indices(width, width)
    values = packed / torch.where(rows == columns, 1.0, math.sqrt(2.0)).to(packed)
    matrix = packed.new_zeros(width, width)
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def fit_latent_prior(
    generator: StyleGAN2,
    total: Vector,
    devices: int,
    config: PriorTrainingConfig,
    dp: DPParameters,
    *,
    encoder: LatentEncoder | None = None,
) -> StyleGAN2:
    """A copy of the generator with the latent prior estimated from the devices' photos.

    An encoder is biased. So the prior is moved until the encoder estimates the same moments from the generator's own
    samples as the devices did from their photos (indirect inference, Gourieroux, Monfort and Renault 1993). Each step
    is shrunk by its known error, from the noise that was added and from the finite number of photos: x becomes
    x * max(0, 1 - threshold * variance / x^2), the non-negative garrote (Breiman 1995; Gao 1998 for its threshold).
    For products the eigenvalues of their matrix are shrunk instead, against the largest that noise alone has.

    Guarantees:
        * Without noise, with many photos and without an encoder, the moments are those of the latents sent.
        * Where the count is indistinguishable from noise (below three standard deviations) the prior stays standard.
        * Variances lie within `VARIANCES`. Deterministic: equal totals give equal priors.

    Args:
        generator: Not changed; a prior that was fitted before is replaced in the copy.
        total: The photos' sums over the public divisor, over all devices, (1 + z + p,); ValueError for another length.
        devices: How many devices are in the sum, >= 1.
        config: As on the devices.
        dp: As on the devices; it determines the noise in the sum.
        encoder: The one the devices used; None if they sent moments of the latents themselves.
    """
    config = replace(config, clip_norm=dp.schedule.clip_norm)
    layout = _layout(generator.latent_width, config)
    target = _estimate_moments(total, devices, layout, dp, 0.0 if encoder is None else 1.0 / _SAMPLES)
    fitted = StyleGAN2(replace(generator.config, prior="fitted"), torch.Generator())
    missing = fitted.load_state_dict(generator.state_dict(), strict=False).missing_keys
    if unknown := [name for name in missing if not name.startswith("mapping.prior_")]:
        raise ValueError(f"the generator lacks {unknown[0]}")
    _set_prior(fitted, *_standard(layout.width))
    if target is None:
        return fitted
    mean, covariance = _standard(layout.width)
    for _ in range(1 if encoder is None else _PASSES):
        current = (mean, covariance)
        if encoder is not None:
            _set_prior(fitted, mean, covariance)
            encoded = photo_vectors(_encode_samples(fitted, encoder), config)
            current = _moments(encoded.double().mean(0), layout)
        mean = mean + _shrunk(target.mean - current[0], target.mean_error, _threshold(layout.width))
        covariance = _moved(covariance, target, current[1], layout)
    _set_prior(fitted, mean, covariance)
    return fitted


@dataclass(frozen=True)
class _Moments:
    """The estimated moments of the latents of the devices' photos, and the variance of each number's error."""

    mean: Tensor  # (z,)
    mean_error: float
    covariance: Tensor  # (z, z)
    covariance_error: float


def _standard(width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)


def _set_prior(generator: StyleGAN2, mean: Tensor, covariance: Tensor) -> None:
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    generator.mapping.prior_mean.copy_(mean)
    generator.mapping.prior_root.copy_(root)


def _estimate_moments(
    total: Vector, devices: int, layout: _Layout, dp: DPParameters, extra_variance: float
) -> _Moments | None:
    """The moments of the photos' latents; None where the count is lost in the noise.

    `extra_variance` is that of the moments they will be compared with, in variances of one latent coordinate.
    """
    if total.shape != (sum(layout.sizes),):
        raise ValueError(f"these moments are {sum(layout.sizes)} numbers, got shape {tuple(total.shape)}")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    sums = total.double() * dp.schedule.expected_batch_size
    noise = dp.noise_multiplier * dp.schedule.clip_norm * math.sqrt(dp.noises_in_sum(devices))
    photos = float(sums[0]) / layout.count
    if not photos > max(1.0, 3.0 * noise / layout.count):
        return None
    mean, covariance = _moments(sums / photos, layout)
    sampling = 1.0 / photos + extra_variance
    mean_error = (noise / (layout.first * photos)) ** 2 + sampling
    if layout.second == "none":
        return _Moments(mean, mean_error, covariance, 0.0)
    error = (noise / (layout.squares * photos)) ** 2
    if layout.second == "diagonal":
        return _Moments(mean, mean_error, covariance, error + 2.0 * sampling)
    # Each of the two equal entries off the diagonal carries 1 / sqrt 2 of the packed noise.
    return _Moments(mean, mean_error, covariance, error / 2.0 + sampling)


def _moments(vector: Vector, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Mean (z,) and covariance (z, z) from the mean of photos' vectors; what was not sent is standard."""
    _, first, second = torch.split(vector, layout.sizes)
    mean = first / layout.first
    identity = torch.eye(layout.width, dtype=vector.dtype)
    match layout.second:
        case "none":
            return mean, identity
        case "diagonal":
            return mean, identity + torch.diag(second / layout.squares - mean.square())
        case "full":
            excess = _unpacked(second, layout.width) / layout.squares
            return mean, identity + excess - torch.outer(mean, mean)
        case _:
            assert_never(layout.second)


def _moved(covariance: Tensor, target: _Moments, current: Tensor, layout: _Layout) -> Tensor:
    """One shrunk step of the prior's covariance towards the target, within `VARIANCES`."""
    difference = target.covariance - current
    match layout.second:
        case "none":
            return covariance
        case "diagonal":
            step = _shrunk(difference.diagonal(), target.covariance_error, _threshold(layout.width))
            return torch.diag((covariance.diagonal() + step).clamp(*VARIANCES))
        case "full":
            values, vectors = torch.linalg.eigh(difference)
            # The largest eigenvalue of noise of width z is about twice an entry's deviation times sqrt z.
            step = _shrunk(values, target.covariance_error, 4.0 * layout.width)
            values, vectors = torch.linalg.eigh(covariance + (vectors * step) @ vectors.T)
            bounded: Tensor = (vectors * values.clamp(*VARIANCES)) @ vectors.T
            return bounded
        case _:
            assert_never(layout.second)


def _encode_samples(generator: StyleGAN2, encoder: LatentEncoder) -> Latents:
    """An encoder's estimates for a generator's own samples; the same latents each time, and their negatives."""
    half = torch.randn(_SAMPLES // 2, generator.latent_width, generator=Streams(0).generator("refit"))
    latents = torch.cat([half, -half])
    with torch.no_grad():
        parts = [
            encoder(generator.synthesize(generator.map(part)).clamp(0.0, 1.0))
            for part in torch.split(latents, _AT_ONCE)
        ]
    return torch.cat(parts)


def _threshold(width: int) -> float:
    """The universal threshold, squared: none of `width` normal numbers is likely to exceed it."""
    return 2.0 * math.log(max(width, 2))


def _shrunk(x: Tensor, error: float, threshold: float) -> Tensor:
    """x * max(0, 1 - threshold * error / x^2)."""
    return x * (1.0 - threshold * error / x.square().clamp(min=1e-30)).clamp(min=0.0)
