"""Metrics that a device computes on its own photos: each photo independently, and within bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_experiment, tiny_gan

from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.device import local_metrics
from fedface.device.local_metrics import check_request, compute_local_metrics
from fedface.errors import ConfigError
from fedface.messages.messages import EvaluationRequest
from fedface.models.model import Model
from fedface.photos.device_dataset import DeviceDataset
from fedface.privacy.plan import DPParameters, Schedule
from fedface.randomness import Streams
from fedface.synthetic.faces import render_people
from fedface.upsampling.degradation import Bicubic, BicubicPulse, Chain, Noise
from fedface.upsampling.flow_posterior import GuidedFlowConfig
from fedface.upsampling.latent_hmc import HmcConfig
from fedface.upsampling.methods import Method, PulseEncoderInitConfig, evaluation_count
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.upsampling.upsampler import Upsampled

ONCE = Schedule(rounds=1, steps_per_round=1, sampling_rate=1.0, expected_batch_size=1, clip_norm=1.0)


@pytest.fixture(scope="module")
def gan() -> Model:
    """Networks of 16 px."""
    return tiny_gan()


@pytest.fixture(scope="module")
def evaluation(gan: Model, tmp_path_factory: pytest.TempPathFactory) -> EvaluationRequest:
    """A short search, without noise, so that sums can be compared."""
    experiment = tiny_experiment(tmp_path_factory.mktemp("recipe"))
    return EvaluationRequest(
        dp=DPParameters(schedule=ONCE, noise_multiplier=0.0),
        architecture=gan.architecture,
        method=PulseConfig(steps=3, mapping_samples=64),
        downscale=BicubicPulse(4),
        metrics=LocalMetricsConfig(tone_upper_bounds=(5, 10)),
        aggregation=experiment.aggregation,
        agreement=experiment.agreement,
    )


def sums(gan: Model, own: DeviceDataset, evaluation: EvaluationRequest) -> torch.Tensor:
    """The sum over units, without noise."""
    return compute_local_metrics(gan, own, evaluation, seed=7, rng=torch.Generator().manual_seed(1))


def faces(count: int) -> torch.Tensor:
    """Synthetic faces."""
    return render_people(count, 0.5, 16, Streams(2))


def test_a_photos_metrics_do_not_depend_on_other_photos(gan: Model, evaluation: EvaluationRequest) -> None:
    """The sum over three photos is that of each alone, to the last bits."""
    pictures = faces(3)
    together = sums(gan, DeviceDataset.independent(pictures), evaluation)
    alone = [sums(gan, DeviceDataset.independent(pictures[i : i + 1]), evaluation) for i in range(3)]
    assert torch.allclose(together, torch.stack(alone).sum(0), atol=1e-6)
    assert all(float(one.norm()) <= 1 + 1e-6 for one in alone)


@pytest.mark.usefixtures("quick_detection")
def test_forty_photos_of_one_occasion_add_as_much_as_one(gan: Model, evaluation: EvaluationRequest) -> None:
    """An occasion adds the mean of its photos' metrics, here forty times the same."""
    terms = replace(evaluation.dp, unit="occasion")
    birthday = DeviceDataset.by_occasion(faces(1).repeat(40, 1, 1, 1), 40)
    once = sums(gan, DeviceDataset.independent(faces(1)), evaluation)
    assert torch.allclose(sums(gan, birthday, replace(evaluation, dp=terms)), once, atol=1e-6)


@pytest.mark.usefixtures("quick_detection")
def test_a_library_adds_the_mean_of_its_photos_and_no_noise(
    gan: Model, evaluation: EvaluationRequest
) -> None:
    """Three photos of three days; the server adds the noise, the device none."""
    terms = replace(evaluation.dp, unit="library", noise="central", noise_multiplier=3.0)
    pictures = faces(3)
    alone = [sums(gan, DeviceDataset.independent(pictures[i : i + 1]), evaluation) for i in range(3)]
    whole = sums(gan, DeviceDataset.independent(pictures), replace(evaluation, dp=terms))
    assert torch.allclose(whole, torch.stack(alone).mean(0), atol=1e-6)


