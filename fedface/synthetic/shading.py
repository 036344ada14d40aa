"""Rendering of a synthetic face: geometry, relief, reflectance, light; one pass without loops over faces.

The head is an ellipsoid with Gaussian relief (nose, sockets, cheeks, lips, chin) whose normals, from finite
differences, carry wrapped Lambert shading and a soft specular lobe (Blinn 1977). Masks have edges about one pixel soft.

Coordinates are fractions of the side with the origin in the middle of the image, y down. Eyes lie near
(+-0.13, -0.03), the mouth near (0, 0.22), as in FFHQ's alignment (Karras et al. 2019, arXiv:1812.04948).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedface.photos.skin_tone import linear_from_srgb, srgb_from_monk
from fedface.synthetic.parameters import SyntheticFaces
from fedface.tensor_types import Images

EYE_X, EYE_Y, MOUTH_Y = 0.13, -0.03, 0.22
_DEPTH = 0.24  # of the head's ellipsoid
_EYE_DEPTH = 0.19  # of the plane that alignment holds still under yaw and pitch
_CENTRE_Y = 0.03  # of the face's outline
_SMILE = 0.028  # how far the mouth's corners rise
_NOSE_TURN = 0.06  # how much further than the face the nose goes, per sine of the yaw


def column(values: Tensor) -> Tensor:
    """Per-face numbers (n,) against pixels (n, h, w)."""
    return values[:, None, None]


def spot(x: Tensor, y: Tensor, wide: float | Tensor, high: float | Tensor) -> Tensor:
    """A Gaussian of height 1 around the origin of (x, y)."""
    exponent = (x / wide).square().add_((y / high).square()).mul_(-0.5)
    # Underflow to denormal numbers would make the exponential several times slower.
    return exponent.clamp_(min=-30).exp_()


def ramp(distance: Tensor, softness: float | Tensor) -> Tensor:
    """0 to 1 across an edge: 0.5 where the signed distance is 0, `softness` wide."""
    return (distance / softness + 0.5).clamp_(0, 1)


def smooth(distance: Tensor, softness: float | Tensor) -> Tensor:
    """As `ramp`, without corners."""
    share = ramp(distance, softness)
    return share * share * (3 - 2 * share)


def paint(canvas: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
    """Lay a colour (n, 3) or an image (n, 3, h, w) over a canvas where the mask (n, h, w) is 1."""
    layer = colour if colour.ndim == 4 else colour[:, :, None, None]
    return torch.lerp(canvas, layer.expand_as(canvas), mask[:, None])


@dataclass(frozen=True)
class Geometry:
    """Where each pixel lies on the head; all (n, size, size)."""

    pixel: float  # side of a pixel
    sx: Tensor  # silhouette coordinates: turn with the head's outline
    sy: Tensor
    x: Tensor  # feature coordinates: turn with the surface
    y: Tensor
    side: Tensor  # |x|
    nose_x: Tensor  # as x, for the nose, which stands out and turns further
    radius: Tensor  # 0 in the middle of the face, 1 on its outline
    face: Tensor  # mask of the face's outline


def _outline(faces: SyntheticFaces, sx: Tensor, sy: Tensor) -> Tensor:
    """0 in the middle of the face, 1 on its outline, growing like a square; silhouette coordinates."""
    below = ((sy - 0.02) / 0.34).clamp_(min=0)
    width = column(faces.face_width) * (1 - column(faces.jaw) * below * below)
    height = torch.where(sy < _CENTRE_Y, torch.tensor(0.41), column(faces.chin))
    return (sx / width).square() + ((sy - _CENTRE_Y) / height).abs() ** 2.3


def project(faces: SyntheticFaces, points: Tensor) -> Tensor:
    """Where points of the face appear: feature coordinates (n, m, 2) -> the same, in the turned image.

    The inverse of `place`, by fixed-point iteration: the depth changes slowly, so a few steps suffice.
    """
    x, y = points[:, :, None, 0], points[:, :, None, 1]
    turn, nod = column(faces.yaw.sin()), column(faces.pitch.sin())
    xr, yr = x, y
    for _ in range(12):
        square = _outline(faces, xr + turn * _EYE_DEPTH, yr - nod * _EYE_DEPTH)
        depth = _DEPTH * (1 - square).clamp(min=0).sqrt() - _EYE_DEPTH
        xr, yr = x + turn * depth, y - nod * depth
    cos, sin = column(faces.roll.cos()), column(faces.roll.sin())
    return torch.cat((cos * xr - sin * yr, sin * xr + cos * yr), dim=2)


def features(faces: SyntheticFaces) -> Tensor:
    """Eyes, nose tip and mouth corners, left to right in the image: (n, 5, 2) feature coordinates."""
    eye = EYE_X * faces.eye_spacing
    corner = _mouth_width(faces)
    mouth = MOUTH_Y - 0.65 * _SMILE * faces.smile
    x = torch.stack((-eye, eye, _NOSE_TURN * faces.yaw.sin(), -corner, corner), dim=1)
    level = torch.full_like(eye, EYE_Y)
    y = torch.stack((level, level, 0.1 * faces.nose_length, mouth, mouth), dim=1)
    return torch.stack((x, y), dim=2)


def place(faces: SyntheticFaces, size: int) -> Geometry:
    """Turn n heads and find each pixel's place on them."""
    steps = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
    dx, dy = steps[None, None, :], steps[None, :, None]
    cos, sin = column(faces.roll.cos()), column(faces.roll.sin())
    xr, yr = cos * dx + sin * dy, cos * dy - sin * dx
    turn, nod = column(faces.yaw.sin()), column(faces.pitch.sin())
    sx, sy = xr + turn * _EYE_DEPTH, yr - nod * _EYE_DEPTH
    square = _outline(faces, sx, sy)
    radius = square.sqrt()
    depth = _DEPTH * (1 - square).clamp_(min=0).sqrt()
    x, y = xr - turn * (depth - _EYE_DEPTH), yr + nod * (depth - _EYE_DEPTH)
    face = ramp((1 - radius) * column(faces.face_width), 1.6 / size)
    return Geometry(1 / size, sx, sy, x, y, x.abs(), x - turn * _NOSE_TURN, radius, face)


