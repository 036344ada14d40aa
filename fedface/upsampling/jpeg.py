"""A baseline JPEG round trip as a known degradation: what a photo has lost when it was stored and read again.

Called from `upsampling.degrade`. Does what libjpeg does, in its fixed-point numbers, so that the pixels are those
of a real file: borders filled with the last pixels, chroma enlarged by a triangle filter, the integer transform.
Entropy coding loses nothing and is left out.

Source: ITU-T T.81 (1992), Annex K.1 for the tables; ITU-T T.871 for YCbCr; Loeffler, Ligtenberg and Moschytz
(1989) for the transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from fedface.tensor_types import Images, LowImages

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# Whole numbers: 1 is 2**16 in the colour matrices, 2**13 in the transform. Rows of colour differences sum to 0.
TO_YCBCR = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
FROM_YCBCR = ((65536, 0, 91881), (65536, -22554, -46802), (65536, 116130, 0))
COLOUR_ONE, WAVE_ONE = 2**16, 2**13


@dataclass(frozen=True)
class Jpeg:
    """Stored as a baseline JPEG and read again; the size stays. Works on pictures of any size.

    Values are rounded to 8 bits and clamped to [0, 1], as a file does. The gradient is that of the same journey
    without rounding and clamping ("straight through"): exactly 1 where chroma has the full size, otherwise that
    of sharing chroma among four pixels and enlarging it again.
    """

    kind: ClassVar[str] = "jpeg"

    quality: int  # 1 to 100, as libjpeg counts
    chroma: Literal["4:4:4", "4:2:0"] = "4:2:0"  # full size, or half of it along both sides

    factor: ClassVar[int] = 1
    spread: ClassVar[float] = 0.0
    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}")
        if self.chroma not in ("4:4:4", "4:2:0"):
            raise ValueError(f"chroma must be 4:4:4 or 4:2:0, got {self.chroma}")

    def low_side(self, size: int) -> int:
        """The measured side: as before."""
        return size

    def apply(self, images: Images) -> LowImages:
        """Store and read again: (n, 3, h, w) -> (n, 3, h, w), multiples of 1/255 in [0, 1].

        Raises:
            ValueError: The images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (n, 3, h, w), got {tuple(images.shape)}")
        with torch.no_grad():
            read = self._stored(images)
        if not images.requires_grad:
            return read
        smooth = images if self.chroma == "4:4:4" else _shared_chroma(images)
        return read + (smooth - smooth.detach())

    def _stored(self, images: Images) -> LowImages:
        """In float64, which holds all the whole numbers below exactly."""
        planes = _colours((images.double() * 255).round().clamp(0, 255), TO_YCBCR)
        # The file's offset of 128 for chroma is left out: the transform takes it off again. Halves go down there.
        luma, chroma = (planes[:, :1] + 0.5).floor() - 128, (planes[:, 1:] - 0.5).ceil()
        steps = quantisers(CHROMINANCE, self.quality)
        luma = _coded(luma, quantisers(LUMINANCE, self.quality)) + 128
        match self.chroma:
            case "4:4:4":
                chroma = _coded(chroma, steps)
            case "4:2:0":
                half = _coded(_floored(_halved(chroma), 0.25, 0.5), steps)
                chroma = _floored(_doubled(half, images), 0.5, 0.4375)[
                    ..., : images.shape[2], : images.shape[3]
                ]
            case _:
                assert_never(self.chroma)
        shifts = _colours(torch.cat((torch.zeros_like(luma), chroma), dim=1), FROM_YCBCR)
        return ((luma + (shifts + 0.5).floor()).clamp(0, 255) / 255).to(images)


