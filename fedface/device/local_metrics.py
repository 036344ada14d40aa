"""The metrics that a device computes of a model on its own photos.

Each photo is degraded, upsampled by the model under evaluation, and compared with itself; audits/dp_metrics.py turns
that into a vector of bounded L2 norm. A unit's photos are averaged, units are summed and noised, per library by the
server (Gaussian mechanism over Poisson-sampled units: Balle and Wang 2018, arXiv:1805.06530, Theorem 8, and the sampled
form that the ledger prices).

Every photo is evaluated by itself, with the same public start of a search: kernels round differently for batches of
different sizes, and one photo more would shift the starts of the others. A photo on which a network fails adds nothing,
and each takes the same steps: errors and timing must not leak unaccounted information.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedface.audits.dp_metrics import (
    LocalMetricsConfig,
    average_within_unit,
    measure_photos,
    metric_vectors,
)
from fedface.errors import ConfigError
from fedface.messages.messages import EvaluationRequest
from fedface.models.model import Model
from fedface.photos.detectors import NetworkDetector
from fedface.photos.device_dataset import DeviceDataset
from fedface.randomness import Streams
from fedface.tensor_types import Images, Vector, in_floats
from fedface.training.dp_sgd import SampledMechanism, private_sum_of
from fedface.training.unit_clipping import NoiseSource
from fedface.upsampling.flow_posterior import GuidedFlowConfig
from fedface.upsampling.methods import (
    Method,
    PulseEncoderInitConfig,
    check_method,
    evaluation_count,
    make_upsampler,
    with_workers,
)
from fedface.upsampling.pulse import PulseConfig

log = logging.getLogger("fedface.device")

MAX_EVALUATIONS = 2_000  # of a network for one face
MAX_LINEAR_SIZE = 3_072  # numbers of a small photo of which a square matrix is made, 32 px a side
MAX_SAMPLES = 1_000_000  # latents that the distribution of styles is read from
DETECTION_SIDE = 96  # pixels at which a detector gets a generated face: smaller ones are enlarged


def check_request(question: EvaluationRequest, model: Model) -> None:
    """Refuse what no device should begin with; reads no photo.

    Raises:
        ConfigError: The terms are not those of figures, the downscale adds noise, or it keeps a device busy for days.
    """
    terms = question.dp
    if terms.schedule.steps_per_round != 1:
        raise ConfigError(
            f"figures are one release a question, got {terms.schedule.steps_per_round} steps a round"
        )
    if question.downscale.noise_std > 0:
        raise ConfigError(
            "the downscale of a question must add no noise: figures of one photo must be its own"
        )
    # A stranger's question must not keep a device busy for days, nor fill its memory before a photo is looked at.
    if (asked := evaluation_count(question.method)) > MAX_EVALUATIONS:
        raise ConfigError(
            f"a question may run a network {MAX_EVALUATIONS:,} times for a face, asked for {asked:,}"
        )
    match question.method:
        case GuidedFlowConfig(covariance="isotropic"):
            measured = 3 * question.downscale.low_side(model.size) ** 2
            if measured > MAX_LINEAR_SIZE:
                raise ConfigError(
                    f"guidance with covariance isotropic takes apart a matrix of {measured:,} rows; a question may ask "
                    f"for {MAX_LINEAR_SIZE:,}"
                )
        case (
            PulseConfig(mapping_samples=samples)
            | PulseEncoderInitConfig(pulse=PulseConfig(mapping_samples=samples))
        ):
            if samples > MAX_SAMPLES:
                raise ConfigError(f"a question may draw {MAX_SAMPLES:,} latents, asked for {samples:,}")
        case _:
            pass
    check_method(question.method, model, question.downscale, size=model.size)
    # Once on a grey picture: what fails there fails before anything is booked, and says nothing of a photo.
    try:
        _answerer(model, question, seed=0)(torch.full((1, 3, model.size, model.size), 0.5))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ConfigError(
            f"this question cannot be answered, not even about a grey picture: {error}"
        ) from error


def compute_local_metrics(
    model: Model, mine: DeviceDataset, question: EvaluationRequest, *, seed: int, rng: NoiseSource
) -> Vector:
    """The sum over this device's units, noised where its steps add the noise, shape (d,).

    Per library it is the mean over the photos that were drawn, 16 at most: cut and noised as one vector, see device.py.

    Args:
        model: The model under question.
        mine: The photos that are asked.
        question: What is asked.
        seed: Of the searches, public and the same for every photo.
        rng: SecretNoise where something is promised.

    Raises:
        ConfigError: The method does not go with the model.
    """
    terms, config = question.dp, question.metrics
    answer = _answerer(model, question, seed)
    units = mine.units(terms.unit)

    def rows(positions: Tensor) -> Tensor:
        parts = [
            _answered(answer, in_floats(mine.images[i : i + 1]).clone(), config) for i in positions.tolist()
        ]
        return average_within_unit(torch.cat(parts), units[positions])

    return private_sum_of(rows, config.width, units, SampledMechanism.of(terms, rng))


Answerer = Callable[[Images], Tensor]  # one photo (1, 3, s, s) -> its vector (1, d)


def _answerer(model: Model, question: EvaluationRequest, seed: int) -> Answerer:
    """What turns a photo into its vector; how long it takes is decided by the question, not by the photo."""
    method = _to_the_end(with_workers(question.method, 1))
    streams = Streams(seed).child("figures")
    upsampler = make_upsampler(method, model, question.downscale, streams, size=model.size)
    detector = NetworkDetector()

    def answer(photo: Images) -> Tensor:
        low = question.downscale.apply(photo).clamp(0.0, 1.0)
        found = upsampler.upsample(low, faces_per_photo=1)
        made = found.images[:, 0]
        seen = torch.tensor([bool(detector.find(_as_picture(made[0])))])
        measured = measure_photos(photo, made, found.consistency_error[:, 0], seen, question.metrics)
        return metric_vectors(measured, question.metrics, clip_norm=question.dp.schedule.clip_norm)

    return answer


def _answered(answer: Answerer, photo: Images, config: LocalMetricsConfig) -> Tensor:
    """One photo's vector, (1, d); zeros where a network broke on it, since an error would be an answer of its own."""
    try:
        return answer(photo)
    except Exception:
        log.exception("a photo could not be scored; it adds nothing")
        return torch.zeros(1, config.width)


def _to_the_end(method: Method) -> Method:
    """A search that takes all its steps: when a face fits depends on the photo, and the server sees the time."""
    match method:
        case PulseConfig():
            return replace(method, stop="end")
        case PulseEncoderInitConfig(pulse=pulse):
            return replace(method, pulse=replace(pulse, stop="end"))
        case _:
            return method


def _as_picture(face: Tensor) -> np.ndarray:
    """A generated face (3, s, s) as a detector expects it: uint8 (side, side, 3), enlarged where it is small."""
    side = max(DETECTION_SIDE, face.shape[-1])
    large = functional.interpolate(face[None].nan_to_num(0.0), size=side, mode="bicubic", antialias=True)[0]
    pixels: np.ndarray = (
        (large.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    )
    return pixels
