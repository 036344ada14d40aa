"""Which protocol protects a run's sums: plain, masked or homomorphic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.aggregation.homomorphic import HomomorphicDevice, HomomorphicKeys, HomomorphicServer
from fedface.aggregation.masked_device import MaskedDevice
from fedface.aggregation.masked_server import MaskedServer
from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    MaskedConfig,
    PlainConfig,
    SumContext,
)
from fedface.aggregation.plain import PlainAggregation
from fedface.aggregation.sums import CombinedDevice, CombinedServer, DeviceSum, ServerSum
from fedface.errors import AggregationError
from fedface.privacy.plan import DPParameters

LARGEST_PLAIN = 1e3  # public ranges; numbers of other sums are clamped to 1


@dataclass(frozen=True, kw_only=True)
class DeviceKeys:
    """What a device needs for protected sums, beside what is public."""

    signing: Ed25519PrivateKey | None = None  # of masked sums, its own
    shared: HomomorphicKeys | None = None  # of homomorphic sums, the same on every device


def make_keys(config: AggregationConfig, agreement: AggregationParameters) -> HomomorphicKeys | None:
    """The key that the devices of a run share, if the protocol needs one. Never call this on the server."""
    if not isinstance(config, HomomorphicConfig):
        return None
    return HomomorphicKeys.make(config, agreement)


def server_sum(
    config: AggregationConfig,
    agreement: AggregationParameters,
    context: SumContext,
    length: int,
    *,
    dp: DPParameters | None = None,
    stored: Path | None = None,
    fewest: int = 1,
) -> ServerSum:
    """The server's side of one sum of vectors (`length`,), without any key.

    Args:
        dp: Of the vectors: their noise may be distributed.
        fewest: A masked sum of fewer vectors is not revealed.
        stored: The file from which a sum that was interrupted is continued; None: it is not stored.
    """
    match config:
        case PlainConfig():
            plain = PlainAggregation(max_devices=agreement.max_devices)
            return CombinedServer(plain, context.round, length, largest=LARGEST_PLAIN)
        case MaskedConfig():
            return MaskedServer(config, agreement, context, length, dp=dp, stored=stored, fewest=fewest)
        case HomomorphicConfig():
            return CombinedServer(HomomorphicServer(config, agreement), context.round, length, stored=stored)
        case _:
            assert_never(config)


def device_sum(
    config: AggregationConfig,
    agreement: AggregationParameters,
    keys: DeviceKeys,
    context: SumContext | None = None,
    *,
    smallest_cohort: int = 1,
    dp: DPParameters | None = None,
) -> DeviceSum:
    """The side of a device whose owner admits sums of `smallest_cohort` devices and more.

    Args:
        context: What the sum is of, for `protect`; None for the exchanges after it.
        dp: Of the vector, for `protect`: its noise may be distributed.

    Raises AggregationError if a required key is missing.
    """
    match config:
        case PlainConfig():
            return CombinedDevice(PlainAggregation(max_devices=agreement.max_devices))
        case MaskedConfig():
            if keys.signing is None:
                raise AggregationError("masked sums need the device's signing key, got none")
            return MaskedDevice(
                config=config, agreement=agreement, context=context, signing=keys.signing,
                smallest_cohort=smallest_cohort, dp=dp,
            )  # fmt: skip
        case HomomorphicConfig():
            if keys.shared is None:
                raise AggregationError("encrypted sums need the devices' shared key, got none")
            fewest = replace(config, min_devices=max(config.min_devices, smallest_cohort))
            return CombinedDevice(HomomorphicDevice(fewest, agreement, keys.shared))
        case _:
            assert_never(config)
