"""The parameters of a synthetic face, and the smooth map from standard normals to them.

Every parameter is a quantile function of its own standard normal (a Gaussian copula with the identity as its
correlation), so tone is independent of everything else: hair and iris colour, light, camera and background. Unlike in
the world, which is what makes an audit unconfounded.
Source of the tones: the Monk Skin Tone scale (Monk 2019), ten published sRGB swatches, see photos/skin_tone.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedface.validation import Fraction, checked


@dataclass(frozen=True, kw_only=True)
class SyntheticFaces:
    """n faces as a struct of arrays: float32, (n,) each, colours (n, 3) in linear light in [0, 1].

    Lengths are fractions of the image's side, angles are radians, shares lie in [0, 1].
    """

    tone: Tensor  # Monk scale, continuous in [1, 10]
    # light
    azimuth: Tensor  # radians, positive from the right of the image
    elevation: Tensor  # radians, positive from above
    light: Tensor  # irradiance of the key light, about 0.7
    ambient: Tensor  # irradiance from everywhere, about 0.4
    warmth: Tensor  # white-balance error, 0 is daylight, positive is orange
    # camera
    exposure: Tensor  # stops
    dynamic_range: Tensor  # stops between white and the darkest level that differs from black
    sensor_noise: Tensor  # standard deviation at mid-grey, linear light
    gamma: Tensor  # exponent on top of sRGB's curve, 1 is none
    yaw: Tensor  # pose
    pitch: Tensor
    roll: Tensor
    # expression
    smile: Tensor  # [-1, 1]
    mouth_open: Tensor  # share
    brow_raise: Tensor  # [-1, 1]
    gaze: Tensor  # [-1, 1]
    # shape
    face_width: Tensor  # half width of the face
    jaw: Tensor  # taper towards the chin
    chin: Tensor  # height of the lower face
    cheek: Tensor  # relief of the cheekbones
    age: Tensor  # share: folds and bags
    eye_size: Tensor  # factor
    eye_spacing: Tensor  # factor
    eye_openness: Tensor  # factor
    iris_colour: Tensor
    nose_width: Tensor  # factor
    nose_length: Tensor  # factor
    lip_fullness: Tensor  # factor
    mouth_width: Tensor  # factor
    brow_thickness: Tensor  # factor
    shine: Tensor  # strength of the skin's specular reflection
    # hair
    hair_amount: Tensor  # share: 0 is bald
    hair_length: Tensor  # share: 0 ends above the ears, 1 below the shoulders
    hair_volume: Tensor  # thickness
    hairline: Tensor  # height of the forehead's end, negative is up
    fringe: Tensor  # share: 1 covers the forehead
    parting: Tensor  # [-1, 1]: which side the hair falls to
    curl: Tensor  # share
    hair_colour: Tensor
    beard: Tensor  # share: 0 is shaved
    glasses: Tensor  # share: opacity of the frame
    background_colour: Tensor  # around the face
    background_across: Tensor  # [-1, 1]: brightness slope to the right
    background_down: Tensor  # [-1, 1]: brightness slope downwards
    clothing_colour: Tensor

    def __post_init__(self) -> None:
        count = len(self.tone)
        for field in fields(self):
            expected = (count, 3) if field.name.endswith("_colour") else (count,)
            shape = tuple(getattr(self, field.name).shape)
            if shape != expected:
                raise ValueError(f"{field.name} must have shape {expected}, got {shape}")

    def __len__(self) -> int:
        return len(self.tone)

    def __getitem__(self, index: slice | Tensor) -> SyntheticFaces:
        """Some of the faces: a slice, a boolean mask (n,) or a tensor of positions (m,)."""
        return SyntheticFaces(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
@checked
class ToneMix:
    """The distribution of skin tones: a share of light faces (Monk 1 to 5), the rest dark (6 to 10).

    Uniform inside each range; the two are joined by a steep crossing that holds 2 % of the rarer range.
    """

    light_fraction: Fraction

    def tones(self, uniform: Tensor) -> Tensor:
        """The quantile function: any shape in [0, 1] -> Monk scale in [1, 10], increasing and continuous.

        Exactly `light_fraction` of the unit interval maps below 5.5.
        """
        share = self.light_fraction
        if share in (0.0, 1.0):
            return uniform * 4 + (1.0 if share == 1.0 else 6.0)
        edge = 0.02 * min(share, 1 - share)
        light = 1 + 4 * uniform / (share - edge)
        crossing = 5.5 + (uniform - share) / (2 * edge)
        dark = 10 - 4 * (1 - uniform) / (1 - share - edge)
        not_light = torch.where(uniform < share + edge, crossing, dark)
        return torch.where(uniform < share - edge, light, not_light).clamp(1, 10)


Quantile = Callable[[Tensor], Tensor]


def _bell(centre: float, std: float, reach: float) -> Quantile:
    """Normal-like around `centre`, never further from it than `reach`."""
    return lambda normal: centre + reach * torch.tanh(normal * (std / reach))


def _even(low: float, high: float) -> Quantile:
    """Uniform between two ends."""
    return lambda normal: low + (high - low) * torch.special.ndtr(normal)


def _some(share: float, softness: float) -> Quantile:
    """Near 1 for about `share` of faces, near 0 for the others, with a soft crossing."""
    threshold = float(torch.special.ndtri(torch.tensor(1 - share)))
    return lambda normal: torch.sigmoid((normal - threshold) / softness)


# A column of the normals that no parameter reads; without it every bundled network would change.
UNUSED = "unused"
_SCALARS: dict[str, Quantile] = {
    "azimuth": _bell(0.0, 0.75, 1.35),
    "elevation": _bell(0.4, 0.3, 0.75),
    "light": _even(0.5, 1.1),
    "ambient": _even(0.18, 0.42),
    "warmth": _bell(0.0, 0.12, 0.3),
    "exposure": _bell(-0.2, 0.4, 1.0),
    "dynamic_range": _even(7.0, 13.0),
    "sensor_noise": _even(0.002, 0.02),
    "gamma": _bell(0.97, 0.05, 0.12),
    UNUSED: _even(0.0, 1.0),
    "yaw": _bell(0.0, 0.18, 0.42),
    "pitch": _bell(0.0, 0.08, 0.2),
    "roll": _bell(0.0, 0.03, 0.08),
    "smile": _bell(0.35, 0.45, 0.65),
    "mouth_open": _some(0.35, 0.35),
    "brow_raise": _bell(0.0, 0.4, 1.0),
    "gaze": _bell(0.0, 0.3, 1.0),
    "face_width": _bell(0.283, 0.012, 0.03),
    "jaw": _bell(0.10, 0.08, 0.2),
    "chin": _bell(0.375, 0.015, 0.035),
    "cheek": _bell(1.0, 0.35, 0.9),
    "age": _even(0.0, 1.0),
    "eye_size": _bell(1.0, 0.08, 0.2),
    "eye_spacing": _bell(1.0, 0.025, 0.06),
    "eye_openness": _bell(1.0, 0.16, 0.4),
    "nose_width": _bell(1.0, 0.15, 0.35),
    "nose_length": _bell(1.0, 0.05, 0.12),
    "lip_fullness": _bell(1.0, 0.22, 0.5),
    "mouth_width": _bell(1.0, 0.08, 0.2),
    "brow_thickness": _bell(1.0, 0.25, 0.6),
    "shine": _even(0.4, 1.2),
    "hair_amount": _some(0.9, 0.08),
    "hair_length": _some(0.45, 0.35),
    "hair_volume": _even(0.01, 0.075),
    "hairline": _bell(-0.265, 0.025, 0.06),
    "fringe": _some(0.2, 0.2),
    "parting": _bell(0.0, 0.5, 1.0),
    "curl": _even(0.0, 1.0),
    "beard": _some(0.2, 0.25),
    "glasses": _some(0.13, 0.07),
    "background_across": _bell(0.0, 0.4, 1.0),
    "background_down": _bell(0.0, 0.4, 1.0),
}

# Blond, light brown, brown, dark brown, black; dark brown, brown, hazel, green, blue. Linear light.
_HAIR = (
    (0.55, 0.38, 0.17),
    (0.27, 0.16, 0.075),
    (0.10, 0.055, 0.03),
    (0.035, 0.022, 0.016),
    (0.014, 0.012, 0.012),
)
_IRIS = (
    (0.035, 0.016, 0.008),
    (0.09, 0.04, 0.015),
    (0.17, 0.10, 0.03),
    (0.12, 0.16, 0.07),
    (0.12, 0.22, 0.34),
)

# The tone, one for each scalar, 1 for the iris, 3 each for hair, background and clothing.
NORMALS: int = 1 + len(_SCALARS) + 1 + 9


def _along(stops: tuple[tuple[float, ...], ...], place: Tensor) -> Tensor:
    """Colours (n, 3) on the polyline through `stops`, at places (n,) in [0, 1]."""
    table = torch.tensor(stops, dtype=place.dtype)
    scaled = place.clamp(0, 1) * (len(stops) - 1)
    left = scaled.floor().clamp(max=len(stops) - 2)
    weight = (scaled - left)[:, None]
    return table[left.long()] * (1 - weight) + table[left.long() + 1] * weight


def _tinted(brightness: Tensor, warm: Tensor, green: Tensor) -> Tensor:
    """Colours (n, 3) of a given brightness (n,), tinted along two axes of log chroma (n,)."""
    tint = torch.stack((warm - green, 2 * green, -warm - green), dim=1)
    return (brightness[:, None] * torch.exp(tint)).clamp(0, 1)


def _hair_colour(normals: Tensor) -> Tensor:
    melanin, red, grey = torch.special.ndtr(normals[:, 0]) ** 0.6, normals[:, 1], normals[:, 2]
    pigment = _along(_HAIR, melanin) * torch.exp(torch.tanh(red)[:, None] * torch.tensor((0.2, -0.1, -0.25)))
    silver = torch.sigmoid((grey - 1.4) / 0.2)[:, None]
    return (pigment * (1 - silver) + 0.36 * silver).clamp(0, 1)


def faces_from_normals(normals: Tensor, tones: ToneMix) -> SyntheticFaces:
    """The deterministic, smooth map from standard normals to faces.

    Args:
        normals: (n, NORMALS) float32; column 0 is the tone, each other column feeds one parameter.
        tones: The distribution of the tone on the Monk scale.

    Raises:
        ValueError: The second dimension is not NORMALS.
    """
    if normals.ndim != 2 or normals.shape[1] != NORMALS:
        raise ValueError(f"normals must have shape (n, {NORMALS}), got {tuple(normals.shape)}")
    normals = normals.float()
    scalars = {
        name: quantile(normals[:, 1 + place])
        for place, (name, quantile) in enumerate(_SCALARS.items())
        if name != UNUSED
    }
    iris, hair, wall, cloth = torch.split(normals[:, 1 + len(_SCALARS) :], [1, 3, 3, 3], dim=1)
    wall_light = 0.04 + 0.66 * torch.special.ndtr(wall[:, 0]) ** 1.3
    cloth_light = 0.02 + 0.6 * torch.special.ndtr(cloth[:, 0]) ** 2
    return SyntheticFaces(
        tone=tones.tones(torch.special.ndtr(normals[:, 0])),
        iris_colour=_along(_IRIS, torch.special.ndtr(iris[:, 0])),
        hair_colour=_hair_colour(hair),
        background_colour=_tinted(wall_light, 0.35 * torch.tanh(wall[:, 1]), 0.15 * torch.tanh(wall[:, 2])),
        clothing_colour=_tinted(cloth_light, 0.6 * torch.tanh(cloth[:, 1]), 0.25 * torch.tanh(cloth[:, 2])),
        **scalars,
    )


def sample_faces(count: int, tones: ToneMix, rng: torch.Generator) -> SyntheticFaces:
    """`count` independent faces; the same state of the rng gives the same faces."""
    return faces_from_normals(torch.randn(count, NORMALS, generator=rng), tones)


def neutral_light(faces: SyntheticFaces) -> SyntheticFaces:
    """The same faces under frontal, matte (cross-polarised) daylight and a faultless camera.

    Its strength is such that the cheeks and the forehead reflect, on average, what skin of their reflectance would
    under white light of strength 1, so that tone can be read from brightness. Pose, expression,
    hair and glasses stay.
    """
    same = torch.zeros_like(faces.tone)
    return replace(
        faces,
        azimuth=same,
        elevation=same,
        light=same + 0.66,
        ambient=same + 0.53,
        warmth=same,
        exposure=same,
        dynamic_range=same + 16,
        sensor_noise=same,
        gamma=same + 1,
        shine=same,
    )
