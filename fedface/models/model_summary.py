"""A model's networks, sizes and hash, for display."""

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
    config: dict[str, Any]  # its hyperparameters


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model."""

    family: str  # a description
    size: int  # height and width of its images in pixels
    networks: tuple[NetworkSummary, ...]
    hash: str  # of all weights, as in `weights_hash`


def summarize(model: Model) -> ModelSummary:
    return ModelSummary(
        family=model.architecture.description,
        size=model.size,
        networks=tuple(_summarize(name, module) for name, module in model.networks.items()),
        hash=weights_hash(*model.modules()),
    )


def format_summary(summary: NetworkSummary) -> str:
    """One line: class, number of weights, and every hyperparameter that is set."""
    settings = ", ".join(
        f"{key.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{key.replace('_', ' ')} {value}"
        for key, value in summary.config.items()
        if key != "kind" and value is not None
    )
    return f"{summary.name}: {summary.network}, {summary.weights:,} weights; {settings}"


def _summarize(name: str, module: nn.Module) -> NetworkSummary:
    weights = sum(part.numel() for part in module.parameters())
    total = sum(value.numel() for value in module.state_dict().values())
    return NetworkSummary(
        name=name,
        network=type(module).__name__,
        weights=weights,
        fixed=total - weights,
        config=dict(encode(module.config)),
    )
