"""Sums of clipped per-unit gradients, from one ordinary forward and backward pass a microbatch where that is exact.

Two ways to the same numbers. *Layer by layer*: one pass over the microbatch stops at the outputs of convolutions,
fully connected layers and group normalisations; each photo's own gradient of a weight is then a contraction of what
the layer read with its output's gradient (Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019,
arXiv:1912.06015). *Whole network*: torch.func.vmap over torch.func.grad, which is right for every operation and slower.

Layer by layer is used only where autograd's own record of the loss shows that it is complete: a weight read outside
its layer, an adapter, a scalar or a gradient within the loss is a path to a trained weight that it would miss, and the
whole network is differentiated instead. No pass over a batch can detect a network that mixes the photos of a batch:
`dp_sgd.check_per_example_gradients` refuses those before the first step.

Norms are those of the vectors that are added, number for number, so that one unit adds at most `clip_norm` however
the gradient was rounded. Ghost norms (Li et al. 2022, arXiv:2110.05679; Bu et al. 2022, arXiv:2205.10683) save the
vectors and lose that: where positions cancel, the computed norm can be smaller than the vector's. They are used
where nothing can cancel, for the one outer product per photo of a fully connected layer.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedface.tensor_types import Images, StoredImages, Vector, in_floats
from fedface.training.layer_gradients import LayerRecorder, RecordedLayer
from fedface.training.unit_clipping import ClippedSumAccumulator, MicrobatchGradients, OuterProduct

# The most numbers that one vector instruction computes (AVX-512). A tensor of so many photos has no rest for which
# kernels use other instructions, which round differently.
LANES = 16
PUBLIC_WEIGHTS = 2  # random networks with which a microbatch is checked
MAX_REMEMBERED = 64  # results of such checks in a process
_deterministic: dict[Hashable, bool] = {}
_LOCK = Lock()

Network = Callable[..., Tensor]
# (network, photos (n, ...)) or (network, photos (n, ...), draws (n, ...)) -> one loss per photo, (n,)
PerExampleLoss = Callable[..., Tensor]
Rows = tuple[Tensor, ...]  # photos, or photos and draws


@dataclass(frozen=True)
class Draws:
    """The random draws that a loss averages over: one row per photo, (n, ...)."""

    sample: Callable[[int, np.random.Generator], Tensor]  # how many photos -> their rows, (n, ...)
    rng: np.random.Generator  # secret in a private step, see training/dp_sgd

    def fresh(self, photos: int) -> Tensor:
        """Rows for one microbatch."""
        return self.sample(photos, self.rng)

    def public(self, photos: int) -> Tensor:
        """The same rows in every call, for checks: with secret draws two checks of one network could differ."""
        return self.sample(photos, np.random.default_rng(0))


@dataclass(frozen=True)
class PerExampleProblem:
    """A network and a loss of photos, differentiated photo by photo; neither weights nor `.grad` fields change."""

    network: nn.Module
    loss: PerExampleLoss  # calls the network it is given; photo i's loss must depend on photo i alone
    draws: Draws | None = None  # the loss's third argument
    scales: Sequence[Tensor] | None = None  # public factors of the gradient, one tensor per trained parameter
    microbatch: int = 16  # how many photos are differentiated at once, >= 1
    # What network, loss and draws follow from but for their weights: `with_deterministic_microbatch` remembers it
    recipe: Hashable = None

    def __post_init__(self) -> None:
        if self.microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {self.microbatch}")

    def weights(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `network.parameters()`."""
        return list(trainable_parameters(self.network).values())

    def rows(self, photos: Images) -> Rows:
        """The arguments of the loss for these photos, with fresh draws where it takes some."""
        return (photos,) if self.draws is None else (photos, self.draws.fresh(len(photos)))


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step changes, by name, in the order of `module.parameters()`."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def clipped_unit_sum(
    problem: PerExampleProblem,
    photos: StoredImages,
    *,
    clip_norm: float,
    units: Tensor | None = None,
    exact: bool = False,
) -> list[Tensor]:
    """The sum over units of their photos' summed gradients, each unit's clipped to L2 norm `clip_norm`.

    Guarantees:
        * One unit more or less moves the sum by at most `clip_norm`, up to one rounding of the whole sum to the dtype
          of the weights, of about n / 2^24 clip norms: it is added up in float64.
        * A unit with a non-finite number adds nothing.
        * What one unit adds does not depend on the others, to the last bit, if the loss keeps photos apart.
        * The gradients of exactly `microbatch` images, and the sum of one unit, are in memory at once.

    Args:
        problem: Rows of what its network reads must be ordered by photo.
        photos: Shape (n, ...), n >= 0; bytes (uint8) become floats a microbatch at a time.
        clip_norm: Largest L2 norm of one unit's gradient over all weights, after scaling, > 0.
        units: Which unit each photo belongs to, (n,) int64, a unit's photos adjacent; None: each its own. Units may
            straddle microbatches.
        exact: Whether to return the sum in float64 instead, without that rounding.

    Returns:
        One tensor (*weight.shape) per trained parameter, in the order of `network.parameters()`.

    Raises:
        ValueError: A number out of bounds, units of another length, or a unit's photos not adjacent.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0, got {clip_norm}")
    if units is not None:
        _check_adjacent(photos, units)
    microbatch = problem.microbatch
    accumulator = ClippedSumAccumulator(problem.weights(), clip_norm, problem.scales)
    layerwise = True
    for start in range(0, max(1, len(photos)), microbatch):
        part = in_floats(photos[start : start + microbatch].detach())
        rows = problem.rows(_padded(part, microbatch))
        found = None
        if layerwise:
            found = _layer_by_layer(problem, rows, units is None and problem.scales is None)
        layerwise = found is not None
        gradients = _first(found or MicrobatchGradients(vmap_gradients(problem, rows), []), len(part))
        if units is None:
            accumulator.add(gradients)
        elif len(part):
            accumulator.add_units(gradients.each, units[start : start + microbatch])
    accumulator.end_unit()
    return accumulator.totals(exact=exact)


def _padded(photos: Images, microbatch: int) -> Images:
    """Pad to a fixed number of images with grey ones.

    How a kernel rounds depends on the number of rows, and a hostile network can make roundings as large as
    gradients: with a fixed number, one photo more changes nothing about another's gradient, to the last bit (tested
    for each of our networks). Nor does the memory of a step reveal how many photos joined.
    """
    grey = photos.new_full((microbatch - len(photos), *photos.shape[1:]), 0.5)
    return torch.cat([photos, grey]) if len(grey) else photos


def _first(gradients: MicrobatchGradients, count: int) -> MicrobatchGradients:
    """The gradients of the first photos, without those of the padding."""
    outers = [
        replace(outer, output_gradient=outer.output_gradient[:count], inputs=outer.inputs[:count])
        for outer in gradients.outers
    ]
    return MicrobatchGradients([part[:count] for part in gradients.each], outers)


def _check_adjacent(photos: Images, units: Tensor) -> None:
    """Raises ValueError unless there is one unit for each photo, and a unit's photos are adjacent."""
    count = len(torch.unique(units))
    if units.shape != (len(photos),) or len(torch.unique_consecutive(units)) != count:
        raise ValueError(
            f"units must name one unit for each of {len(photos)} photos, a unit's photos adjacent, "
            f"got {tuple(units.shape)} with {count} units"
        )


