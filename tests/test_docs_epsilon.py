"""Every number of docs/epsilon.md follows from the library; no digit of the page lies outside what is checked here."""

from __future__ import annotations

import importlib.util
import math
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

from fedface.aggregation.payload import purpose_of
from fedface.config import parse
from fedface.errors import PolicyRefusal
from fedface.experiment import read_experiment
from fedface.privacy.accounting import epsilon_of, reconstruction_success_bound, within_budget
from fedface.privacy.adjacency import convert_unit, replace_one_event
from fedface.privacy.budget import Budget
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import ClippedSum, Event
from fedface.privacy.plan import Plan
from fedface.privacy.policy import DevicePolicy, Period
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy.renyi_filter import filter_epsilon
from fedface.privacy_units import Unit

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "epsilon.md").read_text(encoding="utf-8")
SNIPPET = "\n".join(re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S))
DELTA = 1e-5  # of the whole page
ROWS = (0.5, 1.0, 3.0, 8.0, 10.0)  # epsilons that are compared
RUNS = (1, 2, 3, 4, 10)  # how many of them are added up
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
NAMES = (  # digits that name something
    "https://arxiv.org/abs/2302.07225", "Hayes et al. 2023",
    "https://arxiv.org/abs/2008.11193", "Feldman and Zrnic 2021", "for epsilon 0.5, 1, 3 and 8", "below 1 / the number",
    "P(S) <= e^eps Q(S) + delta", "(1 + delta(0)) / 2", "e^eps / 100 + delta(eps)", "delta(x) / (1 - e^(x - eps))",
    "delta (e^(k eps) - 1) / (e^eps - 1)", "right one of 100 is identified", "From a prior of 50 %",
)  # fmt: skip


