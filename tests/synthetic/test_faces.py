"""Synthetic faces: their known parameters are true of their images."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from pytest import approx

from fedface.photos.skin_tone import linear_from_srgb
from fedface.synthetic.faces import (
    NORMALS,
    SyntheticFaces,
    ToneMix,
    faces_from_normals,
    landmarks,
    neutral_light,
    render,
    sample_faces,
    skin_mask,
    through_camera,
)

EVEN = ToneMix(light_fraction=0.5)


def some(count: int, seed: int = 0) -> SyntheticFaces:
    return sample_faces(count, EVEN, torch.Generator().manual_seed(seed))


def middling(count: int) -> SyntheticFaces:
    return faces_from_normals(torch.zeros(count, NORMALS), EVEN)


def test_the_same_latents_give_the_same_image() -> None:
    """An image without noise is a function of its parameters."""
    normals = torch.randn(4, NORMALS, generator=torch.Generator().manual_seed(1))
    first, second = (render(faces_from_normals(normals.clone(), EVEN), 32) for _ in range(2))
    assert torch.equal(first, second)


def test_images_are_finite_and_in_range_for_extreme_latents() -> None:
    """Quantile functions are bounded."""
    normals = 6 * torch.randn(32, NORMALS, generator=torch.Generator().manual_seed(2)).sign()
    pictures = render(faces_from_normals(normals, EVEN), 64)
    assert pictures.dtype == torch.float32 and pictures.shape == (32, 3, 64, 64)
    assert 0 <= float(pictures.min()) and float(pictures.max()) <= 1


def test_a_face_does_not_depend_on_its_neighbours() -> None:
    """Rendering many at once, in chunks, equals rendering each alone."""
    faces = some(40)
    alone = render(faces[37:38], 64)
    assert torch.allclose(render(faces, 64)[37:38], alone, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_exactly_the_light_share_of_the_unit_interval_has_a_light_tone(share: float) -> None:
    """The quantile function crosses 5.5 at the light share."""
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tones = ToneMix(light_fraction=share).tones(uniform)
    assert float((tones < 5.5).double().mean()) == approx(share, abs=1e-9)
    assert float(tones.min()) >= 1 and float(tones.max()) <= 10


def test_the_tone_quantile_rises_without_a_jump() -> None:
    """It is continuous: halving the grid halves the largest step."""
    steps = []
    for count in (100_001, 200_001):
        rise = ToneMix(light_fraction=0.3).tones(torch.linspace(0, 1, count, dtype=torch.float64)).diff()
        assert float(rise.min()) >= 0
        steps.append(float(rise.max()))
    assert steps[1] == approx(steps[0] / 2, rel=0.01)


def test_a_share_outside_zero_and_one_is_refused() -> None:
    """The message names the value and the bound."""
    with pytest.raises(ValueError, match=r"light_fraction must lie in \[0, 1\], got 1.5"):
        ToneMix(light_fraction=1.5)


def test_latents_of_the_wrong_width_are_refused() -> None:
    """The message has the expected shape."""
    with pytest.raises(ValueError, match=f"normals must have shape \\(n, {NORMALS}\\)"):
        faces_from_normals(torch.zeros(2, NORMALS + 1), EVEN)


def test_each_latent_changes_one_parameter_and_the_first_the_tone() -> None:
    """A Gaussian copula without correlation: nothing else in the image reveals the tone."""
    still = middling(1)
    moved_by_column = []
    for place in range(NORMALS):
        normals = torch.zeros(1, NORMALS)
        normals[0, place] = 0.7
        moved = faces_from_normals(normals, EVEN)
        names = [
            f.name for f in fields(still) if not torch.equal(getattr(still, f.name), getattr(moved, f.name))
        ]
        moved_by_column.append(names)
    assert moved_by_column[0] == ["tone"]
    counts = [len(names) for names in moved_by_column[1:]]
    assert set(counts) == {0, 1} and counts.count(0) == 1  # one column is unused
    assert ["tone"] not in moved_by_column[1:]


def test_a_small_step_of_the_latents_is_a_small_step_of_the_image() -> None:
    """The map is smooth enough for regression: a hundredth of the step, of the change."""
    generator = torch.Generator().manual_seed(4)
    normals, way = torch.randn(2, 16, NORMALS, generator=generator)
    here = render(faces_from_normals(normals, EVEN), 32)
    small = (render(faces_from_normals(normals + 1e-4 * way, EVEN), 32) - here).abs().mean()
    large = (render(faces_from_normals(normals + 1e-2 * way, EVEN), 32) - here).abs().mean()
    assert float(large / small) == approx(100, rel=0.3)


def test_more_exposure_brightens_every_face() -> None:
    """Mean luminance rises with each stop."""
    faces = some(16)
    light = [
        render(replace(faces, exposure=faces.exposure * 0 + stops), 32).mean((1, 2, 3))
        for stops in (-2, -1, 0)
    ]
    assert bool((light[0] < light[1]).all()) and bool((light[1] < light[2]).all())


def test_mirrored_light_mirrors_the_shading_of_a_symmetric_face() -> None:
    """Face, light and camera have no preferred side."""
    faces = replace(middling(1), hair_amount=torch.zeros(1), beard=torch.zeros(1), glasses=torch.zeros(1))
    left, right = (replace(faces, azimuth=torch.tensor([side])) for side in (-0.9, 0.9))
    inside = (skin_mask(faces, 64) > 0.9)[:, None].expand(-1, 3, -1, -1)
    assert torch.allclose(render(left, 64)[inside], render(right, 64).flip(3)[inside], atol=1e-4)
    assert not torch.allclose(render(left, 64)[inside], render(right, 64)[inside], atol=0.05)


def test_light_from_the_right_brightens_the_right_cheek() -> None:
    """Azimuth is positive towards the right of the picture."""
    picture = render(replace(middling(1), azimuth=torch.tensor([1.0])), 64)
    assert float(picture[..., 36:42, 42:46].mean()) > float(picture[..., 36:42, 18:22].mean()) + 0.05


def test_darker_tones_are_darker_in_the_same_light_and_still_differ_from_flat() -> None:
    """Skin luminance falls along the Monk scale; features remain visible on the darkest."""
    tones = torch.tensor([1.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    faces = replace(neutral_light(middling(8)), tone=tones)
    pictures, skin = render(faces, 64), skin_mask(faces, 64)
    light = (pictures.mean(1) * skin).sum((1, 2)) / skin.sum((1, 2))
    assert bool((light.diff() < 0).all())
    darkest = pictures[-1, :, 22:50, 16:48]
    assert float(darkest.mean(0).max() - darkest.mean(0).min()) > 0.25


def test_neutral_light_removes_light_and_camera_and_nothing_else() -> None:
    """Two photos of one face become the same image; another face remains another."""
    faces = some(6)
    relit = replace(faces, azimuth=-faces.azimuth, exposure=faces.exposure - 1, warmth=faces.warmth + 0.2)
    assert torch.equal(render(neutral_light(faces), 32), render(neutral_light(relit), 32))
    assert torch.equal(neutral_light(faces).tone, faces.tone)
    assert torch.equal(neutral_light(faces).yaw, faces.yaw)


def test_the_skin_mask_contains_only_skin() -> None:
    """Changing background, clothes and iris changes no pixel under the mask."""
    faces = some(24)
    repainted = replace(
        faces,
        background_colour=1 - faces.background_colour,
        clothing_colour=1 - faces.clothing_colour,
        iris_colour=1 - faces.iris_colour,
    )
    mask = skin_mask(faces, 64)
    change = (render(faces, 64) - render(repainted, 64)).abs().amax(1)
    assert 0 <= float(mask.min()) and float(mask.max()) <= 1
    assert float(change[mask > 0.99].max()) < 0.05
    assert float((mask > 0.99).float().mean()) > 0.05


def test_a_face_that_looks_straight_ahead_has_its_eyes_and_mouth_where_ffhq_has_them() -> None:
    """Eyes near (0.37, 0.47) and (0.63, 0.47), mouth corners near 0.72 of the height."""
    points = landmarks(replace(middling(1), smile=torch.zeros(1)))[0]
    assert points[:2].flatten().tolist() == approx([0.37, 0.47, 0.63, 0.47], abs=0.01)
    assert points[3:, 1].tolist() == approx([0.72, 0.72], abs=0.01)
    assert float(points[2, 0]) == approx(0.5, abs=1e-4)


def test_the_eye_landmarks_are_on_the_pupils() -> None:
    """Landmarks follow yaw, pitch and roll: a pupil, far darker than the cheek, is at them."""
    faces = some(64)
    faces = replace(
        neutral_light(faces),
        tone=faces.tone * 0 + 4,
        glasses=faces.glasses * 0,
        fringe=faces.fringe * 0,
        gaze=faces.gaze * 0,
        eye_openness=faces.gaze * 0 + 1.2,
    )
    picture = render(faces, 128).mean(1)
    darkest = -torch.nn.functional.max_pool2d(-picture[:, None], 5, 1, 2)[:, 0]
    place = (landmarks(faces)[:, :2] * 128).long().clamp(0, 127)
    rows = torch.arange(64)[:, None]
    pupil = darkest[rows, place[..., 1], place[..., 0]]
    cheek = picture[rows, place[..., 1] + 17, place[..., 0]]
    assert bool((pupil < 0.5 * cheek).all())


def test_a_small_image_is_the_average_of_a_large_one() -> None:
    """Below 64 pixels light is averaged over 2 x 2 before the camera."""
    faces = replace(neutral_light(middling(1)), tone=torch.tensor([6.0]))
    large, small = (linear_from_srgb(render(faces, size)) for size in (64, 32))
    assert torch.allclose(torch.nn.functional.avg_pool2d(large, 2), small, atol=2e-3)


def test_sensor_noise_has_the_stated_strength_at_mid_grey_and_is_reproducible() -> None:
    """`sensor_noise` is a standard deviation in linear light at a signal of 0.18."""
    faces = replace(neutral_light(middling(1)), sensor_noise=torch.tensor([0.02]))
    grey = torch.full((1, 3, 128, 128), 0.18)
    noisy = through_camera(grey, faces, torch.Generator().manual_seed(3))
    assert float(linear_from_srgb(noisy).std()) == approx(0.02, rel=0.03)
    assert torch.equal(noisy, through_camera(grey, faces, torch.Generator().manual_seed(3)))
    assert float(through_camera(grey, faces).std()) < 1e-6


def test_a_short_dynamic_range_takes_more_from_dark_skin_than_from_light() -> None:
    """Six stops swallow half of a signal of 1/64, and almost nothing of one of 1/2."""
    faces = replace(neutral_light(middling(2)), dynamic_range=torch.tensor([6.0, 6.0]))
    dark, light = 2.0**-6, 0.5
    radiance = torch.tensor([dark, light])[:, None, None, None].expand(2, 3, 4, 4)
    seen = linear_from_srgb(through_camera(radiance, faces)).mean((1, 2, 3))
    assert float(seen[0]) == approx(dark / 2, rel=0.01)
    assert float(seen[1]) == approx(light, rel=0.05)


def test_sampled_faces_follow_the_light_share_and_the_generator() -> None:
    """Binomial: 4 standard deviations around a tenth; the same generator state gives the same faces."""
    mix = ToneMix(light_fraction=0.1)
    first, second = (sample_faces(4000, mix, torch.Generator().manual_seed(6)) for _ in range(2))
    share = float((first.tone < 5.5).float().mean())
    assert share == approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 4000))
    assert all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))


def test_no_faces_give_no_images() -> None:
    """An empty batch keeps its shapes."""
    empty = some(3)[0:0]
    assert len(empty) == 0
    assert render(empty, 32).shape == (0, 3, 32, 32)
    assert skin_mask(empty, 32).shape == (0, 32, 32)
    assert landmarks(empty).shape == (0, 5, 2)


def test_an_image_below_sixteen_pixels_is_refused() -> None:
    """It would not show a face."""
    with pytest.raises(ValueError, match="size must be at least 16 pixels, got 8"):
        render(some(1), 8)
