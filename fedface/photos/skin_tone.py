"""Skin tone read from pixels: CIELAB, the individual typology angle (ITA), the Monk scale.

ITA depends on illumination, exposure and white balance as well as on skin: a measurement from an uncontrolled photo
mixes all of them, and every metric that uses it must say so.

Sources: IEC 61966-2-1 (sRGB); CIE 15:2004 (CIELAB, D65); Chardon et al. (1991) and Del Bino & Bernerd (2013)
for ITA and its edges; Monk (2019) for the swatches; Sharma, Wu & Dalal (2005) for CIEDE2000.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from skimage.color import deltaE_ciede2000
from torch import Tensor

from fedface.tensor_types import Images

# The ten published swatches, sRGB, lightest first.
_MONK_HEX = "f6ede4 f3e7db f7ead0 eadaba d7bd96 a07e56 825c43 604134 3a312a 292420".split()
MONK_SWATCHES: Tensor = torch.tensor([list(bytes.fromhex(code)) for code in _MONK_HEX]) / 255

# Names with the ITA in degrees above which they apply, lightest first.
TONE_BINS: tuple[tuple[str, float], ...] = (
    ("very light", 55.0),
    ("light", 41.0),
    ("intermediate", 28.0),
    ("tan", 10.0),
    ("brown", -30.0),
    ("dark", -90.0),
)

_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees

# Patches of an aligned face, (left, top, right, bottom) as fractions of the side: cheeks, then forehead.
_PATCHES = ((0.31, 0.60, 0.39, 0.67), (0.61, 0.60, 0.69, 0.67), (0.44, 0.32, 0.56, 0.39))


def linear_from_srgb(srgb: Tensor) -> Tensor:
    """Linear light from sRGB, any shape; values are clamped to [0, 1]."""
    srgb = srgb.clamp(0, 1)
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def srgb_from_linear(linear: Tensor) -> Tensor:
    """sRGB from linear light, any shape; values are clamped to [0, 1]."""
    linear = linear.clamp(0, 1)
    curve = 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, curve)


def lab_from_srgb(colours: Tensor) -> Tensor:
    """CIELAB (..., 3) from sRGB colours (..., 3) in [0, 1]; D65, 2 degree observer."""
    xyz = linear_from_srgb(colours) @ torch.tensor(_TO_XYZ, dtype=colours.dtype).T
    ratio = xyz / torch.tensor(_WHITE, dtype=colours.dtype)
    edge = 6 / 29
    root = torch.where(ratio > edge**3, ratio.clamp(min=1e-9) ** (1 / 3), ratio / (3 * edge**2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-1)


def srgb_from_lab(lab: Tensor) -> Tensor:
    """sRGB (..., 3) from CIELAB (..., 3): the inverse of `lab_from_srgb`, clamped to the gamut."""
    y = (lab[..., 0] + 16) / 116
    root = torch.stack((y + lab[..., 1] / 500, y, y - lab[..., 2] / 200), dim=-1)
    edge = 6 / 29
    ratio = torch.where(root > edge, root**3, 3 * edge**2 * (root - 4 / 29))
    xyz = ratio * torch.tensor(_WHITE, dtype=lab.dtype)
    return srgb_from_linear(xyz @ torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=lab.dtype)).T)


def srgb_to_lab(images: Images) -> Tensor:
    """CIELAB of pictures: (n, 3, h, w) sRGB in [0, 1] -> (n, 3, h, w) with L* in [0, 100]."""
    return lab_from_srgb(images.movedim(1, -1)).movedim(-1, 1)


def ita_degrees(lab: Tensor) -> Tensor:
    """Individual typology angle, atan2(L* - 50, b*) in degrees: (..., 3) -> (...)."""
    return torch.rad2deg(torch.atan2(lab[..., 0] - 50, lab[..., 2]))


def tone_bin(ita: Tensor) -> list[str]:
    """The name of each angle's bin: (n,) degrees -> n names from TONE_BINS; an edge belongs below."""
    darkest = TONE_BINS[-1][0]
    return [next((name for name, edge in TONE_BINS if angle > edge), darkest) for angle in ita.tolist()]


def srgb_from_monk(tone: Tensor) -> Tensor:
    """The colour at a continuous Monk value, interpolated in CIELAB: (n,) in [1, 10] -> sRGB (n, 3)."""
    swatches = lab_from_srgb(MONK_SWATCHES)
    left = (tone.clamp(1, 10) - 1).floor().clamp(max=8)
    weight = (tone.clamp(1, 10) - 1 - left)[:, None]
    at = left.long()
    return srgb_from_lab(swatches[at] * (1 - weight) + swatches[at + 1] * weight)


def monk_from_lab(lab: Tensor) -> Tensor:
    """The Monk value of the nearest point on the polyline of swatches: (..., 3) -> (...) in [1, 10].

    Swatches 1 to 4 lie within 10 units of L* of each other and their hue goes to and fro, so errors of a
    unit or so are common there and say little; compare `delta_e` too.
    """
    swatches = lab_from_srgb(MONK_SWATCHES.double()).to(lab)
    start, step = swatches[:-1], swatches[1:] - swatches[:-1]
    offset = lab[..., None, :] - start
    along = ((offset * step).sum(-1) / (step * step).sum(-1)).clamp(0, 1)
    miss = (offset - along[..., None] * step).square().sum(-1)
    nearest = miss.argmin(-1)
    return 1 + nearest + along.gather(-1, nearest[..., None]).squeeze(-1)


def delta_e(lab_a: Tensor, lab_b: Tensor) -> Tensor:
    """The CIEDE2000 difference of colours: two (..., 3) CIELAB -> (...), 1 is just visible."""
    pair = (lab_a.double().cpu().numpy(), lab_b.double().cpu().numpy())
    difference = deltaE_ciede2000(*pair)  # type: ignore[no-untyped-call]
    return torch.as_tensor(difference, dtype=lab_a.dtype)


@dataclass(frozen=True)
class ToneReading:
    """What the skin patches of n aligned faces show; light and camera are mixed into it."""

    lab: Tensor  # (n, 3) CIELAB
    ita: Tensor  # (n,) degrees
    monk: Tensor  # (n,) Monk scale, continuous in [1, 10]


def measure_tone(images: Images) -> ToneReading:
    """Read skin tone from aligned faces (FFHQ crop: eyes near 0.47, mouth near 0.72 of the height).

    The median colour of each patch (two cheeks, forehead), then, per channel, the median of the three: one
    patch under hair, glasses or shadow does not decide. ITA and Monk of the reading move with illumination,
    exposure and white balance; only under neutral light do they tell skin.

    Args:
        images: (n, 3, h, w) sRGB in [0, 1]; values outside are clamped.

    Returns:
        Readings of n faces.
    """
    height, width = images.shape[-2:]
    patches = []
    for left, top, right, bottom in _PATCHES:
        rows = slice(int(top * height), max(int(top * height) + 1, round(bottom * height)))
        columns = slice(int(left * width), max(int(left * width) + 1, round(right * width)))
        # Contiguous: torch 2.13's median reads foreign memory along an expanded dimension.
        patch = images[:, :, rows, columns].flatten(2).contiguous()
        patches.append(patch.median(dim=2).values)
    lab = lab_from_srgb(torch.stack(patches, dim=1)).median(dim=1).values
    return ToneReading(lab=lab, ita=ita_degrees(lab), monk=monk_from_lab(lab))
