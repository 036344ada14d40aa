"""What encrypted sums cost, against sums in the open, measured in the same run.

    python benchmarks/encryption.py [--weights 250000 1000000] [--devices 8] [--repeats 5]

Prints a Markdown table: bytes a weight for one upload and for the sum, seconds for one device to protect
(to wire bytes), for the server to read and combine all uploads, and for the key holder to reveal; the largest
error of the sum against float64; and each as a ratio to the plain protocol. Median over the repeats. Seconds
are CPU seconds of one thread, which another program on the same cores disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass

import torch

from fedface.aggregation.homomorphic import make_device, make_keys, make_server
from fedface.aggregation.payload import (
    Aggregation,
    AggregationConfig,
    AggregationParameters,
    HomomorphicConfig,
    Payload,
    PlainConfig,
)
from fedface.aggregation.quantisation import Quantiser
from fedface.randomness import Streams

VALUE_RANGE = 0.1
ROW = "| {:>9} | {:<17} | {:>7} | {:>7} | {:>9} | {:>9} | {:>8} | {:>9} | {:>9} |"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One protocol at one size; bytes a weight, median CPU seconds, and weight units."""

    upload: float
    total: float
    protect: float
    combine: float
    reveal: float
    error: float


def measure(device: Aggregation, server: Aggregation, updates: torch.Tensor, *, repeats: int) -> Cost:
    """Run protect, combine and reveal on updates of shape (devices, d), wire form included."""
    exact = updates.double().sum(0)
    count, length = updates.shape
    protect, combine, reveal, error = [], [], [], 0.0
    for repeat in range(repeats):
        start = time.process_time()
        wires = [device.protect(update, repeat).to_bytes() for update in updates]
        protected = time.process_time()
        total = server.combine([Payload.from_bytes(wire) for wire in wires]).to_bytes()
        combined = time.process_time()
        revealed = device.reveal(Payload.from_bytes(total))
        end = time.process_time()
        protect.append((protected - start) / count)
        combine.append(combined - protected)
        reveal.append(end - combined)
        error = max(error, float((revealed.double() - exact).abs().max()))
    return Cost(
        upload=len(wires[0]) / length,
        total=len(total) / length,
        protect=statistics.median(protect),
        combine=statistics.median(combine),
        reveal=statistics.median(reveal),
        error=error,
    )


def row(length: int, name: str, cost: Cost, bound: float) -> str:
    """One line of the table; `bound` is what quantisation may cost the sum, in weight units."""
    seconds = [f"{value:.4f}" for value in (cost.protect, cost.combine, cost.reveal)]
    sizes = [f"{value:.2f}" for value in (cost.upload, cost.total)]
    return ROW.format(length, name, *sizes, *seconds, f"{cost.error:.1e}", f"{bound:.1e}" if bound else "")


def ratios(length: int, cost: Cost, plain: Cost) -> str:
    """One line of ratios to the plain protocol."""
    names = ("upload", "total", "protect", "combine", "reveal")
    times = [f"x {getattr(cost, name) / getattr(plain, name):.2f}" for name in names]
    return ROW.format(length, "  ratio to plain", *times, "", "")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    agreement = AggregationParameters(value_range=VALUE_RANGE, max_devices=options.devices)
    configs: list[tuple[str, AggregationConfig]] = [
        ("plain", PlainConfig()),
        ("homomorphic, 16 bit", HomomorphicConfig(bits=16)),
        ("homomorphic, 11 bit", HomomorphicConfig(bits=11)),
    ]
    print(f"{options.devices} devices, values in [-{VALUE_RANGE}, {VALUE_RANGE}], {options.repeats} repeats;")
    print(f"{os.cpu_count()} cores of {platform.machine()}, one thread, Python {platform.python_version()}\n")
    heads = ("weights", "protocol", "up B/w", "sum B/w", "protect s", "combine s", "reveal s", "max error")
    print(ROW.format(*heads, "n step/2"))
    print(ROW.format(*["---"] * 9))
    for length in options.weights:
        generator = Streams(0).generator(f"benchmark/{length}")
        updates = (torch.rand(options.devices, length, generator=generator) * 2 - 1) * VALUE_RANGE
        costs: dict[str, Cost] = {}
        for name, config in configs:
            device = make_device(config, agreement, make_keys(config, agreement))
            costs[name] = measure(device, make_server(config, agreement), updates, repeats=options.repeats)
            match config:
                case PlainConfig():
                    print(row(length, name, costs[name], 0.0))
                case HomomorphicConfig(bits=bits):
                    half_step = Quantiser(value_range=VALUE_RANGE, bits=bits, max_devices=1).step / 2
                    print(row(length, name, costs[name], options.devices * half_step))
                    print(ratios(length, costs[name], costs["plain"]))


if __name__ == "__main__":
    main()