def _relief(faces: SyntheticFaces, at: Geometry) -> Tensor:
    """Height of the face towards the viewer, (n, size, size)."""
    wide, tip = column(faces.nose_width), 0.1 * column(faces.nose_length)
    smile, age = column(faces.smile), column(faces.age)
    lips = column(faces.lip_fullness)
    height = _DEPTH * (1 - 0.94 * at.radius.square()).clamp_(min=0.02).sqrt()
    height += 0.034 * spot(at.nose_x, at.y - 0.02, 0.023 * wide, 0.055)
    height += 0.054 * spot(at.nose_x, at.y - tip, 0.034 * wide, 0.029)
    height += 0.020 * spot(at.nose_x.abs() - 0.042 * wide, at.y - tip - 0.01, 0.016, 0.018)
    height -= 0.034 * spot(at.side - 0.115, at.y - EYE_Y + 0.005, 0.055, 0.032)
    height += 0.013 * spot(at.side - EYE_X, at.y - EYE_Y, 0.045, 0.022)
    height += 0.011 * spot(at.side - 0.10, at.y + 0.10, 0.08, 0.022)
    cheek = column(faces.cheek) * 0.017 + 0.010 * smile
    height += cheek * spot(at.side - 0.155, at.y - 0.075 + 0.01 * smile, 0.055, 0.05)
    height += 0.012 * spot(at.x, at.y - MOUTH_Y, 0.085, 0.05)
    height += 0.008 * lips * spot(at.x, at.y - MOUTH_Y + 0.018, 0.055, 0.013)
    height += 0.010 * lips * spot(at.x, at.y - MOUTH_Y - 0.022, 0.05, 0.014)
    height -= 0.010 * spot(at.x, at.y - MOUTH_Y - 0.058, 0.05, 0.014)
    height += 0.022 * spot(at.x, at.y - MOUTH_Y - 0.105, 0.05, 0.03)
    fold = at.side - 0.062 - 0.55 * (at.y - 0.12)
    height -= (0.003 + 0.006 * age + 0.003 * smile) * spot(fold, at.y - 0.165, 0.012, 0.035)
    return height - 0.004 * age * spot(at.side - EYE_X, at.y - EYE_Y - 0.045, 0.04, 0.01)


@dataclass(frozen=True)
class Shading:
    """Light on the face's surface; all (n, size, size)."""

    irradiance: Tensor
    gloss: Tensor  # specular radiance, the same for every skin


def light_direction(faces: SyntheticFaces) -> tuple[Tensor, Tensor, Tensor]:
    """The unit vector towards the key light, (n,) each: right, down, towards the viewer."""
    flat = faces.elevation.cos()
    return faces.azimuth.sin() * flat, -faces.elevation.sin(), faces.azimuth.cos() * flat


