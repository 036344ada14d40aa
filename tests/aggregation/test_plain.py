"""Plain sums are the sums of the updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedface.aggregation.payload import Payload, PlainConfig
from fedface.aggregation.plain import PlainAggregation, PlainServer
from fedface.errors import AggregationError

PLAIN = PlainAggregation(max_devices=4)


def test_the_sum_of_three_vectors_is_their_sum_through_the_wire() -> None:
    """Computed by hand."""
    updates = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25]), torch.tensor([0.0, 4.0])]
    wires = [PLAIN.protect(update, 7).to_bytes() for update in updates]
    total = PLAIN.combine([Payload.from_bytes(wire) for wire in wires])
    assert PLAIN.reveal(total).tolist() == [1.5, 2.25]
    assert (total.count, total.length, total.round) == (3, 2, 7)


def test_an_update_takes_four_bytes_a_weight_and_a_short_header() -> None:
    """float32."""
    payload = PLAIN.protect(torch.zeros(1000), 0)
    assert [len(part) for part in payload.parts] == [4000]
    assert payload.nbytes < 4200


def test_sums_of_sums_lose_no_digits() -> None:
    """1e8 + 1 - 1e8 is 1; in float32 it is 0."""
    big, one = torch.tensor([1e8]), torch.tensor([1.0])
    inner = PLAIN.combine([PLAIN.protect(big, 0), PLAIN.protect(one, 0)])
    outer = PLAIN.combine([inner, PLAIN.protect(-big, 0)])
    assert PLAIN.reveal(outer).tolist() == [1.0]
    assert outer.count == 3


def test_values_that_are_not_finite_are_refused_on_the_device_and_on_the_server() -> None:
    """One device must not corrupt the model."""
    with pytest.raises(AggregationError):
        PLAIN.protect(torch.tensor([float("nan")]), 0)
    good = PLAIN.protect(torch.tensor([1.0]), 0)
    hostile = Payload(kind="plain", header=good.header, parts=(np.float32("inf").tobytes(),))
    with pytest.raises(AggregationError, match="finite"):
        PLAIN.combine([good, hostile])


def test_payloads_that_do_not_fit_are_refused() -> None:
    """Wrong length, round, size, width, kind; too many; none."""
    good = PLAIN.protect(torch.zeros(3), 0)
    for hostile in (
        PLAIN.protect(torch.zeros(4), 0),
        PLAIN.protect(torch.zeros(3), 1),
        Payload(kind="plain", header=good.header, parts=(good.parts[0][:-1],)),
        Payload(kind="plain", header=good.header, parts=good.parts * 2),
        Payload(kind="plain", header=good.header, parts=()),
        Payload(kind="plain", header={**good.header, "width": 5}, parts=good.parts),
        Payload(kind="plain", header={**good.header, "format": 2}, parts=good.parts),
        Payload(kind="plain", header={**good.header, "count": 4}, parts=good.parts),
        Payload(kind="plain", header={**good.header, "count": 0}, parts=good.parts),
        Payload(kind="homomorphic", header=good.header, parts=good.parts),
    ):
        with pytest.raises(AggregationError):
            PLAIN.combine([good, hostile])
    with pytest.raises(AggregationError):
        PLAIN.combine([])
    with pytest.raises(AggregationError):
        PLAIN.combine([good] * 5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PlainConfig(), [5 * 21.8, 0.0]),  # the mean follows one device
        (PlainConfig(rule="median"), [5 * 3.0, 0.0]),
        (PlainConfig(rule="trimmed-mean", trim=0.2), [5 * 3.0, 0.0]),
        (PlainConfig(rule="trimmed-mean", trim=0.1), [5 * 21.8, 0.0]),  # a tenth of five devices is none
    ],
)
def test_one_dishonest_device_of_five_moves_a_sum_and_not_a_robust_rule(
    config: PlainConfig, expected: list[float]
) -> None:
    """1, 2, 3, 4 and 99: computed by hand, and five times the center where a sum is expected."""
    server = PlainServer(PlainAggregation(max_devices=5), 1, 2, config)
    for member, value in enumerate((1.0, 2.0, 3.0, 4.0, 99.0)):
        server.accept(member, PLAIN.protect(torch.tensor([value, 0.0]), 1), f"device {member}")
    result = server.result()
    assert result.total.tolist() == pytest.approx(expected) and result.count == 5
