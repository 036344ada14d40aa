"""The work of `fedface device plans` and `admit`; fedface/cli/device.py declares them."""

from __future__ import annotations

import re
from pathlib import Path

from fedface.aggregation.payload import purpose_of
from fedface.atomic_io import replace_bytes
from fedface.cli.console import print_json, say, table_of
from fedface.cli.device_log import confirm
from fedface.cli.device_status import existing_device
from fedface.cli.policy_check import ledger_or_empty
from fedface.cli.policy_report import PolicyReport
from fedface.cli.policy_verdicts import Request, judge
from fedface.cli.run_plan_text import describe_plan, plan_price, plan_table
from fedface.config import text_of
from fedface.device.config import DeviceConfig
from fedface.device.device import admitted_plans
from fedface.device.state import DeviceState
from fedface.errors import ConfigError
from fedface.messages.messages import EvaluationRequest
from fedface.messages.run_plan import AdmittedPlans, RunPlan
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import RecordedRun
from fedface.privacy.policy import EVALUATION, DevicePolicy
from fedface.privacy.releases import event_to_json
from fedface.transport.enrolment import Server

SHORT = 12  # digits of a hash in a table; any unique beginning names a plan


def plans_of(config: DeviceConfig) -> AdmittedPlans:
    """The run plans that an owner admitted. Raises ConfigError if the device file names no operator."""
    plans = admitted_plans(config)
    if plans is None:
        raise ConfigError(
            f"the device {config.name} names no operator, so it has no run plans: it answers every request that its "
            "policy allows"
        )
    return plans


def judge_plan(plan: RunPlan, allowed: DevicePolicy, ledger: Ledger) -> PolicyReport:
    """Whether a policy admits the run of a plan beside what a ledger holds."""
    requests = []
    for part in plan.parts:
        evaluates = isinstance(part, EvaluationRequest)
        objective = EVALUATION if isinstance(part, EvaluationRequest) else part.training.objective
        purpose = purpose_of(part.aggregation, part.agreement.max_devices, objective)
        requests.append(Request(what="evaluation" if evaluates else "training", purpose=purpose, dp=part.dp))
    return judge(plan.name, requests, allowed, ledger)


def verdict(plan: RunPlan, state: DeviceState, ledger: Ledger) -> tuple[bool, str]:
    """Whether a device would answer the requests of a plan, and why, as a phrase; a run that has begun is recorded."""
    event = event_to_json(plan.releases.event())
    begun = [each for each in ledger.read().records if isinstance(each, RecordedRun) and each.event == event]
    if begun:
        return True, f"has begun here, on {begun[-1].written[:10]}"
    refusal = judge_plan(plan, state.config.policy, ledger).refusal
    return refusal is None, "fits the policy" if refusal is None else f"would be refused: {refusal}"


def device_plans(device: Path, remove: str | None, json_out: bool) -> None:
    state = existing_device(device)
    plans = plans_of(state.config)
    if remove is not None:
        path = _named(plans, remove)
        path.unlink()
        say(
            f"Removed {path.stem[:SHORT]}: its requests are refused from now on; what was sent stays recorded."
        )
        return
    policy, found = state.config.policy, []
    with ledger_or_empty(state.ledger.open_existing()) as ledger:
        for plan_hash, plan in plans.read().items():
            price = plan_price(plan, delta=policy.delta, unit=policy.unit)
            found.append((plan_hash, plan, price, *verdict(plan, state, ledger)))
    if json_out:
        print_json(
            [
                {
                    "hash": plan_hash, "run": plan.name, "question": plan.question, "price": price.to_record(),
                    "fits": fits, "verdict": why,
                    "description": dict(describe_plan(plan, delta=policy.delta, unit=policy.unit)),
                }
                for plan_hash, plan, price, fits, why in found
            ]
        )  # fmt: skip
        return
    headings = ("run plan", "run", "cost of the whole run", "this device")
    rows = [(plan_hash[:SHORT], plan.name, price, why) for plan_hash, plan, price, _, why in found]
    say(table_of(headings, rows) if found else "No run plan is admitted: every request is refused.")


def device_admit(device: Path, plan_hash: str, yes: bool) -> None:
    state = existing_device(device)
    config, policy = state.config, state.config.policy
    plans = plans_of(config)
    if re.fullmatch("[0-9a-f]{64}", plan_hash) is None:
        raise ConfigError(f"expected the hash of a run plan, 64 hexadecimal digits, got {plan_hash!r:.70}")
    if plans.path(plan_hash).exists():
        say(f"{plan_hash[:SHORT]} is admitted already.")
        return
    server = Server(address=config.server, authority=text_of(config.certificate))
    signed = server.fetch_plan(plan_hash, plans.operator)
    say(plan_table(signed.plan, delta=policy.delta, unit=policy.unit))
    with ledger_or_empty(state.ledger.open_existing()) as ledger:
        fits, why = verdict(signed.plan, state, ledger)
    say("")
    say(f"This run {why}.")
    if yes and not fits:
        raise ConfigError(f"the run {signed.plan.name} {why}; it was not admitted")
    confirm(f"Admit the run {signed.plan.name}", yes)
    plans.folder.mkdir(exist_ok=True, mode=0o700)
    replace_bytes(plans.path(signed.hash), signed.to_bytes(), mode=0o600)
    say(f"Admitted. `fedface device plans {device} --remove {plan_hash[:SHORT]}` takes it back.")


def _named(plans: AdmittedPlans, beginning: str) -> Path:
    """The file of the one admitted plan whose hash begins like this."""
    found = [path for path in plans.folder.glob("*.plan") if path.stem.startswith(beginning.lower())]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found) or 'no'} admitted run plan{'s begin' if len(found) > 1 else ' begins'} with {beginning:.70}; "
            "give more of its hash, as `fedface device plans` lists it"
        )
    return found[0]
