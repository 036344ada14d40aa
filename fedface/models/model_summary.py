"""A model in words and numbers: what it is made of, how large, and the hash that names it.

Called from the command line (`fedface weights show`, `fedface weights import`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedface.codec import encode
from fedface.models.checkpoint import weights_hash
from fedface.models.model import Model


@dataclass(frozen=True, kw_only=True)
class NetworkSummary:
    """One network of a model."""

    name: str  # its place in the model: generator, discriminator, encoder or flow
    network: str  # its class
    weights: int  # numbers that training changes
    fixed: int  # numbers that belong to it and are not trained: noise maps, the mean style
    config: dict[str, Any]  # its shape


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model."""

    family: str  # in words
    size: int  # height and width of its pictures in pixels
    networks: tuple[NetworkSummary, ...]
    hash: str  # of all weights, as in `weights_hash`


def summarize(model: Model) -> ModelSummary:
    """What a model holds, from the networks themselves."""
    return ModelSummary(
        family=model.architecture.description,
        size=model.size,
        networks=tuple(_facts(name, module) for name, module in model.networks.items()),
        hash=weights_hash(*model.modules()),
    )


def format_summary(facts: NetworkSummary) -> str:
    """One line: class, weights, and every figure of its shape that is set."""
    figures = ", ".join(
        f"{key.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{key.replace('_', ' ')} {value}"
        for key, value in facts.config.items()
        if key != "kind" and value is not None
    )
    return f"{facts.name}: {facts.network}, {facts.weights:,} weights; {figures}"


def _facts(name: str, module: nn.Module) -> NetworkSummary:
    weights = sum(part.numel() for part in module.parameters())
    kept = sum(value.numel() for value in module.state_dict().values())
    return NetworkSummary(
        name=name,
        network=type(module).__name__,
        weights=weights,
        fixed=kept - weights,
        config=dict(encode(module.config)),
    )
