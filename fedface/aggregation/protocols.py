"""Which protocol protects a run's sums: plain, masked or homomorphic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.aggregation.homomorphic import EncryptedRing, HomomorphicKeys
from fedface.aggregation.masked import Ring, Words
from fedface.aggregation.masked_device import MaskedDevice
from fedface.aggregation.masked_server import MaskedServer
from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    MaskedConfig,
    OwnerTerms,
    PlainConfig,
    SumContext,
)
from fedface.aggregation.plain import PlainAggregation, PlainDevice, PlainServer
from fedface.aggregation.sums import DeviceSum, ServerSum
from fedface.errors import AggregationError
from fedface.privacy.plan import DPParameters

_ANY = OwnerTerms()


@dataclass(frozen=True, kw_only=True)
class DeviceKeys:
    """What a device needs for protected sums, beside what is public."""

    signing: Ed25519PrivateKey | None = None  # of masked and homomorphic sums, its own
    encryption: HomomorphicKeys | None = None  # of homomorphic sums


def make_keys(config: AggregationConfig, agreement: AggregationParameters) -> HomomorphicKeys | None:
    """New keys of homomorphic sums, None for others. Never call this on the server."""
    if not isinstance(config, HomomorphicConfig):
        return None
    return HomomorphicKeys.make(config, agreement)


def sum_ring(
    config: MaskedConfig | HomomorphicConfig,
    agreement: AggregationParameters,
    keys: HomomorphicKeys | None = None,
    *,
    dp: DPParameters | None = None,
) -> Ring:
    """The integers of a sum: with keys a device's, without them the server's."""
    if isinstance(config, HomomorphicConfig):
        return EncryptedRing(config, agreement, keys)
    return Words(config=config, agreement=agreement, dp=dp)


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

    Raises AggregationError or PrivacyError if full sums do not fit.
    """
    if isinstance(config, PlainConfig):
        plain = PlainAggregation(max_devices=agreement.max_devices)
        used = config if context.sum_of == "updates" else PlainConfig()
        return PlainServer(plain, context.round, length, used)
    ring = sum_ring(config, agreement, dp=dp)
    if isinstance(ring, Words):
        ring.noise(length)  # fails before a device is asked
    return MaskedServer(config, ring, context, length, stored=stored, fewest=fewest)


def device_sum(
    config: AggregationConfig,
    agreement: AggregationParameters,
    keys: DeviceKeys,
    context: SumContext | None = None,
    *,
    owner: OwnerTerms = _ANY,
    dp: DPParameters | None = None,
) -> DeviceSum:
    """The side of a device.

    Args:
        owner: What its owner allows now; masked vectors that were computed under other terms do not leave.
        context: What the sum is of, for `protect`; None for the exchanges after it.
        dp: Of the vector, for `protect`: its noise may be distributed.

    Raises AggregationError if a required key is missing.
    """
    if isinstance(config, PlainConfig):
        return PlainDevice(plain=PlainAggregation(max_devices=agreement.max_devices))
    if isinstance(config, HomomorphicConfig) and keys.encryption is None:
        raise AggregationError("homomorphic sums need a key for encryption, got none")
    if keys.signing is None:
        raise AggregationError(f"{config.kind} sums need the device's signing key, got none")
    return MaskedDevice(
        config=config, agreement=agreement, ring=sum_ring(config, agreement, keys.encryption, dp=dp),
        context=context, signing=keys.signing, owner=owner,
        honest=0 if dp is None else dp.honest_devices,
    )  # fmt: skip