def _shade(faces: SyntheticFaces, at: Geometry) -> Shading:
    height = _relief(faces, at)
    slope_x = torch.gradient(height, spacing=at.pixel, dim=2)[0]
    slope_y = torch.gradient(height, spacing=at.pixel, dim=1)[0]
    nz = (slope_x.square() + slope_y.square() + 1).rsqrt_()
    right, down, front = (column(part) for part in light_direction(faces))
    facing = (front - slope_x * right - slope_y * down) * nz
    diffuse = ((facing + 0.14) / 1.14).clamp_(min=0)
    turned_away = 1 - diffuse
    # Half vector between the light and the viewer at (0, 0, 1).
    length = (2 + 2 * front).clamp(min=0.1).sqrt()
    half = ((front + 1) - slope_x * right - slope_y * down) * nz / length
    lobe = half.clamp_(min=0) ** 6
    gloss = column(faces.shine * faces.light) * lobe * (0.018 + 0.07 * lobe**4)
    tip = 0.1 * column(faces.nose_length)
    nose_shadow = spot(at.nose_x + 0.085 * right, at.y - tip - 0.005 + 0.05 * down, 0.03, 0.04)
    off_nose = 1 - spot(at.nose_x, at.y - tip + 0.03, 0.03, 0.06)
    key = diffuse * (1 - 0.75 * nose_shadow * off_nose * (0.4 + right.abs()).clamp(max=1))
    creases = 0.30 * spot(at.side - 0.105, at.y - EYE_Y + 0.015, 0.05, 0.03)
    creases += 0.30 * spot(at.nose_x, at.y - tip - 0.035, 0.035, 0.012)
    creases += 0.18 * spot(at.x, at.y - MOUTH_Y - 0.055, 0.045, 0.013)
    creases += 0.25 * (at.radius - 0.8).clamp_(min=0) / 0.2
    open_sky = 1 - creases.clamp_(max=0.6)
    ambient = column(faces.ambient) * (1 - 0.25 * turned_away)
    return Shading((column(faces.light) * key + ambient) * open_sky, gloss * open_sky)


def _eyes(faces: SyntheticFaces, at: Geometry, albedo: Tensor, skin: Tensor) -> tuple[Tensor, Tensor]:
    """Paint eyes onto the albedo; also the added light of the two catchlights (n, size, size)."""
    size, wide = column(faces.eye_size), 0.056 * column(faces.eye_size)
    ex = at.side - EYE_X * column(faces.eye_spacing)
    ey = at.y - EYE_Y - 0.004 * ex / 0.05
    bow = (1 - (ex / wide).square()).clamp_(min=-1)
    squint = column(faces.eye_openness) * size * (1 - 0.12 * column(faces.smile).clamp(min=0))
    top, bottom = ey + 0.0255 * squint * bow, 0.0175 * squint * bow - ey
    inside = ramp(torch.minimum(top, bottom), 1.1 * at.pixel)
    white = torch.tensor((0.52, 0.485, 0.46)).expand(len(faces), 3)
    shaded_white = white[:, :, None, None] * (0.45 + 0.55 * (top / 0.02).clamp(0, 1))[:, None]
    albedo = paint(albedo, shaded_white, inside)
    outward = torch.where(at.x > 0, 1.0, -1.0)
    look = outward * (column(faces.gaze) * 0.018) - 0.002
    distance = ((ex - look).square() + (ey + 0.002).square()).sqrt_()
    iris = 0.0265 * size
    albedo = paint(albedo, faces.iris_colour, inside * ramp(iris - distance, 1.2 * at.pixel))
    dark = torch.full_like(faces.iris_colour, 0.006)
    albedo = paint(albedo, dark, inside * ramp(0.0125 * size - distance, 1.2 * at.pixel))
    lash = spot(torch.zeros_like(top), top, 1.0, 0.006) * ramp(wide * 1.08 - ex.abs(), 0.02)
    lower = 0.35 * spot(torch.zeros_like(top), bottom, 1.0, 0.004) * ramp(wide - ex.abs(), 0.02)
    albedo = paint(albedo, skin * 0.05 + 0.004, 0.85 * torch.maximum(lash, lower))
    crease = 0.5 * spot(torch.zeros_like(top), top - 0.016, 1.0, 0.005) * ramp(wide * 0.95 - ex.abs(), 0.03)
    albedo = paint(albedo, skin * 0.35, crease)
    right, down, _ = (column(part) for part in light_direction(faces))
    spark_x = ex * outward - 0.010 * right - 0.018 * column(faces.gaze)
    spark = 0.55 * spot(spark_x, ey + 0.004 - 0.008 * down, 0.0065, 0.0065)
    return albedo, spark * inside * column(faces.light)


def _mouth_width(faces: SyntheticFaces) -> Tensor:
    """Half the mouth's width, (n,)."""
    return (0.085 + 0.014 * faces.smile) * faces.mouth_width


