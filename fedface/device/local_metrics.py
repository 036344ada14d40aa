"""The metrics that a device computes of a model on its own photos.

Each photo is degraded, upsampled by the model under evaluation, and compared with itself; audits/dp_metrics.py turns
that into a vector of bounded L2 norm. A unit's photos are averaged, units are summed and noised, per library by the
server (Gaussian mechanism over Poisson-sampled units: Balle and Wang 2018, arXiv:1805.06530, Theorem 8, and the sampled
form that the ledger prices).

Every photo is evaluated separately, with the same public starting point of a search: kernels round differently for
batches of different sizes, and an additional photo would shift the starting points of the others. A photo on which a
network fails contributes zeros, and all take the same number of steps: errors and timing must not leak unaccounted
information.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedface.audits.dp_metrics import LocalMetricsConfig, average_within_unit, measure_photos, metric_vectors
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

MAX_EVALUATIONS = 2_000  # network evaluations for one face
MAX_LINEAR_SIZE = 3_072  # values of a low-resolution photo, the side of a square matrix; 32 x 32 px
MAX_SAMPLES = 1_000_000  # latents from which the distribution of styles is estimated
DETECTION_SIDE = 96  # px; smaller generated faces are enlarged for the detector


def check_request(request: EvaluationRequest, model: Model) -> None:
    """Check a request before any photo is read.

    Raises:
        ConfigError: The DP parameters are not those of metrics, the downscale adds noise, or the request is too
            expensive.
    """
    terms = request.dp
    if terms.schedule.steps_per_round != 1:
        raise ConfigError(f"metrics need 1 step per round, got {terms.schedule.steps_per_round}")
    if request.downscale.noise_std > 0:
        raise ConfigError(
            "the downscale of an evaluation must not add noise, which one photo's metrics would not depend on alone"
        )
    # An untrusted request must not occupy a device for days, nor exhaust its memory.
    if (evaluations := evaluation_count(request.method)) > MAX_EVALUATIONS:
        raise ConfigError(
            f"at most {MAX_EVALUATIONS:,} network evaluations per face are allowed, got {evaluations:,}"
        )
    match request.method:
        case GuidedFlowConfig(covariance="isotropic"):
            measured = 3 * request.downscale.low_side(model.size) ** 2
            if measured > MAX_LINEAR_SIZE:
                raise ConfigError(
                    f"guided-flow with covariance isotropic factorises a matrix of {measured:,} rows; at most "
                    f"{MAX_LINEAR_SIZE:,} are allowed"
                )
        case (
            PulseConfig(mapping_samples=samples)
            | PulseEncoderInitConfig(pulse=PulseConfig(mapping_samples=samples))
        ):
            if samples > MAX_SAMPLES:
                raise ConfigError(f"at most {MAX_SAMPLES:,} mapping_samples are allowed, got {samples:,}")
        case _:
            pass
    check_method(request.method, model, request.downscale, size=model.size)
    # A test on a grey image: an error here occurs before anything is recorded and reveals nothing about a photo.
    try:
        _metric_function(model, request, seed=0)(torch.full((1, 3, model.size, model.size), 0.5))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ConfigError(f"this evaluation fails already on a grey image: {error}") from error


def compute_local_metrics(
    model: Model,
    mine: DeviceDataset,
    request: EvaluationRequest,
    *,
    seed: int,
    rng: NoiseSource,
    skip_failures: bool = True,
) -> Vector:
    """The sum over this device's units, with noise if the device adds it, shape (d,).

    With the unit library it is the mean over at most 16 sampled photos, clipped and noised as one vector.

    Args:
        model: The model under request.
        mine: The photos to evaluate it on.
        request: The request.
        seed: Public seed of the searches, the same for every photo.
        rng: SecretNoise under a privacy guarantee.
        skip_failures: Whether a photo on which a network fails contributes zeros; if not, it raises.

    Raises:
        ConfigError: The method does not support the model.
    """
    terms, config = request.dp, request.metrics
    measure = _metric_function(model, request, seed)
    units = mine.units(terms.unit)

    def rows(positions: Tensor) -> Tensor:
        parts = [
            _measured(measure, in_floats(mine.images[i : i + 1]).clone(), config, skip_failures)
            for i in positions.tolist()
        ]
        return average_within_unit(torch.cat(parts), units[positions])

    return private_sum_of(rows, config.width, units, SampledMechanism.of(terms, rng))


MetricFunction = Callable[[Images], Tensor]  # one photo (1, 3, s, s) -> its vector (1, d)


def _metric_function(model: Model, request: EvaluationRequest, seed: int) -> MetricFunction:
    """A function from a photo to its vector; its running time depends on the request, not on the photo."""
    method = _to_the_end(with_workers(request.method, 1))
    streams = Streams(seed).child("metrics")
    upsampler = make_upsampler(method, model, request.downscale, streams, size=model.size)
    detector = NetworkDetector()

    def measure(photo: Images) -> Tensor:
        low = request.downscale.apply(photo).clamp(0.0, 1.0)
        found = upsampler.upsample(low, faces_per_photo=1)
        generated = found.images[:, 0]
        seen = torch.tensor([bool(detector.find(_as_picture(generated[0])))])
        measured = measure_photos(photo, generated, found.consistency_error[:, 0], seen, request.metrics)
        return metric_vectors(measured, request.metrics, clip_norm=request.dp.schedule.clip_norm)

    return measure


def _measured(
    measure: MetricFunction, photo: Images, config: LocalMetricsConfig, skip_failures: bool
) -> Tensor:
    """One photo's vector, (1, d); zeros if a network failed on it, because an error would reveal information."""
    try:
        return measure(photo)
    except Exception:
        if not skip_failures:
            raise
        log.exception("a photo could not be evaluated; it contributes zeros")
        return torch.zeros(1, config.width)


def _to_the_end(method: Method) -> Method:
    """The method without early stopping: the step at which a face fits depends on the photo, and the server sees the
    time."""
    match method:
        case PulseConfig():
            return replace(method, stop="end")
        case PulseEncoderInitConfig(pulse=pulse):
            return replace(method, pulse=replace(pulse, stop="end"))
        case _:
            return method


def _as_picture(face: Tensor) -> np.ndarray:
    """A generated face (3, s, s) as input of a detector: uint8 (side, side, 3), enlarged if small."""
    side = max(DETECTION_SIDE, face.shape[-1])
    large = functional.interpolate(face[None].nan_to_num(0.0), size=side, mode="bicubic", antialias=True)[0]
    pixels: np.ndarray = (
        (large.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    )
    return pixels
