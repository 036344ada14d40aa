"""JPEG as a known degradation: images written to a JPEG file in memory and read again, with a gradient.

The pixels are those of libjpeg. The gradient is the straight-through estimate of Bengio, Léonard and Courville 2013
(arXiv:1308.3432): that of the identity. docs/upsampling.md compares it with the gradient of chroma subsampling.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedface.tensor_types import Images, LowImages
from fedface.validation import In, checked

SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}  # as Pillow numbers them


@dataclass(frozen=True)
@checked
class Jpeg:
    """Stored as a baseline JPEG and read again; the size stays, whatever it is."""

    kind: ClassVar[str] = "jpeg"

    quality: Annotated[int, In("[1, 100]")]  # as libjpeg counts
    chroma: Literal["4:4:4", "4:2:0"] = "4:2:0"  # full resolution, or half of it along both sides

    factor: ClassVar[int] = 1
    noise_std: ClassVar[float] = 0.0
    linear: ClassVar[bool] = False

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
        return _round_trip(images, self.quality, SUBSAMPLING[self.chroma])


class _StraightThrough(torch.autograd.Function):
    """Pixels through a file, gradients through the identity; also under `torch.func.vmap`."""

    @staticmethod
    def forward(images: Tensor, quality: int, subsampling: int) -> Tensor:
        pixels = (images.detach().float() * 255).round().clamp(0, 255).nan_to_num().byte().permute(0, 2, 3, 1)
        stored = np.empty(pixels.shape, dtype=np.uint8)
        for number, rgb in enumerate(pixels.cpu().numpy()):
            file = io.BytesIO()
            Image.fromarray(rgb).save(file, "JPEG", quality=quality, subsampling=subsampling)
            with Image.open(file, formats=["JPEG"]) as image:
                stored[number] = np.asarray(image.convert("RGB"))
        read = torch.from_numpy(stored).permute(0, 3, 1, 2).to(images) / 255
        return torch.where(images.isnan(), images, read)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        """Nothing is needed for the gradient."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], images: Tensor, quality: int, subsampling: int
    ) -> tuple[Tensor, int]:
        batch = images.movedim(in_dims[0], 0)
        read = _round_trip(batch.flatten(0, 1), quality, subsampling)
        return read.reshape(batch.shape), 0


def _round_trip(images: Tensor, quality: int, subsampling: int) -> Tensor:
    return cast(Tensor, cast(Any, _StraightThrough).apply(images, quality, subsampling))
