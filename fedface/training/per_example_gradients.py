"""Sums of clipped per-unit gradients, from one ordinary forward and backward pass a microbatch where that is exact.

Called from training/dp_sgd.py; pure functions, which know nothing of noise, coins or prices.

Two ways to the same numbers. *Layer by layer*: one pass over the microbatch stops at the outputs of convolutions,
fully connected layers and group normalisations; each photo's own gradient of a weight is then a contraction of what
the layer read with what its output's gradient is (Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019,
arXiv:1912.06015). *Whole network*: torch.func.vmap over torch.func.grad, which knows every operation and costs more.

Which one is decided by the network at hand and never by trust: autograd's own record of the loss is searched for
ways to a trained weight that were not understood (a weight read outside its layer, an adapter, a scalar, a gradient
within the loss), and if there is one the whole network is differentiated instead. What no pass over a batch can see
is a network that mixes the photos of a batch: `private_steps.check_per_example_gradients` refuses those before the
first step.

Norms are those of the vectors that are added, number for number, so that one unit adds at most `clip_norm` whatever
the gradient was rounded to. Ghost norms (Li et al. 2022, arXiv:2110.05679; Bu et al. 2022, arXiv:2205.10683) save the
vectors and lose that: where positions cancel, the norm that they find can be shorter than the vector. They are used
for what cannot cancel, the one outer product that a photo leaves in a fully connected layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedface.tensor_types import Images, KeptImages, in_floats
from fedface.training.layer_gradients import LayerRecorder, RecordedLayer
from fedface.training.unit_clipping import ClippedSumAccumulator, MicrobatchGradients, OuterProduct

# (network, photos (n, ...)) or (network, photos (n, ...), draws (n, ...)) -> one loss per photo, (n,)
PerExampleLoss = Callable[..., Tensor]
Draw = Callable[[int], Tensor]  # how many photos -> one row of fresh draws per photo, (n, ...)
Rows = tuple[Tensor, ...]  # photos, or photos and draws


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step changes, by name, in the order of `module.parameters()`."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def clipped_unit_sum(
    module: nn.Module,
    loss: PerExampleLoss,
    photos: KeptImages,
    *,
    clip_norm: float,
    units: Tensor | None = None,
    draw: Draw | None = None,
    scales: Sequence[Tensor] | None = None,
    microbatch: int = 32,
) -> list[Tensor]:
    """The sum over units of their photos' summed gradients, each unit's scaled down to length `clip_norm`.

    Guarantees:
        * One unit more or less moves the sum by at most `clip_norm`, up to float32 roundings within a microbatch and
          one of the whole sum, of about n / 2^24 clip norms each.
        * A unit with a number that is not finite adds nothing.
        * What one unit adds does not depend on the others, to the last bit, if the loss keeps photos apart.
        * The gradients of exactly `microbatch` pictures, and the sum of one unit, are in memory at once.

    Args:
        module: The network; neither its weights nor its `.grad` fields change.
        loss: One loss per photo; photo i's loss must depend on photo i alone, and rows of what the network is shown
            must stand photo by photo.
        photos: Shape (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        clip_norm: Longest gradient of one unit, > 0, over all weights, after scaling.
        units: Which unit each photo belongs to, (n,) int64, a unit's photos side by side; None: each its own.
        draw: Gives the loss's own draws, fresh for every microbatch, one row per picture.
        scales: Public factors of the gradient's numbers, one tensor (*weight.shape) per trained parameter.
        microbatch: How many photos are differentiated at once, >= 1; units may straddle.

    Returns:
        One tensor (*weight.shape) per trained parameter, in the order of `module.parameters()`.

    Raises:
        ValueError: A number out of bounds, units of another length, or a unit's photos not side by side.
    """
    if microbatch < 1 or not clip_norm > 0:
        raise ValueError(f"microbatch must be >= 1 and clip_norm > 0, got {microbatch} and {clip_norm}")
    if units is not None:
        _check_side_by_side(photos, units)
    weights = list(trainable_parameters(module).values())
    clipping = ClippedSumAccumulator(weights, clip_norm, scales)
    layerwise = True
    for start in range(0, max(1, len(photos)), microbatch):
        part = in_floats(photos[start : start + microbatch].detach())
        shown = _filled(part, microbatch)
        rows = (shown,) if draw is None else (shown, draw(microbatch))
        found = None
        if layerwise:
            found = _layer_by_layer(module, loss, weights, rows, units is None and scales is None)
        layerwise = found is not None
        gradients = _first(found or MicrobatchGradients(vmap_gradients(module, loss, rows), []), len(part))
        if units is None:
            clipping.add(gradients)
        elif len(part):
            clipping.add_units(gradients.each, units[start : start + microbatch])
    clipping.end_unit()
    return clipping.totals()


def _filled(photos: Images, microbatch: int) -> Images:
    """Always as many pictures, grey ones after the photos.

    How a kernel rounds hangs on how many rows there are, and a hostile network can make roundings as long as
    gradients: with a fixed number, one photo more changes nothing about another's gradient, to the last bit (a test
    holds that for each of our networks). Nor does the memory of a step tell how many joined.
    """
    grey = photos.new_full((microbatch - len(photos), *photos.shape[1:]), 0.5)
    return torch.cat([photos, grey]) if len(grey) else photos


def _first(found: MicrobatchGradients, count: int) -> MicrobatchGradients:
    """The gradients of the first photos, without those of the grey pictures behind."""
    outers = [replace(outer, out=outer.out[:count], seen=outer.seen[:count]) for outer in found.outers]
    return MicrobatchGradients([part[:count] for part in found.each], outers)


def _check_side_by_side(photos: Images, units: Tensor) -> None:
    """Raises ValueError unless there is one unit for each photo, and a unit's photos stand side by side."""
    count = len(torch.unique(units))
    if units.shape != (len(photos),) or len(torch.unique_consecutive(units)) != count:
        raise ValueError(
            f"units must name one unit for each of {len(photos)} photos, a unit's photos side by side, "
            f"got {tuple(units.shape)} with {count} units"
        )


