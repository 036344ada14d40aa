"""The failure bounds of the sparse graph against exact values and simulated attacks; partners are chosen uniformly."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedface.aggregation.mask_graph import MaskGraph, choose_partners, mask_graph
from fedface.errors import AggregationError, RangeError

SEED = bytes(range(32))


def attack_succeeds(graph: MaskGraph, choices: Sequence[set[int]]) -> bool:
    """Whether some choice of survivors opens less than the sum of all; the corrupt devices are the last ones.

    Tries every set of dropouts and every union of components of the honest survivors' mask graph.
    """
    honest = range(graph.devices - graph.corrupt)
    corrupt = set(range(graph.devices)) - set(honest)
    if any(len(choices[i] & corrupt) >= graph.threshold for i in honest):
        return True
    for count in range(graph.dropouts + 1):
        for dropped in combinations(honest, count):
            alive = set(honest) - set(dropped)
            opens = {i for i in alive if len(choices[i] & (alive | corrupt)) >= graph.threshold}
            components = connected(alive, choices)
            for size in range(1, len(components)):
                for some in combinations(components, size):
                    members = set().union(*some)
                    if 2 * len(members) <= len(alive) and members <= opens:
                        return True
    return False


def connected(alive: set[int], choices: Sequence[set[int]]) -> list[set[int]]:
    """The connected components of the mask graph."""
    left, components = set(alive), []
    while left:
        grown, component = {left.pop()}, set()
        while grown:
            component |= grown
            grown = {j for j in left for i in grown if j in choices[i] or i in choices[j]}
            left -= grown
        components.append(component)
    return components


@pytest.mark.parametrize(
    ("devices", "partners", "threshold", "corrupt", "dropouts"),
    [(8, 3, 2, 2, 0), (8, 3, 2, 1, 2), (8, 2, 2, 1, 1), (9, 3, 3, 2, 2), (9, 2, 1, 1, 2), (10, 2, 1, 0, 1)],
)
def test_the_bound_on_secrecy_covers_every_attack_on_small_graphs(
    devices: int, partners: int, threshold: int, corrupt: int, dropouts: int
) -> None:
    """The bound is above the share of 800 random graphs that some choice of dropouts breaks, by at most 40 times."""
    graph = MaskGraph(
        devices=devices, partners=partners, threshold=threshold, corrupt=corrupt, dropouts=dropouts
    )
    assert graph.isolated == (devices - corrupt) // 2  # so that only sums that open count as attacks
    rng = np.random.default_rng(7)
    others = [[j for j in range(devices) if j != i] for i in range(devices)]
    broken = 0
    for _ in range(800):
        choices = [set(rng.choice(each, partners, replace=False).tolist()) for each in others]
        broken += attack_succeeds(graph, choices)
    assert broken > 0
    low = stats.beta.ppf(1e-4, broken, 801 - broken)  # the Clopper-Pearson interval
    high = stats.beta.ppf(1 - 1e-4, broken + 1, 800 - broken)
    assert low <= 2**graph.log2_secrecy_failure <= 40 * high


def test_corrupt_holders_are_counted_exactly() -> None:
    """30 devices of which 9 are corrupt, complete but for one choice: 21 P[Hyper(29, 9, 28) >= 9] by scipy."""
    graph = MaskGraph(devices=30, partners=28, threshold=9, corrupt=9, dropouts=5)
    exact = 21 * stats.hypergeom.sf(8, 29, 9, 28)
    assert graph.log2_secrecy_failure == pytest.approx(math.log2(exact), abs=1e-9)


@pytest.mark.parametrize("partners", [10, 20, 45, 60])
def test_correctness_is_a_union_bound_over_exact_tails(partners: int) -> None:
    """1000 devices, 100 dropouts: 1000 P[Hyper(999, 100, K) > K - t] by scipy."""
    threshold = partners // 2 + 1
    graph = MaskGraph(devices=1000, partners=partners, threshold=threshold, corrupt=100, dropouts=100)
    exact = 1000 * stats.hypergeom.sf(partners - threshold, 999, 100, partners)
    assert graph.log2_correctness_failure == pytest.approx(math.log2(exact), abs=1e-6)


def test_random_dropouts_fail_no_more_often_than_the_bound() -> None:
    """50 devices, 10 dropouts: in 300 random graphs, within three times of the bound of 0.29."""
    graph = MaskGraph(devices=50, partners=10, threshold=4, corrupt=0, dropouts=10)
    rng, failed = np.random.default_rng(1), 0
    for _ in range(300):
        alive = set(rng.choice(50, 40, replace=False).tolist())
        seeds = rng.bytes(32)
        choices = [choose_partners(50, i, 10, bytes([i]) + seeds[1:]) for i in range(50)]
        failed += any(len(alive & set(each)) < 4 for each in choices)
    bound = 2**graph.log2_correctness_failure
    assert bound / 3 < failed / 300 < bound + 3 * (bound / 300) ** 0.5


@pytest.mark.parametrize("partners", range(5, 40))
def test_a_device_that_can_be_isolated_is_reported(partners: int) -> None:
    """100 devices, 10 corrupt, 10 dropouts: 90 P[at most 10 neighbours], exactly, against 2^-41."""
    graph = MaskGraph(devices=100, partners=partners, threshold=partners, corrupt=10, dropouts=10)
    chosen = np.arange(11)  # honest devices that it chose; the other honest ones choose it independently
    by_others = stats.binom.cdf(10 - chosen, 89 - chosen, partners / 99)
    exact = 90 * (stats.hypergeom.pmf(chosen, 99, 89, partners) * by_others).sum()
    if exact > 2**-41:
        assert graph.isolated >= 1
    if exact < 2**-60:
        assert graph.isolated == 0


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.2, 0.2), (0.1, 1 / 3), (0.3, 0.3), (0.0, 0.1), (0.4, 0.4)])
@pytest.mark.parametrize("devices", [2, 3, 4, 7, 39, 40, 41, 64, 100, 300, 1000, 10_000])
def test_every_graph_meets_its_failure_probabilities(devices: int, shares: tuple[float, float]) -> None:
    """2^-40 for secrecy and 2^-20 for correctness; no two lists can be signed; it takes less than 0.6 s."""
    start = time.process_time()
    graph = mask_graph(devices, corrupt_share=shares[0], dropout_share=shares[1])
    assert time.process_time() - start < 0.6
    assert graph.log2_secrecy_failure <= -40
    assert graph.log2_correctness_failure <= -20
    assert 2 * graph.signatures > devices + graph.corrupt
    assert graph.signatures == devices - math.floor(devices * shares[1] + 1e-9)
    assert graph.corrupt <= devices * shares[0] + 1e-9
    assert 1 < graph.contributors <= graph.signatures - graph.corrupt


@pytest.mark.parametrize("devices", [2, 3, 10, 20, 39])
def test_a_small_cohort_forms_a_complete_graph_that_cannot_fail(devices: int) -> None:
    """A third may drop out; the others suffice for every device, and corrupt devices alone never do."""
    graph = mask_graph(devices)
    assert (graph.partners, graph.dropouts) == (devices - 1, devices // 3)
    assert graph.threshold == graph.signatures - 1 > graph.corrupt
    assert graph.log2_secrecy_failure == graph.log2_correctness_failure == -math.inf
    assert graph.isolated == 0


def test_corrupt_devices_that_could_sign_two_lists_are_not_tolerated() -> None:
    """9 devices, 3 dropouts: lists need 6 signatures, and 9 + C >= 12 makes two; so C is 2 instead of 3."""
    graph = mask_graph(9, corrupt_share=0.4, dropout_share=1 / 3)
    assert (graph.signatures, graph.corrupt) == (6, 2)
    with pytest.raises(AggregationError, match="could sign two lists"):
        MaskGraph(devices=9, partners=8, threshold=5, corrupt=3, dropouts=3)


def test_the_sparse_graph_has_the_expected_size() -> None:
    """Harary graphs with 10 % corrupt and dropped take 42 neighbours for 100 devices and 46 for 1000 (threshold 26).

    Here a device chooses about as many as that holders for 1000, and is chosen by as many: the server deviates and
    drops devices after it has seen the graph. For 100 devices a tight bound needs 21 and as many.
    """
    assert 18 <= mask_graph(100).partners <= 24
    large = mask_graph(1000)
    assert 42 <= large.partners <= 50
    assert 24 <= large.threshold <= 28
    assert large.isolated <= 3


def test_one_partner_fewer_would_not_suffice() -> None:
    """For 1000 devices and K - 1, every threshold fails one of the two."""
    graph = mask_graph(1000)
    for threshold in range(1, graph.partners):
        fewer = MaskGraph(
            devices=1000, partners=graph.partners - 1, threshold=threshold, corrupt=100, dropouts=100
        )
        assert fewer.log2_secrecy_failure > -40 or fewer.log2_correctness_failure > -20


def test_more_adversaries_or_dropouts_take_more_partners() -> None:
    """And failure probabilities move as they should when one number changes."""
    by_corrupt = [mask_graph(500, corrupt_share=share).partners for share in (0.0, 0.1, 0.2, 0.3)]
    by_dropouts = [mask_graph(500, dropout_share=share).partners for share in (0.05, 0.1, 0.2, 0.3)]
    assert by_corrupt == sorted(set(by_corrupt))
    assert by_dropouts == sorted(set(by_dropouts))

    def graph(partners: int = 45, threshold: int = 26, corrupt: int = 100, dropouts: int = 100) -> MaskGraph:
        return MaskGraph(
            devices=1000, partners=partners, threshold=threshold, corrupt=corrupt, dropouts=dropouts
        )

    assert graph(threshold=27).log2_secrecy_failure < graph().log2_secrecy_failure
    assert graph(corrupt=101).log2_secrecy_failure > graph().log2_secrecy_failure
    assert graph(threshold=27).log2_correctness_failure > graph().log2_correctness_failure
    assert graph(dropouts=101).log2_correctness_failure > graph().log2_correctness_failure
    assert graph(dropouts=150).isolated > graph().isolated


def test_impossible_graphs_are_refused() -> None:
    """Ranges of the shares, of the number of devices, and of partners and threshold."""
    for devices in (1, 0, -3, 10_001):
        with pytest.raises(RangeError, match="devices must lie in"):
            mask_graph(devices)
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(RangeError, match="corrupt_share"):
            mask_graph(10, corrupt_share=share)
    for share in (-0.1, 0.5, math.nan):
        with pytest.raises(RangeError, match="dropout_share"):
            mask_graph(10, dropout_share=share)
    for partners, threshold in ((10, 5), (5, 6)):
        with pytest.raises(AggregationError, match="threshold <= partners < devices"):
            MaskGraph(devices=10, partners=partners, threshold=threshold, corrupt=0, dropouts=1)


def test_partners_are_distinct_others_and_the_same_after_a_restart() -> None:
    """For every device of 30 and every count; another seed gives other partners."""
    for own in range(30):
        for count in (1, 7, 29):
            chosen = choose_partners(30, own, count, SEED)
            assert chosen == choose_partners(30, own, count, SEED) == tuple(sorted(set(chosen)))
            assert len(chosen) == count
            assert set(chosen) <= set(range(30)) - {own}
    assert choose_partners(1000, 0, 45, SEED) != choose_partners(1000, 0, 45, bytes(32))
    assert choose_partners(10, 4, 9, SEED) == (0, 1, 2, 3, 5, 6, 7, 8, 9)


def test_every_set_of_partners_is_equally_likely() -> None:
    """The 10 pairs out of 5 others, over 5,000 seeds: a chi-squared test at the 1e-4 level."""
    seen = Counter(choose_partners(6, 2, 2, number.to_bytes(32, "big")) for number in range(5000))
    assert len(seen) == 10
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


@pytest.mark.parametrize(
    ("n", "own", "count", "seed"),
    [
        (5, 5, 2, SEED),
        (5, -1, 2, SEED),
        (5, 0, 5, SEED),
        (5, 0, 0, SEED),
        (5, 0, 2, b"short"),
        (20_000, 0, 2, SEED),
    ],
)
def test_an_impossible_choice_is_refused(n: int, own: int, count: int, seed: bytes) -> None:
    """A device outside the list, too many or no partners, a seed of another length."""
    with pytest.raises(AggregationError):
        choose_partners(n, own, count, seed)
