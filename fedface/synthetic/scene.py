"""What surrounds a synthetic face (background, clothes, neck, ears, hair, glasses) and the order of layers.

Masks come first (skin that is visible is one of them), then light.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedface.synthetic.parameters import SyntheticFaces
from fedface.synthetic.shading import (
    EYE_X,
    EYE_Y,
    Geometry,
    column,
    face_layer,
    light_direction,
    paint,
    place,
    ramp,
    skin_colour,
    smooth,
    spot,
)
from fedface.tensor_types import Images


@dataclass(frozen=True)
class Masks:
    """Coverage of each layer in [0, 1], (n, size, size) each."""

    hair_behind: Tensor
    clothes: Tensor
    neck: Tensor
    ears: Tensor
    face: Tensor
    hair: Tensor  # in front of the face
    frame: Tensor  # of the glasses
    lenses: Tensor


def _hair_masks(faces: SyntheticFaces, at: Geometry) -> tuple[Tensor, Tensor]:
    """Hair behind the head and hair in front of it."""
    volume, curl, length = column(faces.hair_volume), column(faces.curl), column(faces.hair_length)
    wobble = 1 + 0.035 * curl * torch.sin(26 * at.sx + 9 * at.sy) * torch.sin(30 * at.sy - 7 * at.sx)
    wide = (column(faces.face_width) + 0.012 + volume) * (1 + 0.06 * length)
    above = (at.sy + 0.02).clamp(max=0) / (0.375 + 0.9 * volume)
    radius = ((at.sx / wide).square() + above.square()).sqrt_() * wobble
    outer = ramp((1 - radius) * wide, 2.0 * at.pixel + 0.01 * curl)
    end = -0.02 + 0.62 * length + 0.04 * volume
    outer = outer * smooth(end - at.sy, 0.10) * column(faces.hair_amount)
    fringe = column(faces.fringe)
    open_width = column(faces.face_width) * (1.0 - 0.12 * length)
    top = column(faces.hairline) + 0.12 * fringe + 0.28 * column(faces.parting) * at.sx
    centre = 0.06
    up = (at.sy - centre).clamp(max=0) / (centre - top).clamp(min=0.1)
    across = at.sx.abs() / open_width
    inside = (across**2.5 + up.abs() ** 2.5) ** (1 / 2.5)
    ragged = 0.006 + 0.010 * torch.sin(70 * at.sx + 6 * column(faces.parting)) * fringe
    window = smooth((1 - inside) * open_width + ragged, 0.028)
    return outer, outer * (1 - window)


def find_masks(faces: SyntheticFaces, at: Geometry) -> Masks:
    """Who covers whom, before light."""
    behind, front = _hair_masks(faces, at)
    width = column(faces.face_width)
    neck = ramp(0.145 + 0.3 * (at.sy - 0.40).clamp(min=0) - at.sx.abs(), 1.5 * at.pixel) * (at.sy > 0.1)
    shoulder = 0.35 * (at.sx.abs() - 0.15).clamp(min=0) ** 1.5
    collar = 0.455 - 0.045 * (at.sx / 0.15).square().clamp(max=1.0) + shoulder
    clothes = ramp(at.sy - collar, 1.5 * at.pixel)
    ear = ((at.sx.abs() - width - 0.004) / 0.035).square() + ((at.sy - 0.03) / 0.075).square()
    ears = ramp((1 - ear.sqrt()) * 0.04, 1.2 * at.pixel)
    # Rounded frames around both eyes, a bridge and two temples.
    gx, gy = (at.side - EYE_X) / 0.098, (at.y - EYE_Y - 0.012) / 0.070
    round_box = (gx.square().square() + gy.square().square()).sqrt_().sqrt_()
    rim = (1 - round_box) * 0.08
    line = ramp(0.009 - rim.abs(), 1.2 * at.pixel)
    bridge = ramp(0.008 - (at.y - EYE_Y + 0.012).abs(), 1.2 * at.pixel) * (at.side < 0.04)
    temple = ramp(0.007 - (at.y - EYE_Y + 0.012).abs(), 1.2 * at.pixel) * (at.side > 0.225) * at.face
    opacity = column(faces.glasses)
    frame = torch.maximum(torch.maximum(line, bridge), temple) * opacity
    lenses = ramp(rim, 1.2 * at.pixel) * opacity
    return Masks(behind, clothes, neck, ears, at.face, front, frame, lenses)


def _background(faces: SyntheticFaces, size: int) -> Tensor:
    steps = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
    x, y = steps[None, None, :], steps[None, :, None]
    slope = torch.exp(1.1 * column(faces.background_across) * x + 1.1 * column(faces.background_down) * y)
    glow = slope * (1.1 - 0.6 * (x.square() + y.square()))
    return faces.background_colour[:, :, None, None] * glow[:, None]


def _hair_radiance(faces: SyntheticFaces, at: Geometry) -> Tensor:
    """Strands that run outwards from the parting and a soft highlight, (n, 3, size, size)."""
    curl, parting = column(faces.curl), column(faces.parting)
    from_crown_x, from_crown_y = at.sx - 0.1 * parting, at.sy + 0.42
    angle = torch.atan2(from_crown_x, from_crown_y + 0.12)
    reach = (from_crown_x.square() + from_crown_y.square()).sqrt_()
    wave = 1.2 * curl * torch.sin(22 * reach + 5 * parting)
    strands = 0.4 * torch.sin(31 * angle + wave) * torch.sin(7 * angle - 9 * reach)
    strands = strands + 0.3 * torch.sin(53 * angle + 2.1 * wave + 4 * parting)
    strands = strands + 0.4 * curl * torch.sin(60 * at.sx) * torch.sin(55 * at.sy)
    right, down, front = (column(part) for part in light_direction(faces))
    sphere_x, sphere_y = at.sx / 0.36, (at.sy + 0.02) / 0.45
    bulge = (1.1 - sphere_x.square() - sphere_y.square().clamp(max=1)).clamp(min=0.05).sqrt()
    facing = (sphere_x * right + sphere_y * down + bulge * front).clamp(min=-0.25)
    light = column(faces.light) * (facing + 0.25) / 1.25 + column(faces.ambient)
    band = torch.exp(-((reach - 0.17 - 0.05 * (1 + down)) / 0.05).square())
    sheen = column(faces.light) * band * (1 + strands) * (1 - 0.6 * curl)
    lit = light * (1 + 0.38 * strands) + 0.2 * sheen
    return faces.hair_colour[:, :, None, None] * lit[:, None] + 0.0175 * sheen[:, None]


def radiance(faces: SyntheticFaces, size: int) -> Images:
    """Light that reaches the camera, (n, 3, size, size), linear."""
    at = place(faces, size)
    masks = find_masks(faces, at)
    skin = skin_colour(faces)
    right, _, front = (column(part) for part in light_direction(faces))
    canvas = _background(faces, size)
    hair = _hair_radiance(faces, at)
    canvas = paint(canvas, 0.55 * hair, masks.hair_behind)
    light, ambient = column(faces.light), column(faces.ambient)
    round_neck = 0.7 * (front + right * at.sx / 0.16).clamp(min=0)
    round_neck = round_neck * (1 - 0.35 * (at.sx / 0.16).square().clamp(max=1))
    under_chin = 1 - 0.65 * smooth(0.47 - at.sy, 0.14)
    neck = (light * round_neck + ambient) * under_chin
    canvas = paint(canvas, skin[:, :, None, None] * neck[:, None], masks.neck)
    folds = 0.85 + 0.15 * torch.sin(14 * at.sx + 10 * at.sy)
    cloth = (light * (0.6 * front + right * at.sx) + ambient).clamp(min=0.05)
    canvas = paint(canvas, faces.clothing_colour[:, :, None, None] * (cloth * folds)[:, None], masks.clothes)
    ear_light = light * (0.45 * front + 0.5 * right * at.sx.sign()).clamp(min=0) + 0.8 * ambient
    ear_fold = 1 - 0.35 * spot(at.sx.abs() - column(faces.face_width) - 0.008, at.sy - 0.03, 0.012, 0.04)
    ears = (skin * torch.tensor((1.0, 0.88, 0.88)))[:, :, None, None] * (ear_light * ear_fold)[:, None]
    canvas = paint(canvas, ears, masks.ears)
    reach = size // 24
    cast = torch.nn.functional.avg_pool2d(masks.hair, 2 * reach + 1, 1, reach, count_include_pad=False)
    canvas = paint(canvas, face_layer(faces, at) * (1 - 0.4 * cast)[:, None], masks.face)
    canvas = paint(canvas, hair, masks.hair)
    canvas = paint(canvas, 0.5 * canvas + 0.02, 0.25 * masks.lenses)
    canvas = paint(canvas, torch.full_like(skin, 0.02), masks.frame)
    tint = torch.stack((faces.warmth, torch.zeros_like(faces.warmth), -faces.warmth), dim=1)
    return canvas * torch.exp(tint)[:, :, None, None]
