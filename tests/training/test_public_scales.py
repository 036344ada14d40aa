"""Public scales of a flow's gradients: cached by what they depend on, without keeping the flow alive, never zero."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch

from fedface.models.rectified_flow import FlowConfig, RectifiedFlow
from fedface.randomness import Streams
from fedface.training.flow import FlowTrainingConfig, public_scales

STREAMS = Streams(4)
TINY = FlowConfig(size=16, width=8, multipliers=(1.0, 2.0), group=4, time_width=8, steps=4)
SCALED = FlowTrainingConfig(preconditioner=0.1)


def tiny_flow() -> RectifiedFlow:
    """Weights away from the initial ones, at which most gradients are zero."""
    flow = RectifiedFlow(TINY, STREAMS.generator("weights"))
    rng = STREAMS.generator("moved")
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1)
    return flow


def test_scales_depend_on_the_shape_of_the_same_weights() -> None:
    """The same weights normalised in groups of 4 or of 8 have other gradients, and share nothing."""
    flows = [tiny_flow(), RectifiedFlow(replace(TINY, group=8), torch.Generator())]
    flows[1].load_state_dict(flows[0].state_dict())
    first, second = (public_scales(flow, SCALED) for flow in flows)
    assert first is not None and second is not None
    assert any(not torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_cached_scales_keep_no_flow_alive() -> None:
    """A device's copy is freed when its round ends."""
    flow = tiny_flow()
    stored = weakref.ref(flow)
    public_scales(flow, replace(SCALED, lr=0.123))
    del flow
    gc.collect()
    assert stored() is None


def test_gradients_too_small_or_too_large_for_float32_are_not_scaled() -> None:
    """Weights of 1e-20 and of 1e15 in the last layer: squares underflow or overflow, and scales are ones, not zeros."""
    for size in (1e-20, 1e-12, 1e15, 1e30):
        flow = tiny_flow()
        with torch.no_grad():
            flow.unet.leave.weight.fill_(size)
            flow.unet.norm.weight.fill_(size)
        scales = public_scales(flow, SCALED)
        assert scales is not None
        assert all(bool((scale.isfinite() & (scale > 0)).all()) for scale in scales)