def _mouth(faces: SyntheticFaces, at: Geometry, albedo: Tensor, skin: Tensor) -> Tensor:
    wide = column(_mouth_width(faces))
    across = (at.x / wide).square()
    bow = (1 - across).clamp_(min=-1)
    full, gape = column(faces.lip_fullness), 0.028 * column(faces.mouth_open)
    line = at.y - MOUTH_Y + _SMILE * column(faces.smile) * (across.clamp(max=1.5) - 0.35)
    cupid = 1 - 0.25 * spot(at.x, torch.zeros_like(at.x), 0.014, 1.0)
    upper = line + (0.024 * full * cupid + 0.3 * gape) * bow
    lower = (0.032 * full + 0.9 * gape) * bow - line
    lips = ramp(torch.minimum(upper, lower), 1.5 * at.pixel)
    # Lips hold more blood and, on dark skin, a share of pigment: redder than the skin around them.
    red = skin * torch.tensor((0.80, 0.50, 0.50)) + torch.tensor((0.030, 0.007, 0.010))
    albedo = paint(albedo, red, 0.9 * lips)
    gap = torch.minimum(line + 0.3 * gape * bow, 0.9 * gape * bow - line)
    inside = ramp(gap, 1.2 * at.pixel) * column(faces.mouth_open)
    albedo = paint(albedo, torch.tensor((0.035, 0.010, 0.010)).expand(len(faces), 3), inside)
    teeth = ramp(torch.minimum(gap, 0.014 - line - 0.3 * gape), 1.5 * at.pixel) * inside
    albedo = paint(albedo, torch.tensor((0.56, 0.52, 0.45)).expand(len(faces), 3), 0.85 * teeth)
    parted = spot(torch.zeros_like(line), line, 1.0, 0.0045) * ramp(wide * 1.05 - at.side, 0.02)
    return paint(albedo, skin * 0.12, 0.75 * parted * (1 - column(faces.mouth_open)))


def _brows(faces: SyntheticFaces, at: Geometry, albedo: Tensor, hair: Tensor) -> Tensor:
    along = (at.side - 0.052) / 0.145
    arch = -0.088 - 0.016 * column(faces.brow_raise) - 0.018 * (1 - ((along - 0.55) / 0.55).square())
    thick = 0.0125 * column(faces.brow_thickness) * (1.25 - 0.75 * along)
    mask = spot(torch.zeros_like(along), at.y - arch - 0.010, 1.0, thick.clamp(min=0.004))
    mask = mask * smooth(along, 0.2) * smooth(1 - along, 0.3)
    return paint(albedo, hair * 0.4, 0.85 * mask)


def _beard(faces: SyntheticFaces, at: Geometry, albedo: Tensor, hair: Tensor) -> Tensor:
    bare_cheek = 0.09 * spot(at.side - 0.14, torch.zeros_like(at.y), 0.05, 1.0)
    edge = 0.15 + bare_cheek - (at.side - 0.2).clamp(min=0) * 1.2
    mask = smooth(at.y - edge, 0.09)
    lips = spot(at.x, at.y - MOUTH_Y - 0.004, 0.07, 0.026)
    mask = mask * (1 - 0.9 * lips)
    return paint(albedo, hair * 0.8, 0.88 * mask * column(faces.beard))


def skin_colour(faces: SyntheticFaces) -> Tensor:
    """The skin's reflectance, (n, 3) linear light."""
    return linear_from_srgb(srgb_from_monk(faces.tone))


def face_layer(faces: SyntheticFaces, at: Geometry) -> Images:
    """Radiance of the face's surface, (n, 3, size, size), as if it filled the image."""
    skin = skin_colour(faces)
    albedo = skin[:, :, None, None].expand(-1, -1, *at.x.shape[1:])
    flush = spot(at.side - 0.15, at.y - 0.10, 0.055, 0.05) + 0.8 * spot(at.nose_x, at.y - 0.1, 0.03, 0.03)
    albedo = paint(albedo, skin * torch.tensor((1.0, 0.76, 0.74)), (0.6 * flush).clamp(max=1))
    tip = 0.1 * column(faces.nose_length)
    nostrils = spot(at.nose_x.abs() - 0.022 * column(faces.nose_width), at.y - 0.03 - tip, 0.011, 0.007)
    albedo = paint(albedo, skin * 0.12, 0.75 * nostrils)
    albedo = _beard(faces, at, albedo, faces.hair_colour)
    albedo = _mouth(faces, at, albedo, skin)
    albedo = _brows(faces, at, albedo, faces.hair_colour)
    albedo, spark = _eyes(faces, at, albedo, skin)
    shading = _shade(faces, at)
    return albedo * shading.irradiance[:, None] + (shading.gloss + spark)[:, None]