def test_without_photos_the_sum_is_zero_before_noise(gan: Model, evaluation: EvaluationRequest) -> None:
    assert not sums(gan, DeviceDataset.independent(torch.zeros(0, 3, 16, 16)), evaluation).any()


@pytest.mark.parametrize(
    ("method", "work"),
    [
        (PulseConfig(steps=70), 70),
        (PulseEncoderInitConfig(pulse=PulseConfig(steps=70)), 71),
        (HmcConfig(noise_levels=2, transitions=3, final_transitions=4, leapfrog_steps=5, rank=6), 56),
    ],
)
def test_the_cost_of_a_method_is_known_in_advance(method: Method, work: int) -> None:
    assert evaluation_count(method) == work


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": PulseConfig(steps=10**9)}, "network evaluations per face"),
        ({"method": PulseConfig(mapping_samples=10**12)}, "mapping_samples are allowed"),
        (
            {"method": PulseEncoderInitConfig(pulse=PulseConfig(mapping_samples=10**12))},
            "mapping_samples are allowed",
        ),
        ({"downscale": Chain(parts=(BicubicPulse(4), Noise(0.1)))}, "not add noise"),
        (
            {"dp": DPParameters(schedule=replace(ONCE, steps_per_round=2), noise_multiplier=1.0)},
            "1 step per round",
        ),
    ],
)
def test_expensive_or_invalid_requests_are_refused(
    gan: Model, evaluation: EvaluationRequest, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_request(replace(evaluation, **changes), gan)  # type: ignore[arg-type]


def test_a_matrix_that_exceeds_memory_is_refused_before_anything_is_recorded(
    gan: Model, evaluation: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 * 16 * 16 measured values, here with memory for 700."""
    monkeypatch.setattr(local_metrics, "MAX_LINEAR_SIZE", 700)
    whole = replace(evaluation, method=GuidedFlowConfig(covariance="isotropic"), downscale=Bicubic(1))
    with pytest.raises(ConfigError, match="matrix of 768 rows"):
        check_request(whole, gan)


def test_a_method_that_does_not_support_the_model_is_refused_before_a_photo_is_read(
    gan: Model, evaluation: EvaluationRequest
) -> None:
    with pytest.raises(ConfigError, match="style encoder"):
        check_request(replace(evaluation, method=PulseEncoderInitConfig()), gan)


@pytest.mark.usefixtures("quick_detection")
def test_a_photo_on_which_a_network_fails_adds_nothing(
    gan: Model, evaluation: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error leaves, and the other photos are not affected."""
    pictures = faces(3)
    real = PulseUpsampler.upsample

    def breaks(self: PulseUpsampler, low: torch.Tensor, *, faces_per_photo: int) -> Upsampled:
        if torch.equal(low, evaluation.downscale.apply(pictures[1:2]).clamp(0, 1)):
            raise ValueError("styles must be finite")
        return real(self, low, faces_per_photo=faces_per_photo)

    whole = sums(gan, DeviceDataset.independent(pictures[[0, 2]]), evaluation)
    monkeypatch.setattr(PulseUpsampler, "upsample", breaks)
    assert torch.allclose(sums(gan, DeviceDataset.independent(pictures), evaluation), whole, atol=1e-6)


def test_a_search_takes_all_its_steps_even_if_a_face_fits(
    gan: Model, evaluation: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing must not reveal whether a photo fits: the device searches to the end, in one thread."""
    generated = []
    real = local_metrics.make_upsampler

    def make(method: Method, *more: object, **named: object) -> object:
        generated.append(method)
        return real(method, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(local_metrics, "make_upsampler", make)
    hasty = PulseConfig(steps=3, mapping_samples=64, stop="fit", eps=100.0, workers=30_000)
    sums(gan, DeviceDataset.independent(faces(1)), replace(evaluation, method=hasty))
    assert generated == [replace(hasty, stop="end", workers=1)]