def compute_per_example_gradients(
    module: nn.Module, loss: PerExampleLoss, photos: Images, *, draws: Tensor | None = None
) -> list[Tensor]:
    """The gradient of each photo's own loss, unclipped: never let one leave the device.

    Args:
        module: The network; its `.grad` fields are left alone.
        loss: As for `clipped_unit_sum`.
        photos: Shape (n, ...), n >= 1.
        draws: One row per photo, or None.

    Returns:
        One tensor (n, *weight.shape) per trained parameter.
    """
    rows = (photos.detach(),) if draws is None else (photos.detach(), draws)
    found = _layer_by_layer(module, loss, list(trainable_parameters(module).values()), rows, False)
    return vmap_gradients(module, loss, rows) if found is None else found.each


def deterministic_microbatch(
    module: nn.Module,
    loss: PerExampleLoss,
    shape: Sequence[int],
    microbatch: int,
    *,
    draw: Draw | None = None,
) -> int:
    """The microbatch, if each picture's gradient is the same to the last bit at every place in it; otherwise 1.

    Looks at public random pictures, moved round by one place, and with others beside them.

    Args:
        module: The network, as it will be trained.
        loss: One loss per photo.
        shape: Of one photo, (3, s, s).
        microbatch: How many pictures the steps will differentiate at once, >= 1.
        draw: Gives the loss's own random draws, as the steps will.
    """
    rng = torch.Generator().manual_seed(0)
    pictures, others = torch.rand(2, microbatch, *shape, generator=rng)
    draws = None if draw is None else draw(microbatch)

    def gradients(order: Tensor, shown: Tensor) -> list[Tensor]:
        return compute_per_example_gradients(
            module, loss, shown[order], draws=None if draws is None else draws[order]
        )

    still, round_once = torch.arange(microbatch), torch.arange(microbatch).roll(1)
    first = gradients(still, pictures)
    moved = gradients(round_once, pictures)
    others[0] = pictures[0]
    beside = gradients(still, others)
    same = all(torch.equal(a[round_once], b) for a, b in zip(first, moved, strict=True))
    alone = all(torch.equal(a[0], b[0]) for a, b in zip(first, beside, strict=True))
    return microbatch if same and alone else 1


