"""What secure aggregation costs: masked and homomorphic sums beside plain ones, and beside TenSEAL's CKKS.

Every message of every exchange is made, sent as bytes and read; all devices have the same vector, which shares memory.
Columns: bytes that one device sends and receives for each weight, beside the weights of the model; CPU seconds of one
device and of the server for all devices, on one core; the largest error of the sum beside the bound that quantisation
allows; the memory of the process at its peak. In "homomorphic" sums all devices have one secret key, in "public-key"
ones one device has it; both are masked as well. CKKS has the settings of NVIDIA FLARE: degree 8192, primes of 60, 40
and 40 bits, scale 2^40. A device of the plain protocol is the baseline of all ratios.

    python benchmarks/secure_aggregation.py --weights 1000000 --devices 8 100
    python benchmarks/secure_aggregation.py --weights 1000000 --devices 1000 --dropouts 0 0.1 --protocols masked
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import tenseal
import torch

from fedface.aggregation.payload import (
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    MaskedConfig,
    PlainConfig,
)
from fedface.aggregation.rehearsal import rehearse_protocol

RANGE = 0.1  # R, the public range of a weight
ROW = "| {:>9} | {:>7} | {:>8} | {:<11} | {:>7} | {:>8} | {:>8} | {:>8} | {:>9} | {:>8} | {:>6} |"
HEADS = (
    "weights", "devices", "dropouts", "protocol", "up B/w", "down B/w", "device s", "server s", "error", "bound", "GiB",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One sum."""

    up: float  # bytes for each weight
    down: float
    device: float  # CPU seconds
    server: float
    error: float
    bound: float


def measure(config: AggregationConfig, vector: torch.Tensor, devices: int, dropouts: float) -> Cost:
    """One sum of so many devices, of which a fraction is lost before it sends its masked vector."""
    agreement = AggregationParameters(value_range=RANGE, max_devices=devices)
    gone = frozenset(range(int(dropouts * devices)))
    done = rehearse_protocol(config, agreement, vector, devices, {"masked": gone})
    count = done.result.count
    bits = 0 if isinstance(config, PlainConfig) else config.bits
    return Cost(
        up=done.bytes_up / len(vector),
        down=done.bytes_down / len(vector),
        device=done.seconds_device,
        server=done.seconds_server,
        error=float((done.result.total.double() - count * vector.double()).abs().max()),
        bound=count * RANGE / ((1 << (bits - 1)) - 1) / 2 if bits else 0.0,
    )


def measure_ckks(vector: torch.Tensor, devices: int) -> Cost:
    """The same sum under TenSEAL's CKKS with a key that all devices share; one device decrypts."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40]
    )
    context.global_scale = 2**40
    secret, slots = context.secret_key(), 4096
    parts = [part.tolist() for part in torch.split(vector, slots)]
    clock, device, server = time.process_time, 0.0, 0.0
    total = None
    for _ in range(devices):
        started = clock()
        sent = [tenseal.ckks_vector(context, part).serialize() for part in parts]
        device += clock() - started
        started = clock()
        read = [tenseal.ckks_vector_from(context, written) for written in sent]
        total = read if total is None else [one + other for one, other in zip(total, read, strict=True)]
        server += clock() - started
    assert total is not None
    sums = [part.serialize() for part in total]
    started = clock()
    opened = torch.tensor(
        [value for written in sums for value in tenseal.ckks_vector_from(context, written).decrypt(secret)]
    )
    device += clock() - started
    return Cost(
        up=sum(map(len, sent)) / len(vector),
        down=sum(map(len, sums)) / len(vector) / devices,
        device=device / devices,
        server=server,
        error=float((opened.double() - devices * vector.double()).abs().max()),
        bound=0.0,
    )


def rows(length: int, devices: int, dropouts: float, protocols: list[str]) -> Iterator[str]:
    """The table's lines for one setting."""
    vector = (torch.rand(length, generator=torch.Generator().manual_seed(1)) * 2 - 1) * RANGE
    configs: dict[str, AggregationConfig] = {
        "plain": PlainConfig(),
        "masked": MaskedConfig(dropout_share=dropouts or None),
        "homomorphic": HomomorphicConfig(dropout_share=dropouts or None),
        "public-key": HomomorphicConfig(dropout_share=dropouts or None, public_key=True),
    }
    for name in protocols:
        if name == "ckks" and dropouts:
            continue  # a sum is that of the uploads that came: nothing else happens
        cost = (
            measure_ckks(vector, devices)
            if name == "ckks"
            else measure(configs[name], vector, devices, dropouts)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield ROW.format(
            length, devices, f"{dropouts:.0%}", name, f"{cost.up:.2f}", f"{cost.down:.2f}", f"{cost.device:.4f}",
            f"{cost.server:.3f}", f"{cost.error:.1e}", f"{cost.bound:.1e}" if cost.bound else "", f"{peak:.1f}",
        )  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--devices", type=int, nargs="+", default=[8])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0], help="fractions of the devices")
    parser.add_argument(
        "--protocols", nargs="+", default=["plain", "masked", "homomorphic", "public-key", "ckks"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(ROW.format(*HEADS))
    print(ROW.format(*("---" for _ in HEADS)))
    for length in options.weights:
        for devices in options.devices:
            for dropouts in options.dropouts:
                for line in rows(length, devices, dropouts, options.protocols):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