def flat(text: str) -> str:
    """One line without bold type and without code that stands by itself."""
    text = re.sub(r"^> ?", "", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return " ".join(text.replace("**", "").split())


PAGE = flat(TEXT)


@lru_cache
def plan_of(epsilon: float, unit: Unit = "occasion") -> Plan:
    """The demo's experiment with another privacy target."""
    changes = {"privacy.epsilon": f"{epsilon}", "privacy.delta": f"{DELTA}", "privacy.unit": unit}
    return read_experiment(ROOT / "experiments" / "demo.yaml", changes=changes).plan()


def event_of(epsilon: float) -> Event:
    """The privacy event of a whole run for one occasion."""
    return plan_of(epsilon).total_event()


@lru_cache
def cost(epsilon: float, runs: int = 1, delta: float = DELTA) -> float:
    """What so many equal runs cost together by the ledger."""
    if runs == 1:
        return epsilon_of(event_of(epsilon), delta).upper
    return filter_epsilon([(event_of(epsilon), runs)], delta)


def sure(epsilon: float, before: float = 0.5) -> float:
    """Bayes' rule: odds grow by at most e^epsilon."""
    odds = math.exp(epsilon) * before / (1 - before)
    return odds / (1 + odds)


def group_delta(units: int) -> float:
    """Delta of a group whose units each have epsilon 3: every unit more adds one delta, e^3 times the one before."""
    return DELTA * sum(math.exp(3 * unit) for unit in range(units))


def percent(share: float) -> str:
    """Two digits; above 99 % one digit of what is missing."""
    small, digits = (1 - share, 1) if share > 0.99 else (share, 2)
    places = 0 if small == 0 else max(0, digits - 1 - math.floor(math.log10(100 * small)))
    return f"{100 * share:.{places}f} %"


def right_at_most(event: Event) -> int:
    """The largest accuracy of guessing membership from a prior of one half, in percent: half of one plus delta at
    epsilon 0.
    """
    low, high = 49, 100  # the answer lies above the one and up to the other
    while high - low > 1:
        middle = (low + high) // 2
        won = within_budget(event, 0.0, 2 * (middle + 0.5) / 100 - 1)
        low, high = (low, middle) if won else (middle, high)
    return high


def bets() -> list[str]:
    """The bound, and the table."""
    rows = [
        f"| {epsilon:g} | {percent(sure(epsilon))} | {percent(sure(epsilon, 0.01))} "
        f"| {right_at_most(event_of(epsilon))} % | {percent(reconstruction_success_bound(event_of(epsilon), 0.01))} |"
        for epsilon in ROWS
    ]
    silent = ClippedSum(clip_norm=1.0).event()
    lost = [
        epsilon_of(silent, DELTA).upper,
        reconstruction_success_bound(silent, 0.5),
        reconstruction_success_bound(silent, 0.01),
    ]
    assert lost == [math.inf, 1.0, 1.0]
    return [
        *rows,
        "| infinite: no noise | 100 % | 100 % | 100 % | 100 % |",
        "| epsilon | before 50 %: sure at most | before 1 in 100: sure at most | one run, before 50 %: right at most |",
        "identifies the right one of 100 at most |",
        f"can be at most {percent(sure(3))} sure, of yes or of no. Starting from 1 in 100, they can be at most "
        f"{percent(sure(3, 0.01))} sure.",
        '"epsilon 3 per occasion"',
        "Epsilon 3 bounds what anyone can infer",
        f"Delta, here 1 in {1 / DELTA:,.0f}, is",
        "noised for each epsilon at delta 1e-5",
        "guessing is right in 50 % and 1 % of cases",
        f"the privacy guarantee of epsilon 3 alone would allow {percent(sure(3) + DELTA)} and "
        f"{percent(0.01 * math.exp(3) + DELTA)}",
        "So epsilon 1 is a meaningful bound by itself; 8 is hardly one",
        f"If {percent(sure(3))} in the worst case is too much for you, write 1.",
    ]


def birthday() -> list[str]:
    """Forty photos under a guarantee for each of them, and other groups."""
    empty = next(units for units in range(1, 40) if group_delta(units) > 1)
    assert epsilon_of(convert_unit(event_of(3), source="photo", target="occasion"), DELTA).upper == math.inf
    replaced = epsilon_of(replace_one_event(event_of(3)), DELTA).upper
    assert replaced < 6
    return [
        f"the other {40 - 1}",
        f"two photos {2 * 3} (50 % becomes {percent(sure(6))}), four photos {4 * 3}, with the probability of failure "
        f"grown to {percent(group_delta(4))}. From {WORDS[empty]} photos on the bound is empty; at forty it is "
        f"epsilon {40 * 3},",
        f"on ten occasions is ten units: the bound adds up to epsilon {10 * 3}, and as with photos it is empty "
        f"from {WORDS[empty]} on",
        f"Two of them: {2 * 3}.",
        f"The privacy guarantee allows {2 * 3} for that question, and the ledger finds {replaced:.1f} "
        "in the demo's run "
        f"(50 % becomes at most {100 * sure(replaced):.1f} %)",
        f"{group_delta(empty - 1):.3f} at k = {empty - 1}, above 1 at k = {empty}",
        f"from 1/2 to e^3 / (1 + e^3) = {sure(3):.3f}, from 1/100 to {sure(3, 0.01):.3f}.",
    ]


def sums() -> list[str]:
    """Consecutive runs."""
    certain = [100 * sure(cost(3, runs)) for runs in RUNS]
    ends = ["95 %" if runs == 1 else f"{value:.1f} %" for runs, value in zip(RUNS, certain, strict=True)]
    ends[-1] = percent(certain[-1] / 100)
    assert percent(certain[0] / 100) == ends[0]
    fit = next(runs for runs in range(1, 30) if cost(1, runs + 1) > 3)
    assert fit == 8
    begun = epsilon_of(plan_of(3).event(1), DELTA).upper
    assert cost(1) <= 1 < begun and cost(3) <= 3 < cost(3, 2) < 2 * 3
    return [
        "Two runs at 3 are not 3",
        f"but less than plain addition (two: {2 * 3})",
        f"| runs like the demo's, each at epsilon 3 | {' | '.join(map(str, RUNS))} |",
        f"| together, by the ledger | {' | '.join(f'{cost(3, runs):.1f}' for runs in RUNS)} |",
        f"| 50 % becomes at most | {' | '.join(ends)} |",
        "So `max_epsilon: 3` is for life",
        f"one run at 3 and then none, or eight at 1 (together {cost(1, fit):.2f}; the ninth would make it "
        f"{cost(1, fit + 1):.2f} and is refused)",
        f"the first round of a demo run at epsilon 3 costs {begun:.2f}, so a phone that allows 1 a month never begins "
        "that run. A whole run at epsilon 1 fits.",
    ]


def deltas() -> list[str]:
    """The effect of delta, and what one point of a curve leaves out."""
    seldom = 1e-6
    # P(loss > 3) (1 - e^(x - 3)) <= delta(x), for every x < 3.
    surer = min(d / -math.expm1(cost(3, 1, d) - 3) for d in (2e-5, 2.5e-5, 3e-5))
    assert DELTA < surer <= 1 / 8000 < 1.2 * surer
    schedule, sigma = plan_of(3).schedule, plan_of(3).noise_multiplier
    return [
        f"With 2,000 occasions and 1 in {1 / DELTA:,.0f} for each, the probability of failure for any of them is at "
        f"most {100 * 2000 * DELTA:.0f} %; with 1 in {1 / seldom:,.0f} it is {100 * 2000 * seldom:.1f} %.",
        f"costs {cost(3):.1f} at 1e-5 costs {cost(3, 1, seldom):.1f} at 1e-6",
        "(in that run at most 1 in 8,000)",
        f"{schedule.rounds} rounds of {schedule.steps_per_round} steps, sampling rate {schedule.sampling_rate:g}, "
        f"noise multiplier {sigma:.3f} for epsilon 3 at 1e-5,",
    ]


@pytest.mark.parametrize("part", [bets, birthday, sums, deltas], ids=lambda part: part.__name__)
def test_the_page_has_the_numbers_that_the_library_computes(part) -> None:  # type: ignore[no-untyped-def]
    """Sentences with their numbers filled in."""
    assert [sentence for sentence in part() if sentence not in PAGE] == []


def test_no_number_of_the_page_is_unchecked() -> None:
    """After removing everything that is checked, no digit is left."""
    rest = PAGE
    checked = [*NAMES, *bets(), *birthday(), *sums(), *deltas()]
    for sentence in sorted(checked, key=len, reverse=True):
        rest = rest.replace(sentence, " ")
    assert re.findall(r".{0,30}\d.{0,30}", rest) == []


def test_the_policy_on_the_page_is_valid_and_has_the_described_effect(tmp_path: Path) -> None:
    """It admits a run at epsilon 1, and neither one at 3, nor one per photo, nor one that trusts the server."""
    policy = parse(SNIPPET, DevicePolicy, name="docs/epsilon.md")
    assert policy.unit == "occasion" and policy.exclude_folders == (Path("Private"),)
    assert policy.periods == (Period(days=30, epsilon=1.0),)
    assert policy.budgets[0] == Budget(epsilon=3.0, delta=DELTA, unit="occasion")
    ledger, recipe = (
        Ledger.open(tmp_path / "ledger.sqlite"),
        read_experiment(ROOT / "experiments" / "demo.yaml"),
    )

    def ask(plan: Plan) -> str:
        try:
            policy.admit(
                plan,
                purpose_of(recipe.aggregation, recipe.devices.count, recipe.training.objective),
                ledger,
            )
        except PolicyRefusal as refusal:
            return str(refusal)
        return "admitted"

    trusting = PrivacyTarget(epsilon=1.0, delta=DELTA, unit="library", noise="central")
    at_server = Plan(privacy=trusting, schedule=plan_of(1).schedule, noise_multiplier=30.0)
    assert ask(plan_of(1)) == "admitted"
    assert "in any 30 days" in ask(plan_of(3))
    assert "guarantee is per photo" in ask(plan_of(3, "photo"))
    assert "the server adds the noise" in ask(at_server)
    for round in range(1, plan_of(1).schedule.rounds + 1):
        policy.record(plan_of(1), ledger, run="first", round=round)
    assert "in any 30 days" in ask(plan_of(1))


def test_the_picture_uses_the_same_formula() -> None:
    """Its script has curves for the epsilons on the page, by Bayes' rule, and renders a PNG."""
    script = _script(ROOT / "benchmarks" / "epsilon_in_pictures.py")
    assert sorted(script.EPSILONS) == [0.5, 1.0, 3.0, 8.0]
    for epsilon in script.EPSILONS:
        for before in (0.001, 0.01, 0.5, 0.9):
            assert script.sure_after(before, epsilon) == pytest.approx(sure(epsilon, before))
    assert script.PICTURE.exists() and script.picture().startswith(b"\x89PNG")


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