def is_supported_layerwise(
    module: nn.Module, loss: PerExampleLoss, photos: Images, *, draws: Tensor | None = None
) -> bool:
    """Whether this network's gradients are taken layer by layer; the whole network is differentiated otherwise."""
    rows = (photos.detach(),) if draws is None else (photos.detach(), draws)
    return _layer_by_layer(module, loss, list(trainable_parameters(module).values()), rows, False) is not None


def vmap_gradients(module: nn.Module, loss: PerExampleLoss, rows: Rows) -> list[Tensor]:
    """The gradient of each photo's own loss by vmap(grad): one tensor (n, *weight.shape) per trained parameter."""
    weights = {name: weight.detach() for name, weight in trainable_parameters(module).items()}

    def loss_of_one(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        def network(*inputs: Tensor) -> Any:
            return functional_call(module, weights, inputs)

        losses: Tensor = loss(network, *(part.unsqueeze(0) for part in row))
        return losses.squeeze(0)

    each = vmap(grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
    gradients: dict[str, Tensor] = each(weights, *rows)
    return list(gradients.values())


def _layer_by_layer(
    module: nn.Module, loss: PerExampleLoss, weights: list[nn.Parameter], rows: Rows, keep_outer: bool
) -> MicrobatchGradients | None:
    """The gradients of each photo, or None where this network is not understood."""
    photos = len(rows[0])
    watch = LayerRecorder(weights, photos)
    with torch.enable_grad(), watch:
        losses = loss(module, *rows)
    if losses.shape != (photos,) or any(layer.is_changed() for layer in watch.layers):
        return None
    if not losses.requires_grad:
        return MicrobatchGradients([weight.new_zeros(photos, *weight.shape) for weight in weights], [])
    if not _only_by(watch.layers, losses, weights):
        return None
    outs = [layer.out for layer in watch.layers]
    slopes = torch.autograd.grad(losses.sum(), outs, allow_unused=True) if outs else ()
    uses = [0] * len(weights)
    for layer in watch.layers:
        for source in layer.sources():
            uses[source.weight] += 1
    found: dict[int, Tensor] = {}
    outers: list[OuterProduct] = []
    for layer, slope in zip(watch.layers, slopes, strict=True):
        if slope is None:
            continue
        outer = layer.outer(slope, photos) if keep_outer else None
        if outer is not None and uses[outer.weight] == 1:
            outers.append(outer)
            parts = layer.bias_gradients(slope, photos)
        else:
            parts = layer.gradients(slope, photos)
        for source, part in parts:
            part = part if source.factor == 1.0 else part * source.factor
            found[source.weight] = found[source.weight] + part if source.weight in found else part
    kept = {outer.weight for outer in outers}
    each = [
        found[i].reshape(photos, *weight.shape)
        if i in found
        else weight.new_zeros(photos, *((0,) if i in kept else weight.shape))
        for i, weight in enumerate(weights)
    ]
    return MicrobatchGradients(each, outers)


def _only_by(layers: Sequence[RecordedLayer], losses: Tensor, weights: Sequence[nn.Parameter]) -> bool:
    """Whether every way from the losses to a trained weight ends at one of these layers, as its weight or bias.

    Reads autograd's own record, in which nothing can hide: not a weight read outside its layer, nor an adapter, nor a
    loss that differentiates the network, whose record leads to the weights by the second derivative of a layer.
    """
    learning = {id(weight) for weight in weights}
    entered = {layer.node: layer.seen_node for layer in layers}
    reached, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if id(getattr(node, "variable", None)) in learning:
            return False
        following = [edge for edge, _ in node.next_functions]
        if node in entered:
            seen = entered[node]
            if seen is not None and seen not in following:
                return False
            following = [seen]
        waiting.extend(following)
    return True
