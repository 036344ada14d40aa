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

Which mask edges are certain: if i chose j, i adds their mask. j adds it only if the server passes on i's share, as it
learns from nothing else that i chose it. The server cannot remove the mask from i; if it withholds the share, the mask
cancels nowhere and no sum with i opens. So a sum opens over a set Y of honest survivors only if Y is closed: every
honest survivor that a member of Y chose is in Y. Shares of the others can be withheld from Y, so that edges towards Y
do not count. Of two such sums that open, either no device is in both or one is the sum of the other and a third.

Secrecy, with H = n - C honest devices and N = n - 1. It fails only if one of these happens:

    (a) Some honest device has t corrupt holders: H P[Hyper(N, C, K) >= t].
    (b) A sum opens without a set X of more than `isolated` honest survivors. Let D be the honest devices that dropped
        out, Y the others, x = |X| and y = |Y| = H - x - |D|. Shrinking X in favour of D changes no condition on Y, so
        that it suffices to bound x = isolated + 1 with any |D| <= d, and every larger x with |D| = d. For the sets X:
        all honest devices outside X that chose one of X are in D, and choices are independent, so that at most
            C(H, x) P[Binomial(H - x, 1 - u) <= d],  u = C(N - x, K) / C(N, K),
        by Chernoff's bound. For the sets Y, where |D| = d: each member has t of its K holders in Y or corrupt, as it
        chose none of X and those in D do not answer, and at most d holders in D, so that at most
            C(H, y) P[Hyper(N, y - 1 + C, K) >= max(t, K - d)]^y.
        The smaller bound counts. `isolated` is less than half of the honest survivors, so that two sums cannot open.

Unless one of them happens, what opens is one sum, over all honest survivors but at most `isolated`: the server can
exclude so many devices from the sum by dropping all others that chose them, and does not learn their values.

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
        """How many honest survivors the server can exclude from the sum, at most, by dropping all that chose them."""
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
        """(`isolated`, log of the bound (b)); half of the failure probability allowed is for (b)."""
        others, honest = self.devices - 1, self.devices - self.corrupt
        limit = (LOG2_SECRECY - 1) * math.log(2)
        x = np.arange(1, honest - self.dropouts)
        if not x.size:  # a sum of one honest device lacks no other
            return 0, -math.inf
        choose_none = _log_binomial(others - x, self.partners) - _log_binomial(others, self.partners)
        apart = _log_binomial(honest, x) + _log_few(np.array(self.dropouts), honest - x, choose_none)
        opened = apart.copy()
        weak = apart > 2 * limit  # the second bound takes longer and is of no use elsewhere
        y = honest - self.dropouts - x[weak]
        tails = _log_tail(others, y - 1 + self.corrupt, self.partners)
        least = max(self.threshold, self.partners - self.dropouts)
        opened[weak] = np.minimum(apart[weak], _log_binomial(honest, y) + y * tails[:, least])
        larger = np.append(np.logaddexp.accumulate(opened[::-1])[::-1][1:], -np.inf)
        bounds = np.logaddexp(apart, larger)[: (x.size + 2) // 2]  # for isolated = 0, 1, ... < survivors / 2
        enough = np.flatnonzero(bounds <= limit)
        isolated = int(enough[0]) if enough.size else len(bounds) - 1
        return isolated, float(bounds[isolated])


@lru_cache(maxsize=64)
def mask_graph(
    devices: int,
    *,
    corrupt: int | None = None,
    corrupt_share: float = 0.1,
    dropout_share: float | None = None,
) -> MaskGraph:
    """The graph with the fewest partners whose secrecy fails with probability 2^-40, correctness with 2^-20, at most.

    Fewer than 40 devices, or so many partners that hardly any pair is left out, form a complete graph, where neither
    can fail: t = T - 1 holders survive for every device.

    Args:
        devices: n, 2..10,000.
        corrupt: C, how many devices collude with the server, at least 0. A graph bears min(2 T - n - 1, T - 2): more
            could sign two lists of survivors, or hold enough shares in the complete graph. Default: by `corrupt_share`.
        corrupt_share: of the devices, in [0, 1), for the default of C = max(1, floor(corrupt_share n)), or as many as
            the graph bears if these are fewer.
        dropout_share: of the devices that may drop out, in [0, 0.5); default 1/3 below 40 devices, else 0.1.

    Returns:
        Among thresholds for the smallest K the largest that is correct, which is the most secret one.

    Raises:
        RangeError: an argument is out of its range.
        AggregationError: so few devices cannot bear `corrupt` colluders.
    """
    check("devices", Annotated[int, In(f"[2, {MAX_DEVICES}]")], devices)
    check("corrupt_share", Annotated[float, In("[0, 1)")], corrupt_share)
    if dropout_share is not None:
        check("dropout_share", Annotated[float, In("[0, 0.5)")], dropout_share)
    most = _most_corrupt(devices, dropout_share)
    if corrupt is None:
        corrupt = min(max(1, _floor(devices * corrupt_share)), most)
    check("corrupt", Annotated[int, AtLeast(0)], corrupt)
    if corrupt > most:
        larger = range(devices + 1, MAX_DEVICES + 1)
        fewest = next((n for n in larger if _most_corrupt(n, dropout_share) >= corrupt), None)
        expected = (
            f"at least {fewest} devices for {corrupt} colluders" if fewest else f"at most {most} colluders"
        )
        raise AggregationError(
            f"expected {expected}, got {devices} devices and {corrupt} colluders; "
            "allow fewer colluders or fewer dropouts, or wait for more devices"
        )
    complete = devices < COMPLETE_BELOW
    dropouts = _dropouts(devices, dropout_share)
    signatures = devices - dropouts
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


def _dropouts(devices: int, share: float | None) -> int:
    """d, for the default share where it is None."""
    if share is None:
        share = DROPOUT_SHARE_COMPLETE if devices < COMPLETE_BELOW else DROPOUT_SHARE_SPARSE
    return _floor(devices * share)


def _most_corrupt(devices: int, dropout_share: float | None) -> int:
    """The largest C with which no two lists can be signed and T - 1 holders are never all corrupt."""
    signatures = devices - _dropouts(devices, dropout_share)
    return min(2 * signatures - devices - 1, signatures - 2)


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