def per_example_gradients(
    problem: PerExampleProblem, photos: Images, draws: Tensor | None = None
) -> list[Tensor]:
    """The gradient of each photo's own loss, unclipped and unscaled: it must not leave the device.

    Args:
        problem: Its `draws`, `scales` and `microbatch` are not used.
        photos: Shape (n, ...), n >= 1.
        draws: One row per photo, or None.

    Returns:
        One tensor (n, *weight.shape) per trained parameter.
    """
    rows = (photos.detach(),) if draws is None else (photos.detach(), draws)
    found = _layer_by_layer(problem, rows, False)
    return vmap_gradients(problem, rows) if found is None else found.each


def with_deterministic_microbatch(problem: PerExampleProblem, shape: Sequence[int]) -> PerExampleProblem:
    """The problem, with a microbatch of 1 unless each photo's gradient is the same to the last bit anywhere in it.

    Other numbers than multiples of `LANES` are not used. Compares the gradients of public random images with those of
    the same images rotated by one place, and with other images beside them. How kernels round depends on shapes, but
    a server's weights can hide it on any images that it knows, and show it on photos. So the gradients of copies with
    public random weights are compared as well. A device uses one thread, which divides no tensor (transport/worker).

    The microbatch decides how long a step takes, so a round must use the one that was rehearsed: images and draws are
    public and fixed, and each network is checked once in a process.

    Args:
        problem: As the steps will differentiate it.
        shape: Of one photo, (3, s, s).
    """
    if problem.microbatch % LANES:
        return replace(problem, microbatch=1)
    draws = None if problem.draws is None else problem.draws.public(problem.microbatch)
    case = (problem.recipe, problem.microbatch, tuple(shape), torch.get_num_threads())

    def found(problems: Iterable[PerExampleProblem], zero_shows: bool) -> bool:
        return all(_is_deterministic(each, shape, draws, zero_shows=zero_shows) for each in problems)

    def remembered(key: Hashable, problems: Iterable[PerExampleProblem], zero_shows: bool) -> bool:
        if problem.recipe is None:
            return found(problems, zero_shows)
        with _LOCK:  # concurrent devices wait for the one that computes
            same = _deterministic.pop(key) if key in _deterministic else found(problems, zero_shows)
            if len(_deterministic) >= MAX_REMEMBERED:  # the oldest: a round's own must outlast it
                del _deterministic[next(iter(_deterministic))]
            _deterministic[key] = same
            return same

    copies = (_with_public_weights(problem, seed) for seed in range(PUBLIC_WEIGHTS))
    own = (case, weights_digest(problem.network))
    same = remembered(case, copies, False) and remembered(own, [problem], True)
    return problem if same else replace(problem, microbatch=1)