@lru_cache(maxsize=16)
def quantisers(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """The step of each coefficient, (8, 8): a table of Annex K scaled as libjpeg scales it for a quality."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).double()


@lru_cache(maxsize=1)
def waves() -> Tensor:
    """sqrt(8) times the 8-point cosine transform, (frequency, place), as sums of constants of 13 bits.

    The constants are those of the factorisation by Loeffler et al., in which libjpeg rounds each by itself, so
    that some entries differ from the rounded cosine by one.
    """
    turn = [0.541196100, 0.765366865, 1.847759065]
    odd = [1.175875602, 0.899976223, 2.562915447, 1.961570560, 0.390180644]
    straight = [0.298631336, 2.053119869, 3.072711026, 1.501321110]
    a, b, c = (round(x * WAVE_ONE) for x in turn)
    e, f, g, h, i = (round(x * WAVE_ONE) for x in odd)
    p, q, r, s = (round(x * WAVE_ONE) for x in straight)
    half = torch.tensor(
        [  # the first four places, outermost first; the others mirror them, odd frequencies with a minus
            [WAVE_ONE, WAVE_ONE, WAVE_ONE, WAVE_ONE],
            [e - f - i + s, e, e - i, e - f],
            [a + b, a, -a, -a - b],
            [e, e - g - h + r, e - g, e - h],
            [WAVE_ONE, -WAVE_ONE, -WAVE_ONE, WAVE_ONE],
            [e - i, e - g, e - g - i + q, e],
            [a, a - c, c - a, -a],
            [e - f, e - h, e, e - f - h + p],
        ],
        dtype=torch.float64,
    )
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)[:, None]
    return torch.cat((half, sign * half.flip(1)), dim=1)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Divide by 2**bits and round, halves up."""
    return (numbers / (1 << bits) + 0.5).floor()


def _coded(planes: Tensor, steps: Tensor) -> Tensor:
    """Whole numbers in [-128, 127] -> what is read back, (n, c, h, w): transform, round to steps, transform back."""
    height, width = planes.shape[2:]
    wave, steps = waves().to(planes), steps.to(planes)
    whole = _extended(planes, 8, 8)
    down, across = whole.shape[2] // 8, whole.shape[3] // 8
    blocks = whole.reshape(*planes.shape[:2], down, 8, across, 8).transpose(3, 4)
    # Two more bits are kept between rows and columns; coefficients are eighths; halves go away from zero.
    eighths = _shifted(wave @ _shifted(blocks @ wave.T, 11), 15)
    levels = eighths.sign() * (eighths.abs() / (8 * steps) + 0.5).floor()
    read = _shifted(_shifted(wave.T @ (levels * steps), 11) @ wave, 18).clamp(-128, 127)
    return read.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def _extended(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column up to multiples of `rows` and `columns`."""
    below, right = -planes.shape[2] % rows, -planes.shape[3] % columns
    return functional.pad(planes, (0, right, 0, below), mode="replicate")


def _halved(planes: Tensor) -> Tensor:
    """The mean of each 2 x 2 pixels; beyond the right border as many columns as whole blocks need."""
    return functional.avg_pool2d(_extended(planes, 2, 16), 2)


def _doubled(planes: Tensor, images: Images) -> Tensor:
    """Enlarge twice: three quarters of the nearest pixel and a quarter of the next, along both sides.

    Leaves out the columns that only filled blocks of the images.
    """
    used = planes[..., : math.ceil(images.shape[2] / 2), : math.ceil(images.shape[3] / 2)]
    # libjpeg repeats pixels where a row has two or fewer.
    mode = "bilinear" if used.shape[3] > 2 else "nearest"
    return functional.interpolate(used, scale_factor=2.0, mode=mode)


def _floored(planes: Tensor, even: float, odd: float) -> Tensor:
    """Round down after adding one bias in even columns and another in odd ones, so that rounding does not drift."""
    return (planes + torch.tensor([even, odd]).to(planes).repeat(planes.shape[3] // 2)).floor()


def _shared_chroma(images: Images) -> Images:
    """4:2:0 without rounding: brightness stays, colour differences are halved and doubled; differentiable."""
    planes = _colours(images, TO_YCBCR)
    chroma = _doubled(_halved(planes[:, 1:]), images)[..., : images.shape[2], : images.shape[3]]
    return _colours(torch.cat((planes[:, :1], chroma), dim=1), FROM_YCBCR)


def _colours(images: Tensor, matrix: tuple[tuple[int, ...], ...]) -> Tensor:
    """Every pixel times a colour matrix, (n, 3, h, w)."""
    numbers = torch.tensor(matrix, dtype=torch.float64) / COLOUR_ONE
    return torch.einsum("ij,njhw->nihw", numbers.to(images), images)
