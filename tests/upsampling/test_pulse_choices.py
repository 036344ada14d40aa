"""Options of a search: callbacks, the last face, starting points, workers, other sizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams
from fedface.upsampling.degradation import Area, Bicubic, BicubicPulse, Degradation
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler
from fedface.upsampling.style_gaussian import StyleGaussian, fit_style_gaussian
from fedface.upsampling.upsampler import StepSnapshot, Upsampled, squared_difference

STREAMS = Streams(7)
QUICK = PulseConfig(steps=12, mapping_samples=500)
ALL = replace(QUICK, stop="end", eps=2e-2)
FOUR = BicubicPulse(4)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    """Without noise, whose strengths start at zero."""
    config = StyleGAN2Config(
        size=16, latent_width=16, style_width=16, mapping_layers=2, channel_base=256, channel_max=16
    )
    return StyleGAN2(config, STREAMS.generator("weights"))


@pytest.fixture(scope="module")
def low(generator: StyleGAN2) -> Tensor:
    return FOUR.apply(generator.sample(6, STREAMS.generator("truth"))).clamp(0, 1)


def watched(
    generator: StyleGAN2, config: PulseConfig, photos: Tensor, faces: int
) -> tuple[Upsampled, list[StepSnapshot]]:
    seen: list[StepSnapshot] = []
    search = PulseUpsampler(generator, FOUR, config, STREAMS, watch=seen.append)
    return search.upsample(photos, faces_per_photo=faces), seen


def test_the_callback_gets_every_step_of_the_active_faces(generator: StyleGAN2, low: Tensor) -> None:
    """Chunks of four out of six photos with two faces each: face 2 * i + j is face j of photo i."""
    found, seen = watched(generator, replace(QUICK, faces_at_once=4, eps=1e-2), low, 2)
    targets = low.repeat_interleave(2, dim=0)
    left: set[int] = set(range(12))
    for snapshot in seen:
        assert not snapshot.images.requires_grad and 1 <= snapshot.step <= snapshot.steps == 12
        again = squared_difference(FOUR.apply(snapshot.images), targets[snapshot.faces])
        torch.testing.assert_close(snapshot.consistency_error, again)
        left -= set(snapshot.faces.tolist())
    assert not left
    for face, fits in enumerate(found.converged.flatten().tolist()):
        steps = [snapshot.step for snapshot in seen if face in snapshot.faces.tolist()]
        assert steps == list(range(1, steps[-1] + 1))
        assert fits or steps[-1] == 12
    assert found.converged.any() and any(len(snapshot.faces) < 4 for snapshot in seen)


def test_the_last_face_is_the_one_of_the_last_step(generator: StyleGAN2, low: Tensor) -> None:
    found, seen = watched(generator, replace(ALL, selection="last"), low, 1)
    torch.testing.assert_close(found.images[:, 0], seen[-1].images.clamp(0, 1), atol=1e-5, rtol=0)
    consistency_error = squared_difference(FOUR.apply(found.images[:, 0]), low)
    torch.testing.assert_close(found.consistency_error[:, 0], consistency_error, atol=1e-7, rtol=1e-4)


def test_the_best_face_is_the_one_of_the_smallest_consistency_error(
    generator: StyleGAN2, low: Tensor
) -> None:
    """Of the clamped images of all twelve steps."""
    found, seen = watched(generator, ALL, low, 1)
    consistency_errors = [
        squared_difference(FOUR.apply(snapshot.images.clamp(0, 1)), low) for snapshot in seen
    ]
    torch.testing.assert_close(
        found.consistency_error[:, 0], torch.stack(consistency_errors).amin(dim=0), atol=1e-6, rtol=1e-3
    )


def test_a_search_without_early_stopping_takes_all_steps(generator: StyleGAN2, low: Tensor) -> None:
    found, seen = watched(generator, replace(ALL, eps=10.0), low, 1)
    assert found.steps == len(seen) == 12 and found.converged.all()
    assert all(len(snapshot.faces) == 6 for snapshot in seen)


def test_with_early_stopping_the_last_face_fits(generator: StyleGAN2, low: Tensor) -> None:
    found = watched(generator, replace(QUICK, selection="last", eps=2e-2), low, 2)[0]
    assert found.converged.any()
    assert torch.equal(found.converged, found.consistency_error <= 2e-2)


def test_paper_settings_take_all_steps_and_the_last_face() -> None:
    paper = PulseConfig.paper()
    assert (paper.stop, paper.selection, paper.steps, paper.learning_rate) == ("end", "last", 100, 0.4)
    assert (paper.eps, paper.l2, paper.geocross, paper.trainable_noise) == (2e-3, 100.0, 0.05, 5)
    assert (PulseConfig().stop, PulseConfig().selection) == ("fit", "best")


def test_styles_map_back_to_their_latents() -> None:
    """Negative ones too; a component with zero variance has latent 0."""
    fit = StyleGaussian(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.3, 0.0]))
    latents = torch.randn(4, 2, 3, generator=STREAMS.generator("latents"))
    latents[..., 2] = 0
    torch.testing.assert_close(fit.latents(fit.styles(latents)), latents)


@pytest.mark.parametrize("tile", [False, True])
def test_a_search_that_starts_at_the_true_styles_fits_at_once(generator: StyleGAN2, tile: bool) -> None:
    """The first face of each photo; the second starts nearby, and comes closer than from a random start."""
    latents = torch.randn(8, 16, generator=STREAMS.generator("known"))
    with torch.no_grad():
        styles = generator.map(latents)
        photos = FOUR.apply(generator.synthesize(styles).clamp(0, 1))
    config = PulseConfig(steps=15, mapping_samples=2000, tile_latent=tile, eps=1e-6, faces_at_once=3)
    near, anywhere = (
        PulseUpsampler(generator, FOUR, config, STREAMS, start=start).upsample(photos, faces_per_photo=2)
        for start in (lambda given: styles, None)
    )
    assert near.converged[:, 0].all() and not near.converged[:, 1].any()
    assert near.consistency_error[:, 1].mean() < 0.8 * anywhere.consistency_error[:, 1].mean()
    seen: list[StepSnapshot] = []
    PulseUpsampler(generator, FOUR, config, STREAMS, start=lambda given: styles, watch=seen.append).upsample(
        photos, faces_per_photo=1
    )
    assert [snapshot.step for snapshot in seen] == [1, 1, 1]


def test_starting_points_depend_only_on_the_photo_and_its_rng(generator: StyleGAN2, low: Tensor) -> None:
    """They are requested once, with the photos unchanged; chunks and workers change nothing."""
    asked: list[Tensor] = []
    styles = generator.map(torch.randn(6, 16, generator=STREAMS.generator("styles"))).detach()

    def start(photos: Tensor) -> Tensor:
        asked.append(photos)
        return styles

    one, many = (
        PulseUpsampler(generator, FOUR, config, STREAMS, start=start).upsample(low, faces_per_photo=3)
        for config in (QUICK, replace(QUICK, faces_at_once=4, workers=2))
    )
    assert torch.equal(asked[0], low) and len(asked) == 2
    torch.testing.assert_close(one.consistency_error, many.consistency_error, atol=1e-5, rtol=1e-2)


def test_wrong_starts_are_named(generator: StyleGAN2, low: Tensor) -> None:
    for wrong in (torch.zeros(6, 5, 16), torch.full((6, 6, 16), float("nan"))):
        search = PulseUpsampler(generator, FOUR, QUICK, STREAMS, start=lambda photos, wrong=wrong: wrong)  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"start must give finite styles of shape \(6, 6, 16\)"):
            search.upsample(low, faces_per_photo=1)


def test_workers_give_the_same_result_as_one(generator: StyleGAN2, low: Tensor) -> None:
    """Three threads share eleven faces; all progress is reported, and torch has its threads again afterwards."""
    heard: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    alone, shared = (
        PulseUpsampler(
            generator, FOUR, replace(QUICK, workers=workers), STREAMS, progress=lambda *at: heard.append(at)
        ).upsample(low[:5], faces_per_photo=2)
        for workers in (1, 3)
    )
    torch.testing.assert_close(shared.consistency_error, alone.consistency_error, atol=1e-5, rtol=1e-2)
    torch.testing.assert_close(shared.images, alone.images, atol=1e-2, rtol=0)
    together = [done for done, of in heard if of == 3 * 12]
    assert len(together) > 12 and together == sorted(together) and together[-1] == 36
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        PulseConfig(workers=0)


def test_an_error_in_the_callback_ends_all_workers(generator: StyleGAN2, low: Tensor) -> None:
    def refuse(snapshot: StepSnapshot) -> None:
        raise InterruptedError("enough")

    config = replace(ALL, workers=2, faces_at_once=1)
    search = PulseUpsampler(generator, FOUR, config, STREAMS, watch=refuse)
    threads = torch.get_num_threads()
    with pytest.raises(InterruptedError, match="enough"):
        search.upsample(low, faces_per_photo=2)
    assert torch.get_num_threads() == threads


class Patchwork:
    """A generator of any size: fixed soft images, mixed by the styles, without noise."""

    latent_width, style_inputs, noise_sides, style_slope = 6, 2, (), 1.0

    def __init__(self, size: int) -> None:
        self.size = size
        coarse = torch.randn(12, 3, 4, 4, generator=STREAMS.generator("mixture")) / 8
        self.mixture = F.interpolate(coarse, size=(size, size), mode="bilinear").flatten(1)

    def map(self, latents: Tensor) -> Tensor:
        return latents[:, None].expand(-1, 2, -1)

    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        return psi * styles

    def synthesize(self, styles: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        return 0.5 + (styles.flatten(1) @ self.mixture).view(-1, 3, self.size, self.size)


@pytest.mark.parametrize(
    ("size", "degradation"),
    [
        (15, BicubicPulse(1)),
        (15, BicubicPulse(3)),
        (15, Bicubic(5)),
        (15, Area(15)),
        (6, BicubicPulse(6)),
        (128, BicubicPulse(64)),
        (7, Bicubic(1)),
    ],
)
def test_any_size_and_factor_can_be_searched(size: int, degradation: Degradation) -> None:
    """Also odd ones, a factor of 1, and one pixel."""
    generator = Patchwork(size)
    styles = torch.randn(3, 2, 6, generator=STREAMS.generator("patch"))
    photos = degradation.apply(generator.synthesize(styles))
    first, found = (
        PulseUpsampler(generator, degradation, replace(QUICK, eps=1e-9, steps=steps), STREAMS).upsample(
            photos, faces_per_photo=1
        )
        for steps in (1, 60)
    )
    assert found.images.shape == (3, 1, 3, size, size)
    assert photos.shape[2] == size // degradation.factor
    assert found.consistency_error.mean() < 0.2 * first.consistency_error.mean()


def test_the_style_fit_keeps_the_type_of_its_styles() -> None:
    fit = fit_style_gaussian(
        lambda latents: latents.double()[:, None], 3, samples=100, stream=STREAMS.generator("fit")
    )
    assert fit.mean.dtype == fit.std.dtype == torch.float64


FULL_SIZE = """
import torch
from pathlib import Path
from fedface.models.stylegan2 import StyleGAN2Config, StyleGAN2
from fedface.randomness import Streams
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig, PulseUpsampler

torch.set_num_threads(1)
config = StyleGAN2Config(size=1024, channel_base=32768, channel_max=512, mapping_layers=8)
generator = StyleGAN2(config, Streams(1).generator("weights"))
config = PulseConfig(steps=4, eps=1e-9, mapping_samples=200, learning_rate=4.0)
errors = []
watch = lambda snapshot: errors.append(snapshot.consistency_error.item())
search = PulseUpsampler(generator, BicubicPulse(64), config, Streams(2), watch=watch)
found = search.upsample(torch.full((1, 3, 16, 16), 0.5), faces_per_photo=1)
assert found.images.shape == (1, 1, 3, 1024, 1024)
print(errors[0], found.consistency_error.item())
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_sixteen_pixels_are_searched_at_1024_with_the_published_widths() -> None:
    """In a process of its own: the consistency error falls, and peak memory stays below 2.5 GiB."""
    reported = subprocess.run([sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, check=True)
    consistency_errors, peak = reported.stdout.splitlines()
    first, best = map(float, consistency_errors.split())
    assert best < first
    assert float(peak) < 2.5