def weights_digest(network: nn.Module) -> bytes:
    """SHA-256 of the bytes of every weight and buffer."""
    digest = hashlib.sha256()
    for tensor in (*network.parameters(), *network.buffers()):
        digest.update(tensor.detach().numpy().tobytes())
    return digest.digest()


def _with_public_weights(problem: PerExampleProblem, seed: int) -> PerExampleProblem:
    """The problem of a copy of the network with normal weights that keep the size of what passes a layer."""
    network, rng = copy.deepcopy(problem.network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            inputs = weight[0].numel() if weight.ndim > 1 else 4
            weight.copy_(torch.randn(weight.shape, generator=rng) / max(1, inputs) ** 0.5)
    return replace(problem, network=network)


def _is_deterministic(
    problem: PerExampleProblem, shape: Sequence[int], draws: Tensor | None, *, zero_shows: bool
) -> bool:
    """Whether the gradients of random images do not depend on their place, nor on the others.

    Args:
        zero_shows: Whether gradients that are all zero count as equal; otherwise they show nothing.
    """
    microbatch = problem.microbatch
    rng = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, microbatch, *shape, generator=rng)

    def gradients(order: Tensor, images: Tensor) -> list[Tensor]:
        return per_example_gradients(problem, images[order], None if draws is None else draws[order])

    in_order, rotated = torch.arange(microbatch), torch.arange(microbatch).roll(1)
    first = gradients(in_order, images)
    moved = gradients(rotated, images)
    others[0] = images[0]
    beside = gradients(in_order, others)
    same = all(torch.equal(a[rotated], b) for a, b in zip(first, moved, strict=True))
    alone = all(torch.equal(a[0], b[0]) for a, b in zip(first, beside, strict=True))
    return same and alone and (zero_shows or any(bool(part.any()) for part in first))


