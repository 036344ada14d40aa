"""A run plan in the words of an owner: what it does with photos, what leaves the device, and what that costs."""

from __future__ import annotations

from rich.table import Table

from fedface import number_format
from fedface.aggregation.payload import AggregationConfig, HomomorphicConfig, MaskSettings
from fedface.cli.console import facts_of
from fedface.measurements import Epsilon
from fedface.messages.run_plan import RunPlan
from fedface.privacy.accounting import epsilon_of
from fedface.privacy.adjacency import convert_unit
from fedface.privacy.mechanism import Event
from fedface.privacy.plan import DPParameters
from fedface.privacy_units import Unit, describe_unit


def plan_table(plan: RunPlan, *, delta: float, unit: Unit) -> Table:
    """A plan as rows of a heading and a sentence, its cost at a device's delta and unit."""
    return facts_of(describe_plan(plan, delta=delta, unit=unit))


def describe_plan(plan: RunPlan, *, delta: float, unit: Unit) -> list[tuple[str, str]]:
    """Headings and sentences, as for `plan_table`."""
    rows = [("Run", f"{plan.name}: {plan.question}")]
    if plan.training is not None:
        objective = {"generator": "generates faces", "upsampler": "makes low-resolution faces sharp"}
        steps = plan.training.dp.schedule
        rows.append(
            (
                "Training",
                f"your photos help to train a model that {objective[plan.training.training.objective]}: "
                f"{number_format.counted(steps.rounds, 'round')} of "
                f"{number_format.counted(steps.steps_per_round, 'step')} on this device",
            )
        )
    metrics = plan.releases.evaluation
    if metrics is None:
        rows.append(("Evaluation", "none: no model is measured on your photos"))
    elif plan.training is None:
        rows.append(
            (
                "Ranking",
                f"{number_format.counted(metrics.schedule.rounds, 'model')} are measured on your photos, to choose "
                "between them; nothing is trained",
            )
        )
    else:
        times = number_format.counted(metrics.schedule.rounds, "set")
        rows.append(("Evaluation", f"{times} of metrics of models on your photos"))
    part = plan.parts[0]
    rows.append(("What leaves", f"{_noise(part.dp)}; {_protection(part.aggregation)}; no photo"))
    price = plan_price(plan, delta=delta, unit=unit)
    rows.append(("Privacy cost", f"{price}, for the whole run"))
    rows.append(("Privacy unit", describe_unit(unit)))
    return rows


def plan_event(plan: RunPlan, unit: Unit) -> Event:
    """What a run of this plan releases about one `unit`."""
    return convert_unit(plan.releases.event(), source=plan.releases.unit, target=unit)


def plan_price(plan: RunPlan, *, delta: float, unit: Unit) -> Epsilon:
    """What a run of this plan costs by itself, computed here from its noise, rates and steps."""
    return epsilon_of(plan_event(plan, unit), delta, unit=unit)


def _noise(dp: DPParameters) -> str:
    if not dp.is_private:
        return "numbers WITHOUT NOISE"
    if dp.noise == "central":
        return "numbers without noise, which the server adds to their sum"
    if dp.noise == "distributed":
        devices = number_format.counted(dp.honest_devices, "device")
        return f"numbers with a share of the noise, of which {devices} in each sum must add theirs"
    return "numbers with noise that this device adds"


def _protection(aggregation: AggregationConfig) -> str:
    if isinstance(aggregation, MaskSettings):
        how = "masked and encrypted" if isinstance(aggregation, HomomorphicConfig) else "masked"
        return (
            f"{how}, so that the server sees only sums of at least "
            f"{number_format.counted(aggregation.min_devices, 'device')}, unless more than "
            f"{aggregation.corrupt_share:.0%} of the devices collude with it"
        )
    return "not encrypted: the server sees those of each device"
