"""What every report says whether or not something happened: who can leave, which hash covers what, what was attacked.

Called by reports.page and reports.card, so that both say the same.
"""

from __future__ import annotations

from fedface.reports import formatting
from fedface.reports.run_record import AttackRecord, BiasRecord, NoPrivacyRecord, PlanRecord, RunRecord


def withdrawal_notes(record: RunRecord) -> list[str]:
    """What happens when a device leaves a run, and what cannot be undone; said whether or not somebody left."""
    gone = (
        "The owner of a device can leave a run at any time (fedface device withdraw): it is not asked again, its "
        "answers are not kept by themselves, and its name goes from the run's files."
    )
    match record.plan:
        case PlanRecord(unit=unit, noise_at="server"):
            bound = (
                f"what the published weights and figures tell about one {unit} stays bounded by the promise; what the "
                "server saw of its bare answers is not"
            )
        case PlanRecord(unit=unit):
            bound = f"what they tell about one {unit} stays bounded by the promise"
        case NoPrivacyRecord():
            bound = "nothing bounds what they tell"
    kept = (
        "What cannot be undone: what it has sent was summed with what others sent, is part of the weights and figures "
        f"since then, and of every copy of them; {bound}."
    )
    if record.withdrawals:
        return [gone, kept, *(left.sentence for left in record.withdrawals)]
    return [gone, kept, "Nobody left this run."]


def hash_note(record: RunRecord) -> str:
    """Which weights an audit's hash covers, where it is not that of the whole model."""
    pairs = (
        ("before", record.bias_before, record.base_hash),
        ("after", record.bias_after, record.final_hash),
    )
    said = [
        f"{audit.weights_hash[:12]} {when} the run"
        for when, audit, whole in pairs
        if isinstance(audit, BiasRecord) and audit.weights_hash != whole
    ]
    if not said:
        return ""
    return (
        "Two kinds of hash: the weights before and after are of the whole model, all its networks; those of the audit "
        f"cover only the network that was asked about the photos ({', '.join(said)})."
    )


def attacks_of(record: RunRecord) -> tuple[AttackRecord, ...]:
    """The attacks on updates as this run sends them: where the server adds the noise, a single update has none."""
    if isinstance(record.plan, PlanRecord) and record.plan.noise_at == "server":
        return tuple(attack for attack in record.attacks if attack.defense == formatting.NO_DEFENCE)
    return record.attacks


def attack_note(record: RunRecord) -> str:
    """What the defences in the table have to do with this run; empty where they are the run's own."""
    if not record.attacks:
        return ""
    match record.plan:
        case PlanRecord(noise_at="server"):
            return (
                "This run adds noise to the sum of all updates, on the server, so a single update has none: whoever "
                "sees one, such as the server, sees what is attacked here."
            )
        case NoPrivacyRecord() if len(record.attacks) > 1:
            return "This run adds no noise: the attack against DP says what noise would have changed."
    return ""