def differentiable_gradient(
    module: nn.Module, loss: Callable[[Images], Tensor]
) -> Callable[[Images], Vector]:
    """Photos -> the gradient of their loss over the trained weights, (d,), differentiable in the photos."""
    weights = list(trainable_parameters(module).values())

    def gradient(photos: Images) -> Vector:
        parts = torch.autograd.grad(loss(photos), weights, create_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    return gradient


def vmap_gradients(problem: PerExampleProblem, rows: Rows) -> list[Tensor]:
    """The gradient of each photo's own loss by vmap(grad): one tensor (n, *weight.shape) per trained parameter."""
    weights = {name: weight.detach() for name, weight in trainable_parameters(problem.network).items()}

    def loss_of_one(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        def network(*inputs: Tensor) -> Any:
            return functional_call(problem.network, weights, inputs)

        losses: Tensor = problem.loss(network, *(part.unsqueeze(0) for part in row))
        return losses.squeeze(0)

    each = vmap(grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
    gradients: dict[str, Tensor] = each(weights, *rows)
    return list(gradients.values())


def _layer_by_layer(problem: PerExampleProblem, rows: Rows, keep_outer: bool) -> MicrobatchGradients | None:
    """The gradients of each photo, or None where this network is not supported."""
    photos, weights = len(rows[0]), problem.weights()
    recorder = LayerRecorder(weights, photos)
    with torch.enable_grad(), recorder:
        losses = problem.loss(problem.network, *rows)
    if losses.shape != (photos,) or any(layer.is_changed() for layer in recorder.layers):
        return None
    if not losses.requires_grad:
        return MicrobatchGradients([weight.new_zeros(photos, *weight.shape) for weight in weights], [])
    if not _only_by(recorder.layers, losses, weights):
        return None
    outs = [layer.out for layer in recorder.layers]
    output_gradients = torch.autograd.grad(losses.sum(), outs, allow_unused=True) if outs else ()
    uses = [0] * len(weights)
    for layer in recorder.layers:
        for source in layer.sources():
            uses[source.weight] += 1
    gradients: dict[int, Tensor] = {}
    outers: list[OuterProduct] = []
    for layer, output_gradient in zip(recorder.layers, output_gradients, strict=True):
        if output_gradient is None:
            continue
        outer = layer.outer(output_gradient, photos) if keep_outer else None
        if outer is not None and uses[outer.weight] == 1:
            outers.append(outer)
            parts = layer.bias_gradients(output_gradient, photos)
        else:
            parts = layer.gradients(output_gradient, photos)
        for source, part in parts:
            part = part if source.factor == 1.0 else part * source.factor
            gradients[source.weight] = gradients[source.weight] + part if source.weight in gradients else part
    factored = {outer.weight for outer in outers}
    each = [
        gradients[i].reshape(photos, *weight.shape)
        if i in gradients
        else weight.new_zeros(photos, *((0,) if i in factored else weight.shape))
        for i, weight in enumerate(weights)
    ]
    return MicrobatchGradients(each, outers)


def _only_by(layers: Sequence[RecordedLayer], losses: Tensor, weights: Sequence[nn.Parameter]) -> bool:
    """Whether every path from the losses to a trained weight ends at one of these layers, as its weight or bias.

    Walks autograd's graph, which is complete: a weight read outside its layer, an adapter, and a loss that
    differentiates the network, which reaches the weights through a layer's second derivative, all appear in it.
    """
    trained = {id(weight) for weight in weights}
    inputs = {layer.node: layer.input_node for layer in layers}
    reached, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if id(getattr(node, "variable", None)) in trained:
            return False
        following = [edge for edge, _ in node.next_functions]
        if node in inputs:
            before = inputs[node]
            if before is not None and before not in following:
                return False
            following = [before]
        waiting.extend(following)
    return True
