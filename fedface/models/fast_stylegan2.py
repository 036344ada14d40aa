"""A StyleGAN2 with constant weights, prepared once so that optimising its inputs is fast.

Preparation: equalised gains are folded into the weights, the energies of demodulation are summed once, weights
lie channels-last and, when asked for, are rounded to bfloat16, which some machines multiply in hardware. The layers
themselves are in models/fast_stylegan2_blocks; docs/speed.md has the measurements behind each choice.

Source: Karras et al. 2020 (arXiv:1912.04958).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedface.models.fast_stylegan2_blocks import FrozenBlock, freeze_block, run_blocks
from fedface.models.generator_protocol import Generator, check_inputs
from fedface.models.stylegan2 import Block, ClassConditioned, StyleGAN2
from fedface.tensor_types import Images, Latents, Styles

Precision = Literal["float32", "bfloat16"]

# On a CPU, activations of one layer beyond this leave the caches, and the allocator asks the system for new pages
# at every call: larger batches are then split, which costs nothing because the weights of such layers are small.
BYTES_AT_ONCE = 8 * 2**20

# Up to this side everything stays float32: a tenth of the work at 256 px, but most of what rounding does to the
# gradients, and all noise maps that PULSE moves.
COARSE_SIDE = 16


def fast_precision(device: torch.device) -> Precision:
    """bfloat16 where this device multiplies matrices in it, float32 elsewhere.

    Read from the hardware, not measured, so that two runs on one machine choose alike.
    """
    match device.type:
        case "cuda":
            supported = torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu" if hasattr(torch.cpu, "get_capabilities"):
            capabilities = torch.cpu.get_capabilities()
            supported = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
        case _:
            supported = False
    return "bfloat16" if supported else "float32"


def prepare_for_search(
    generator: StyleGAN2 | ClassConditioned,
    *,
    precision: Precision | Literal["auto"] = "float32",
    device: torch.device | None = None,
) -> FastStyleGAN2:
    """Prepare a generator for many syntheses with gradients of styles and noise.

    Guarantees:
        * A copy: later changes of the generator do not affect it, and the generator is not changed.
        * In float32, images and gradients equal those of the generator up to rounding (1e-4 relative).
        * Gradients are of first order.

    Args:
        generator: Any StyleGAN2; classes and a fitted prior are included.
        precision: Of activations and weights of the convolutions above 16 px. All below, styles, demodulation
            and the RGB sum are always float32. "auto" asks `fast_precision`.
        device: Where the weights lie; None leaves them where they are.
    """
    copied = copy.deepcopy(generator).requires_grad_(False).eval()
    network = copied.generator if isinstance(copied, ClassConditioned) else copied
    place = network.mapping.w_avg.device if device is None else device
    chosen = fast_precision(place) if precision == "auto" else precision
    low = torch.bfloat16 if chosen == "bfloat16" else torch.float32
    copied.to(place)
    with torch.no_grad():
        blocks = tuple(
            freeze_block(
                cast(Block, network.synthesis.get_submodule(f"b{side}")),
                torch.float32 if side <= COARSE_SIDE else low,
            )
            for side in network.config.sides
        )
    del network.synthesis  # its weights are in the blocks
    return FastStyleGAN2(copied, blocks, chosen, place)


def frozen_copy(generator: Generator, precision: Precision | Literal["auto"] = "float32") -> Generator:
    """A copy with constant weights, in the form that is fastest with gradients of its inputs.

    `precision` is for StyleGAN2 alone. What is not a torch module is returned itself.
    """
    match generator:
        case StyleGAN2() | ClassConditioned():
            return prepare_for_search(generator, precision=precision)
        case nn.Module():
            return copy.deepcopy(generator).requires_grad_(False).eval()
        case _:
            return generator


class FastStyleGAN2:
    """A generator with constant weights, from `prepare_for_search`.

    Styles and noise maps may lie on any device: they are moved to that of the weights, and images back to that of the
    styles.
    """

    def __init__(
        self,
        mapping: StyleGAN2 | ClassConditioned,
        blocks: tuple[FrozenBlock, ...],
        precision: Precision,
        device: torch.device,
    ) -> None:
        self._mapping, self._blocks = mapping, blocks
        self.precision, self.device = precision, device
        self.size, self.latent_width, self.style_slope = (
            mapping.size,
            mapping.latent_width,
            mapping.style_slope,
        )
        self.style_inputs, self.noise_sides = mapping.style_inputs, mapping.noise_sides

    def map(self, latents: Latents, labels: Tensor | None = None) -> Styles:
        label = () if labels is None else (labels.to(self.device),)
        return self._mapping.map(latents.to(self.device), *label).to(latents.device)

    def truncate(self, styles: Styles, psi: float) -> Styles:
        return self._mapping.truncate(styles.to(self.device), psi).to(styles.device)

    def synthesize(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Images:
        check_inputs(self, styles, noise)
        count = styles.shape[0]
        inputs = list(self._inputs(styles.to(self.device), noise))
        limit = BYTES_AT_ONCE if self.device.type == "cpu" else sys.maxsize
        # A finer block never has less than half a coarser one's channels, so that the blocks that fit come first.
        whole = sum(count * block.image_bytes() <= limit for block in self._blocks)
        x = image = None
        if whole:
            x, image = run_blocks(self._blocks[:whole], inputs[:whole], None, None)
        if rest := self._blocks[whole:]:
            split = max(1, limit // max(block.image_bytes() for block in rest))
            parts = []
            for start in range(0, count, split):
                part = slice(start, min(start + split, count))
                own = [[_part(tensor, part, count) for tensor in block] for block in inputs[whole:]]
                parts.append(run_blocks(rest, own, _part(x, part, count), _part(image, part, count))[1])
            image = torch.cat([cast(Tensor, part) for part in parts])
        return ((cast(Tensor, image) + 1.0) / 2.0).contiguous().to(styles.device)

    def _inputs(self, styles: Styles, noise: Sequence[Tensor] | None) -> Iterator[list[Tensor | None]]:
        """Per block, what `run_blocks` takes; small, float32, and left to autograd."""
        used = 0
        for block in self._blocks:
            tensors: list[Tensor | None] = []
            for conv in block.convs:
                style = conv.affine(styles[:, used])
                demod = torch.rsqrt(style.square() @ conv.energy + 1e-8) * conv.gain
                plane = conv.noise if noise is None else noise[used].to(self.device)
                moves = noise is not None and plane.requires_grad
                if noise is not None:
                    plane = plane * conv.strength
                tensors += [style, demod, plane if conv.strength or moves else None]
                used += 1
            if block.colours is not None:
                # The RGB layer shares its style with the next block's first convolution.
                tensors.append(block.colours.affine(styles[:, used]))
            yield tensors


def _part(tensor: Tensor | None, part: slice, count: int) -> Any:
    """Some images of a batch; a tensor that all share is returned whole."""
    return tensor if tensor is None or tensor.shape[0] != count else tensor[part]
