"""The sparse graph of masked sums: with how many devices each device shares masks and secrets, and what can go wrong.

Source: Bell, Bonawitz, Gascon, Lepoint, Raykova (2020), "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", the protocol against a malicious server; the bounds are derived here. Each of n devices chooses K others
uniformly at random with its own secret randomness. It gives each of them a Shamir share (threshold t) of its two
secrets, its self-mask and its masking key, and shares a pairwise mask with each device that it chose or that chose it.

The adversary: the server and C devices, fixed before the graph, who see the graph and then choose which d devices drop
out. The protocol has to guarantee that
    * each device has applied the masks of all its partners on one list of participants. A server that could name
      different lists to different devices would remove mask edges at will, so that a holder answers for a device in S
      only if that device signed the list that the holder knows;
    * all devices act on one list S of at least T = n - d survivors, which T devices sign. An honest device signs once a
      round, so that two lists would need 2 T <= n + C;
    * only holders in S answer, with a share of the self-mask for a device in S and of the masking key for the others.

Secrecy, with H = n - C honest devices and N = n - 1. It fails only if one of these happens:

    (a) Some honest device has t corrupt holders: H P[Hyper(N, C, K) >= t].
    (b) A set A of honest survivors, no more than half of them, shares no mask with the other honest survivors, and its
        self-masks open. A living holder among the others would be a mask edge, so that each member of A has t of its K
        holders in A or corrupt; and all honest devices outside A that chose one of A have dropped out.
        Choices are independent, so that for a = |A|, with the binomial coefficient as the number of sets A,
            C(H, a) P[Hyper(N, a - 1 + C, K) >= max(t, K - d_a)]^a P[Binomial(H - a, 1 - u) <= d_a].
        u = C(N - a, K) / C(N, K) is the probability that a device chooses none of A. As the other half has at least a
        members, at most d_a = min(d, H - 2 a) devices outside A dropped out, and only they are further holders.
    (c) Such a set A, open or not, has more than `isolated` members. Its probability is at most (b) without t, and at
        most another bound: the devices outside A that are adjacent to it by either direction number at most d_a. A
        device is not adjacent with probability u (1 - K / N)^a; adjacency is negatively associated (Joag-Dev & Proschan
        1983: choices without replacement, and increasing functions of disjoint variables), so that Chernoff's bound
        holds as for independent trials:
            C(H, a) exp(-(H - a) KL(d_a / (H - a) || 1 - u (1 - K / N)^a)).

    The binomial tail in (b) has the same Chernoff bound, and (c) bounds (b) too. Sums run over a <= H / 2. Unless one
    of them happens, what opens is one sum, over all honest survivors but at most `isolated`: the server can exclude
    so many devices from the sum by dropping all their neighbours, and does not learn their values.

Correctness: with d devices dropped at random, some device has fewer than t holders alive: at most
n P[Hyper(N, d, K) > K - t]. A corrupt device that does not answer counts as dropped; a server that deviates can always
prevent a sum.

For the complete graph (K = N) the same formulas give 0, as d and C then bound what can happen in every case.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import count as counter
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from fedface.errors import AggregationError
from fedface.validation import AtLeast, In, check, checked

MAX_DEVICES = 10_000
COMPLETE_BELOW = 40  # devices; a guarantee without failure probability takes at most 39 masks there
DROPOUT_SHARE_COMPLETE = 1 / 3
DROPOUT_SHARE_SPARSE = 0.1
LOG2_SECRECY = -40  # largest probability that secrecy fails, per sum
LOG2_CORRECTNESS = -20  # largest probability that a sum with random dropouts cannot be opened
SEED_BYTES = 32
_DOMAIN = b"fedface mask graph 1"

Logs = Float64[ndarray, "*shape"]
Counts = Int64[ndarray, "*shape"]


@dataclass(frozen=True, kw_only=True)
@checked
class MaskGraph:
    """A graph of `devices` participants and what it withstands.

    A device holds no share of its own secrets: its holders are the `partners` that it chose.
    """

    devices: Annotated[int, In(f"[2, {MAX_DEVICES}]")]  # n
    partners: Annotated[int, AtLeast(1)]  # K: how many others each device chooses
    threshold: Annotated[int, AtLeast(1)]  # t: shares that recover a secret
    corrupt: Annotated[int, AtLeast(0)]  # C: devices that may collude with the server
    dropouts: Annotated[int, AtLeast(0)]  # d: devices that may drop out

    def __post_init__(self) -> None:
        if not self.threshold <= self.partners < self.devices:
            got = f"{self.threshold}, {self.partners} and {self.devices}"
            raise AggregationError(f"a graph needs threshold <= partners < devices, got {got}")
        if 2 * self.signatures <= self.devices + self.corrupt:
            raise AggregationError(
                f"{self.devices} devices with {self.dropouts} dropouts and {self.corrupt} corrupt could sign two lists "
                "of survivors; allow fewer dropouts or fewer corrupt devices"
            )

    @property
    def signatures(self) -> int:
        """T: how many devices must sign the one list of survivors, and how many must survive."""
        return self.devices - self.dropouts

    @property
    def contributors(self) -> int:
        """How many honest devices are in any sum that opens, at least (unless secrecy fails)."""
        return self.signatures - self.corrupt - self.isolated

    @property
    def isolated(self) -> int:
        """How many honest survivors the server can exclude from the sum, at most, by dropping all their neighbours."""
        return self._parts[0]

    @cached_property
    def log2_secrecy_failure(self) -> float:
        """Bound on log2 of the probability that secrecy fails in one sum; -inf where that is impossible."""
        return float(np.logaddexp(_log_corrupt_holders(self), self._parts[1])) / math.log(2)

    @cached_property
    def log2_correctness_failure(self) -> float:
        """Bound on log2 of the probability that random dropouts keep a sum from opening; -inf where impossible."""
        lost = _log_tail(self.devices - 1, np.array(self.dropouts), self.partners)
        return (math.log(self.devices) + float(lost[self.partners - self.threshold + 1])) / math.log(2)

    @cached_property
    def _parts(self) -> tuple[int, float]:
        """(`isolated`, log of the bounds (b) and (c)); half of the failure probability allowed is for (c)."""
        others, honest = self.devices - 1, self.devices - self.corrupt
        a = np.arange(1, honest // 2 + 1)
        outside = honest - a
        dropped = np.minimum(self.dropouts, honest - 2 * a)
        chosen_by_none = _log_binomial(others - a, self.partners) - _log_binomial(others, self.partners)
        with np.errstate(divide="ignore"):
            chooses_none = a * np.log1p(-self.partners / others)
        sets = _log_binomial(honest, a)
        separate = sets + _log_few(dropped, outside, chosen_by_none + chooses_none)
        # Alive holders are in A or corrupt, so that at most d_a of the K are elsewhere. Large graphs: mostly no limit.
        inside = np.maximum(self.partners - dropped, 0)
        chosen_by_few = sets + _log_few(dropped, outside, chosen_by_none)
        limited = inside > 0
        few = chosen_by_few[limited] + self._log_holders(a[limited], inside[limited])
        separate[limited] = np.minimum(separate[limited], few)
        from_a = np.logaddexp.accumulate(separate[::-1])[::-1]
        isolated = int((from_a > (LOG2_SECRECY - 1) * math.log(2)).sum())
        small = slice(0, isolated)
        least = np.maximum(inside[small], self.threshold)
        opened = np.minimum(separate[small], chosen_by_few[small] + self._log_holders(a[small], least))
        bounds = np.concatenate([opened, from_a[isolated : isolated + 1]])
        return isolated, float(np.logaddexp.reduce(bounds, initial=-np.inf))

    def _log_holders(self, a: Counts, least: Counts) -> Logs:
        """log of the probability that each of `a` devices has `least` of its holders among them or corrupt."""
        tails = _log_tail(self.devices - 1, a - 1 + self.corrupt, self.partners)
        return np.asarray(a * np.take_along_axis(tails, least[:, None], axis=1)[:, 0])


@lru_cache(maxsize=64)
def mask_graph(devices: int, *, corrupt_share: float = 0.1, dropout_share: float | None = None) -> MaskGraph:
    """The graph with the fewest partners whose secrecy fails with probability 2^-40, correctness with 2^-20, at most.

    Fewer than 40 devices, or so many partners that hardly any pair is left out, form a complete graph, where neither
    can fail: t = T - 1 holders survive for every device.

    Args:
        devices: n, 2..10,000.
        corrupt_share: of the devices that collude with the server, in [0, 1). `MaskGraph.corrupt` is lower than this
            share where two lists of survivors could be signed otherwise: C <= 2 T - n - 1.
        dropout_share: of the devices that may drop out, in [0, 0.5); default 1/3 below 40 devices, else 0.1.

    Returns:
        Among thresholds for the smallest K the largest that is correct, which is the most secret one.

    Raises:
        RangeError: an argument is out of its range.
    """
    check("devices", Annotated[int, In(f"[2, {MAX_DEVICES}]")], devices)
    check("corrupt_share", Annotated[float, In("[0, 1)")], corrupt_share)
    complete = devices < COMPLETE_BELOW
    if dropout_share is None:
        dropout_share = DROPOUT_SHARE_COMPLETE if complete else DROPOUT_SHARE_SPARSE
    check("dropout_share", Annotated[float, In("[0, 0.5)")], dropout_share)
    dropouts = _floor(devices * dropout_share)
    signatures = devices - dropouts
    corrupt = min(_floor(devices * corrupt_share), 2 * signatures - devices - 1, signatures - 2)
    for partners in range(1, 1 if complete else devices - 1):
        lost = math.log(devices) + _log_tail(devices - 1, np.array(dropouts), partners)
        threshold = partners + 1 - int(np.argmax(lost <= LOG2_CORRECTNESS * math.log(2)))
        if threshold < 1:
            continue
        graph = MaskGraph(
            devices=devices, partners=partners, threshold=threshold, corrupt=corrupt, dropouts=dropouts
        )
        likely = _log_corrupt_holders(graph) > LOG2_SECRECY * math.log(2)  # much faster than the whole bound
        if not likely and graph.log2_secrecy_failure <= LOG2_SECRECY:
            return graph
    return MaskGraph(
        devices=devices, partners=devices - 1, threshold=signatures - 1, corrupt=corrupt, dropouts=dropouts
    )


def choose_partners(n: int, own: int, count: int, seed: bytes) -> tuple[int, ...]:
    """A uniformly random set of `count` devices out of 0..n-1 without `own`, in ascending order.

    Deterministic in its arguments. Fisher-Yates with 64-bit words of SHAKE256 under the seed, rejecting words that
    would favour some devices.

    Args:
        n: number of devices, at most 10,000.
        own: the device that chooses, 0..n-1.
        count: K, 1..n-1.
        seed: 32 secret random bytes.

    Raises:
        AggregationError: an argument is out of its range.
    """
    if not (0 <= own < n <= MAX_DEVICES and 1 <= count < n):
        raise AggregationError(f"device {own} of {n} cannot choose {count} others")
    if len(seed) != SEED_BYTES:
        raise AggregationError(f"the seed of a choice has {SEED_BYTES} bytes, got {len(seed)}")
    others = [device for device in range(n) if device != own]
    words = _words(seed)
    for place in range(count):
        left = n - 1 - place
        limit = 2**64 - 2**64 % left
        other = place + next(word % left for word in words if word < limit)
        others[place], others[other] = others[other], others[place]
    return tuple(sorted(others[:count]))


def _words(seed: bytes) -> Iterator[int]:
    """An endless stream of words below 2^64."""
    for number in counter():
        digest = hashlib.shake_256(_DOMAIN + seed + number.to_bytes(8, "big")).digest(8)
        yield int.from_bytes(digest, "big")


def _floor(number: float) -> int:
    """Rounds down, except that 0.29 * 100 = 28.999... counts as 29."""
    return math.floor(number + 1e-9)


def _log_corrupt_holders(graph: MaskGraph) -> float:
    """Bound (a)."""
    holders = _log_tail(graph.devices - 1, np.array(graph.corrupt), graph.partners)
    return math.log(graph.devices - graph.corrupt) + float(holders[graph.threshold])


@cache
def _log_factorials() -> Logs:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, MAX_DEVICES + 1)))])


def _log_binomial(n: int | Counts, k: int | Counts) -> Logs:
    """log C(n, k), -inf outside 0 <= k <= n."""
    n, k = np.broadcast_arrays(n, k)
    exists = (k >= 0) & (k <= n)
    n, k = np.where(exists, n, 0), np.where(exists, k, 0)
    table = _log_factorials()
    return np.where(exists, table[n] - table[k] - table[n - k], -np.inf)


def _log_tail(total: int, marked: Counts, chosen: int) -> Logs:
    """log P[Hyper(total, marked, chosen) >= j] for j = 0..chosen + 1, as the last axis behind those of `marked`."""
    j, marked = np.arange(chosen + 2), marked[..., None]
    ways = _log_binomial(marked, j) + _log_binomial(total - marked, chosen - j)
    tails = np.logaddexp.accumulate(ways[..., ::-1], axis=-1)[..., ::-1]
    return np.asarray(tails - _log_binomial(total, chosen))


def _log_few(most: Counts, trials: Counts, log_miss: Logs) -> Logs:
    """Chernoff's bound on log P[Binomial(trials, 1 - exp(log_miss)) <= most], for most < trials."""
    share = most / trials
    log_rest = np.log1p(-share)
    with np.errstate(divide="ignore"):
        log_hit = np.log(-np.expm1(log_miss))
    hits = np.where(most > 0, share * (np.log(np.maximum(share, 1e-300)) - log_hit), 0.0)
    divergence = hits + (1 - share) * (log_rest - log_miss)
    bound: Logs = np.where(log_rest <= log_miss, 0.0, -trials * divergence)
    return bound
