"""Trust, what an epsilon covers, and what cannot be undone: the same in the HTML report and the model card."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import epsilon_after
from markdown_it import MarkdownIt

from fedface.audits.gradient_inversion import NoDefense
from fedface.cli.options import command_line
from fedface.measurements import Epsilon, NotMeasured
from fedface.number_format import rounded_down, rounded_up
from fedface.privacy.plan import Schedule, make_plan
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.reports import disclosures, formatting, html_report, model_card
from fedface.reports.device_metrics_record import WithdrawalRecord
from fedface.reports.headline_summary import headline_numbers
from fedface.reports.run_record import RunRecord

SCHEDULE = Schedule(rounds=1, steps_per_round=3, sampling_rate=0.1, expected_batch_size=10, clip_norm=0.3)


@pytest.fixture(scope="module")
def library(record: RunRecord) -> RunRecord:
    """A run whose server adds the noise."""
    target = PrivacyTarget(epsilon=8.0, delta=1e-4, unit="library", noise="central")
    return replace(record, plan=make_plan(target, SCHEDULE, update_clip_norm=0.07))


def test_distributed_noise_protects_from_the_server_if_devices_are_honest(
    record: RunRecord, folder: Path
) -> None:
    """Each report says against whom the guarantee holds, and on whom it relies."""
    target = PrivacyTarget(epsilon=8.0, delta=1e-4, unit="library", noise="distributed")
    shared = replace(record, plan=make_plan(target, SCHEDULE, update_clip_norm=0.07, honest_devices=3))
    for text in (html_report.render(shared, folder), model_card.render(shared)):
        assert (
            "if at least 3 devices in each sum add their share of the noise and keep it from the server"
            in text
        )
        assert "trusted server" not in text and "receives every update without noise" not in text
    assert "an attack on a single update" in disclosures.attack_note(shared)
    assert all(isinstance(each.scores.defense, NoDefense) for each in disclosures.applicable_attacks(shared))


def test_a_trusted_servers_guarantee_covers_what_it_publishes(library: RunRecord, folder: Path) -> None:
    for text in (html_report.render(library, folder), model_card.render(library)):
        plain = text.replace("&#39;", "'")
        assert (
            "What the trusted server publishes about 1 round satisfies differential privacy with at most epsilon 8 "
            "at delta 1e-4 per library" in plain
        )
        assert "The server itself receives every update without noise" in plain
        assert (
            "Everything that leaves a device" not in plain and "everything that leaves a device" not in plain
        )


def test_a_trusted_servers_card_has_the_update_clip_norm(library: RunRecord) -> None:
    text = model_card.render(library)
    assert "Trusted: the server" in text
    assert "each device's update is clipped to L2 norm 0.07" in text
    assert ", clip norm" not in text and "0.3," not in text


def test_a_single_update_of_a_trusted_servers_run_has_no_noise(library: RunRecord, folder: Path) -> None:
    (attack,) = disclosures.applicable_attacks(library)
    assert attack.scores.defense == NoDefense()
    for text in (html_report.render(library, folder), model_card.render(library)):
        assert "sigma" not in text.split("Leakage from an update")[1].split("Limitations")[0]
        assert "so a single update has none" in text
    assert "no attack in this report tests the noise" in html_report.render(library, folder)
    assert not any("→ DP" in tile["text"] for tile in headline_numbers(library))


def test_a_run_without_noise_shows_no_defense_in_its_headline(record: RunRecord) -> None:
    reduced = replace(record, plan=make_plan(NoPrivacy(), SCHEDULE))
    assert not any("DP sigma" in tile["text"] for tile in headline_numbers(reduced))
    assert "what noise would have changed" in disclosures.attack_note(reduced)


def test_a_guarantee_names_epsilon_delta_and_unit() -> None:
    plan = make_plan(PrivacyTarget(epsilon=8.0, delta=1e-4, unit="occasion"), SCHEDULE)
    assert (
        "leaves a device in 1 round satisfies differential privacy with at most epsilon 8 at delta 1e-4 per occasion"
        in formatting.privacy_guarantee(plan)
    )


def test_bounds_are_rounded_outwards() -> None:
    """7.99823 lies between 7.998 and 7.999; an integer is unchanged."""
    assert (rounded_down(7.99823), rounded_up(7.99823)) == ("7.998", "7.999")
    assert (rounded_down(8.0), rounded_up(8.0)) == ("8.000", "8.000")
    assert (rounded_down(0.000123456), rounded_up(0.000123456)) == ("0.0001234", "0.0001235")
    value = Epsilon(lower=7.99823, estimate=7.9991, upper=7.99998, delta=1e-4, unit="photo")
    assert str(value).startswith("epsilon 7.999 (between 7.998 and 8.000) at delta 1e-4 per photo")
    for exact in (7.99823, 123.456, 1 / 3, math.pi * 1e-3):
        assert float(rounded_down(exact)) <= exact <= float(rounded_up(exact))


def test_a_command_is_quoted_for_a_shell() -> None:
    changes = {"privacy": "{kind: privacy-target, epsilon: 8}"}
    line = command_line("run", Path("my recipes/a.yaml"), None, changes)
    assert shlex.split(line) == [
        "fedface",
        "run",
        "my recipes/a.yaml",
        "--set",
        f"privacy={changes['privacy']}",
    ]


@pytest.mark.parametrize("command", ["fedface run a_b.yaml --set 'x={a: [1]}'", "echo ``` '<b>' ````"])
def test_the_card_has_the_command_verbatim(record: RunRecord, command: str) -> None:
    """For a Markdown parser, the last code block is the command, whatever fences it contains."""
    tokens = MarkdownIt().parse(model_card.render(replace(record, command=command)))
    assert [token.content for token in tokens if token.type == "fence"][-1] == f"{command}\n"


def test_hashes_of_one_network_and_of_the_model_are_distinguished(record: RunRecord, folder: Path) -> None:
    assert disclosures.hash_note(record) == ""
    assert not isinstance(record.bias_after, NotMeasured)
    part = replace(record, bias_after=replace(record.bias_after, weights_hash="cd" * 32))
    note = "cover only the network that upsampled the probe (cdcdcdcdcdcd after the run)"
    assert note in html_report.render(part, folder) and note in model_card.render(part).replace("\\", "")


def test_what_cannot_be_undone_is_stated_without_a_withdrawal_too(record: RunRecord, folder: Path) -> None:
    for text in (html_report.render(record, folder), model_card.render(record)):
        assert "What cannot be undone" in text and "No device has withdrawn from this run." in text
    left = replace(
        record,
        withdrawals=(WithdrawalRecord(rounds=(3,), evaluations=1, epsilon=epsilon_after(1), noise="local"),),
    )
    result = disclosures.withdrawal_notes(left)
    assert "No device has withdrawn from this run." not in result
    assert "its update of round 3 was summed" in result[-1]


def test_withdrawals_state_that_the_server_saw_updates_without_noise(library: RunRecord) -> None:
    assert "but not what the server saw before it added the noise" in disclosures.withdrawal_notes(library)[1]
