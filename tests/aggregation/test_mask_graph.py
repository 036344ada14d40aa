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


def most_left_out(graph: MaskGraph, choices: Sequence[set[int]]) -> int:
    """How many honest survivors the worst attack leaves out, and 10^9 if a device has enough corrupt holders.

    The corrupt devices are the last ones. Tries every set of dropouts. A device is certain to add the masks with those
    that it chose, and the server withholds its shares from the others; so a sum opens over a set that has all
    survivors that its members chose. The smallest such sets are what one device reaches.
    """
    honest = range(graph.devices - graph.corrupt)
    corrupt = set(range(graph.devices)) - set(honest)
    if any(len(choices[i] & corrupt) >= graph.threshold for i in honest):
        return 10**9
    most = 0
    for count in range(graph.dropouts + 1):
        for dropped in combinations(honest, count):
            alive = set(honest) - set(dropped)
            opens = {i for i in alive if len(choices[i] & (alive | corrupt)) >= graph.threshold}
            for i in opens:
                reached = closure(i, alive, choices)
                if reached <= opens:
                    most = max(most, len(alive) - len(reached))
    return most


def closure(device: int, alive: set[int], choices: Sequence[set[int]]) -> set[int]:
    """Who is reached from a device by the choices of survivors."""
    reached, new = {device}, {device}
    while new:
        new = set().union(*(choices[i] for i in new)) & alive - reached
        reached |= new
    return reached


def random_choices(graph: MaskGraph, rng: np.random.Generator) -> list[set[int]]:
    """Everyone's partners."""
    n = graph.devices
    return [{int(j) + (j >= i) for j in rng.choice(n - 1, graph.partners, replace=False)} for i in range(n)]


@pytest.mark.parametrize(
    ("devices", "partners", "threshold", "corrupt", "dropouts"),
    [(8, 3, 2, 2, 0), (8, 4, 2, 1, 2), (8, 5, 2, 1, 3), (8, 4, 1, 0, 2), (9, 3, 2, 1, 1), (10, 3, 2, 0, 1)],
)
def test_the_bound_on_secrecy_covers_every_attack_on_small_graphs(
    devices: int, partners: int, threshold: int, corrupt: int, dropouts: int
) -> None:
    """Above the share of 800 random graphs where a sum opens without more than `isolated`, by at most 10 times."""
    graph = MaskGraph(
        devices=devices, partners=partners, threshold=threshold, corrupt=corrupt, dropouts=dropouts
    )
    assert graph.isolated == (devices - corrupt - dropouts - 1) // 2  # never half of the survivors
    rng = np.random.default_rng(7)
    broken = sum(most_left_out(graph, random_choices(graph, rng)) > graph.isolated for _ in range(800))
    assert broken > 0
    low = stats.beta.ppf(1e-4, broken, 801 - broken)  # the Clopper-Pearson interval
    high = stats.beta.ppf(1 - 1e-4, broken + 1, 800 - broken)
    assert low <= 2**graph.log2_secrecy_failure <= 10 * high


@pytest.mark.parametrize(("devices", "graphs"), [(40, 60), (60, 30), (100, 10), (300, 2), (1000, 1)])
def test_withheld_shares_exclude_no_more_devices_than_reported(devices: int, graphs: int) -> None:
    """A greedy server drops those that chose the least chosen device, then the next, while the dropouts last.

    So many honest devices remain in the sum as are reported, also if all dropouts are honest.
    """
    graph, rng, most = mask_graph(devices), np.random.default_rng(0), 0
    honest = range(devices - graph.corrupt)
    for _ in range(graphs):
        choices = random_choices(graph, rng)
        choosers = [{i for i in honest if j in choices[i]} for j in honest]
        excluded: set[int] = set()
        dropped: set[int] = set()
        while True:
            costs = {j: dropped | choosers[j] - excluded for j in set(honest) - excluded - dropped}
            best = min(costs, key=lambda j: len(costs[j]))
            if len(costs[best]) > graph.dropouts:
                break
            dropped = costs[best]
            excluded.add(best)
        most = max(most, len(excluded))
    assert most <= graph.isolated
    assert len(honest) - graph.dropouts - most >= graph.contributors
    assert most > 0 or devices > 200  # so that the neighbours by either direction are too many to count


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


@pytest.mark.parametrize("partners", range(5, 90, 3))
def test_a_device_that_can_be_isolated_is_reported(partners: int) -> None:
    """100 devices, 10 corrupt, 10 dropouts: 90 P[at most 10 honest devices chose it], exactly, against 2^-41."""
    graph = MaskGraph(devices=100, partners=partners, threshold=partners, corrupt=10, dropouts=10)
    exact = 90 * stats.binom.cdf(10, 89, partners / 99)
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
    assert graph.corrupt <= max(1, devices * shares[0] + 1e-9)
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


@pytest.mark.parametrize(
    ("devices", "corrupt"), [(2, 0), (3, 0), (4, 1), (9, 1), (19, 1), (20, 2), (100, 10)]
)
def test_a_tenth_of_the_devices_and_at_least_one_may_collude(devices: int, corrupt: int) -> None:
    """Except among 2 or 3, where a second list of survivors or one holder would suffice."""
    assert mask_graph(devices).corrupt == corrupt


def test_the_number_of_colluders_is_exact_or_refused() -> None:
    """With a third of dropouts 4 devices bear one colluder, 8 and 10 three, and 9 two."""
    for devices, most in ((4, 1), (8, 3), (9, 2), (10, 3)):
        for corrupt in range(most + 1):
            graph = mask_graph(devices, corrupt=corrupt)
            assert graph.corrupt == corrupt < graph.threshold
        with pytest.raises(AggregationError, match="expected at least"):
            mask_graph(devices, corrupt=most + 1)
    assert mask_graph(1000, corrupt=3, corrupt_share=0.2).corrupt == 3
    assert mask_graph(1000, corrupt=150).partners > mask_graph(1000, corrupt=100).partners
    with pytest.raises(AggregationError, match="at least 10 devices for 3 colluders, got 9 devices"):
        mask_graph(9, corrupt=3)
    with pytest.raises(AggregationError, match="at most 7999 colluders, got 10000 devices"):
        mask_graph(10_000, corrupt=9000)
    with pytest.raises(RangeError, match="corrupt"):
        mask_graph(10, corrupt=-1)


def test_the_sparse_graph_has_the_expected_size() -> None:
    """Harary graphs with 10 % corrupt and dropped take 42 neighbours for 100 devices and 46 for 1000 (threshold 26).

    Here a device chooses about as many as that holders for 1000, and is chosen by as many: the server deviates and
    drops devices after it has seen the graph. For 100 devices a tight bound needs 21 and as many.
    """
    assert 18 <= mask_graph(100).partners <= 24
    large = mask_graph(1000)
    assert 42 <= large.partners <= 50
    assert 24 <= large.threshold <= 28
    assert large.isolated <= 6


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
