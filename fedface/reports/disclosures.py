"""Statements in every report: withdrawals, what each hash covers, which attacks apply."""

from __future__ import annotations

from fedface.audits.gradient_inversion import NoDefense
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.reports.run_record import AttackRecord, BiasRecord, RunRecord


def withdrawal_notes(record: RunRecord) -> list[str]:
    """What happens when a device withdraws, and what cannot be undone; stated whether or not a device has withdrawn."""
    withdrawing = (
        "The owner of a device can withdraw at any time (fedface device withdraw): the device gets no further "
        "requests, its individual replies are deleted, and its name is removed from the run's files."
    )
    match record.plan.privacy:
        case PrivacyTarget(unit=unit, noise="central"):
            bound = (
                f"the privacy guarantee still bounds what the published weights and metrics reveal about one {unit}, "
                "but not what the server saw before it added the noise"
            )
        case PrivacyTarget(unit=unit):
            bound = f"the privacy guarantee still bounds what they reveal about one {unit}"
        case _:
            bound = "without a privacy guarantee, nothing bounds what they reveal"
    permanent = (
        "What cannot be undone: its earlier replies were summed with those of other devices and are part of the "
        f"weights and metrics since then, and of every copy of them; {bound}."
    )
    withdrawals = [each.sentence() for each in record.withdrawals]
    return [withdrawing, permanent, *(withdrawals or ["No device has withdrawn from this run."])]


def hash_note(record: RunRecord) -> str:
    """Which weights an audit's hash covers; empty where it is that of the whole model."""
    pairs = (
        ("before", record.bias_before, record.base_hash),
        ("after", record.bias_after, record.final_hash),
    )
    differing = [
        f"{audit.weights_hash[:12]} {when} the run"
        for when, audit, whole in pairs
        if isinstance(audit, BiasRecord) and audit.weights_hash != whole
    ]
    if not differing:
        return ""
    return (
        "The hashes of the weights before and after cover all networks of the model; those of the bias audit cover "
        f"only the network that upsampled the probe ({', '.join(differing)})."
    )


def applicable_attacks(record: RunRecord) -> tuple[AttackRecord, ...]:
    """The attacks on updates as this run sends them: with central or distributed noise, steps on a device have none."""
    if isinstance(record.plan.privacy, PrivacyTarget) and record.plan.privacy.noise != "local":
        return tuple(attack for attack in record.attacks if isinstance(attack.scores.defense, NoDefense))
    return record.attacks


def attack_note(record: RunRecord) -> str:
    """How the attacked defenses relate to this run; empty where they are the run's own."""
    if not record.attacks:
        return ""
    match record.plan.privacy:
        case NoPrivacy() if len(record.attacks) > 1:
            return "This run adds no noise: the attack against DP shows what noise would have changed."
        case PrivacyTarget(noise="central"):
            return (
                "In this run the server adds noise to the sum of all updates, so a single update has none: an attacker "
                "who sees one, such as the server, sees what is attacked here."
            )
        case PrivacyTarget(noise="distributed"):
            return (
                "In this run only the sum of all updates, with noise, is seen by the server: an attack on a single "
                "update, as here, shows what masks and noise hide."
            )
    return ""
