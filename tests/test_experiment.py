"""Experiments: what is refused, what is derived, and what changes the digest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedface.aggregation.payload import PlainConfig
from fedface.config import parse
from fedface.errors import ConfigError
from fedface.experiment import (
    Experiment,
    LabelledDevices,
    LabelledProbe,
    RemoteDevices,
    SyntheticDevices,
    read_experiment,
)
from fedface.models.checkpoint import load_gan, weights_hash
from fedface.privacy.policy import DevicePolicy

TEXT = """
question: Does it matter?
name: small
privacy: {kind: privacy-target, epsilon: 4, delta: 1e-4}
devices: {kind: synthetic-devices, light_fractions: [0.9, 0.1, 0.5], photos_per_device: 100}
training: {kind: gan-training, rounds: 2, steps_per_round: 3, sampling_rate: 0.2, expected_batch_size: 20}
"""


def experiment(**changes: str) -> Experiment:
    """The recipe above with changes by dotted key."""
    return parse(TEXT, Experiment, name="e.yaml", changes=changes)


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("question", "' '", "e.yaml, as changed: question: must not be empty"),
        ("name", "a/b", "e.yaml, as changed: name: must be letters"),
        ("name", "..", "e.yaml, as changed: name: must be letters"),
        ("name", "''", "e.yaml, as changed: name: must be letters"),
        ("name", "x" * 101, "e.yaml, as changed: name: must be"),
        ("seed", "-1", "seed: must be at least 0"),
        ("min_responses", "4", "min_responses: must lie between 1 and the 3 devices, got 4"),
        ("min_responses", "0", "min_responses: must lie between 1 and the 3 devices, got 0"),
        ("privacy.delta", "0.02", "delta must lie below 1 / photos of a device = 0.01, got 0.02"),
        ("privacy.epsilon", "0", "privacy.epsilon: must be a finite number above 0"),
        ("privacy.unit", "birthday", "privacy.unit: expected one of photo"),
        ("devices.light_fractions", "[]", "devices.light_fractions: must name at least one device"),
        ("devices.light_fractions", "[1.5]", "devices.light_fractions: must lie in [0, 1]"),
        ("devices.photos_per_device", "1", "devices.photos_per_device: must be at least 2"),
        ("probe", "{kind: synthetic-probe, per_group: 1}", "probe.per_group: must lie in [2, 1000]"),
        ("probe", "{kind: labelled-probe, per_group: 1}", "probe.per_group: must lie in [2, 1000]"),
        ("devices", "{kind: labelled-devices, count: 0}", "devices.count: must be at least 1"),
        (
            "devices",
            "{kind: remote-devices, at_most: 2}",
            "devices.at_most: must be at least at_least=3, got 2",
        ),
        (
            "aggregation",
            "{kind: homomorphic, min_devices: 3}",
            "min_responses must be at least aggregation.min_devices=3",
        ),
        ("devices", "{kind: remote-devices, at_least: 0}", "devices.at_least: must be at least 1"),
        ("upsampling.faces_per_photo", "0", "upsampling.faces_per_photo: must lie in [1, 64]"),
        (
            "upsampling.downscale",
            "{kind: area, factor: 0}",
            "upsampling.downscale.factor: must be at least 1",
        ),
        ("upsampling.method", "{kind: pulse, steps: 0}", "upsampling.method.steps: must be at least 1"),
        ("attack.photos", "1", "attack.photos: must lie in [2, 100]"),
        ("training.rounds", "0", "training.rounds: must be at least 1"),
        ("training.clip_norm", "-1", "training.clip_norm: must be a finite number above 0"),
        ("aggregation.bits", "1", "aggregation"),
        ("aggregation", "{kind: homomorphic, bits: 1}", "aggregation.bits: must lie in [2, 24]"),
        ("policy", "{max_epsilon: 0, delta: 1e-5}", "policy.max_epsilon: must be a finite number above 0"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_key(key: str, value: str, result: str) -> None:
    """By dotted key, with the bound and the value."""
    with pytest.raises(ConfigError, match=re.escape(result)):
        experiment(**{key: value})


def test_a_robust_rule_is_refused_where_it_has_no_meaning() -> None:
    """The server's noise fits a sum, and moments of a library grow with it."""
    rule = "{kind: plain, rule: median}"
    assert experiment(aggregation=rule).aggregation == PlainConfig(rule="median")
    central = "{kind: privacy-target, epsilon: 4, delta: 1e-3, unit: library, noise: central}"
    for changes, reason in (
        ({"privacy": central}, "aggregation: rule must be mean with central noise"),
        ({"training": "{kind: prior-training}"}, "aggregation: rule must be mean for prior-training"),
    ):
        with pytest.raises(ConfigError, match=reason):
            experiment(**changes, aggregation=rule)


def test_an_experiment_can_be_the_key_of_a_cache() -> None:
    """Equal experiments are one key, so rendered photos are reused."""
    assert hash(experiment()) == hash(experiment()) and experiment() == experiment()


def test_the_digest_changes_with_every_change_of_training_and_only_then() -> None:
    """A resumed run must be the run that was started; its audits may be others."""
    changes = [
        {},
        {"seed": "1"},
        {"training.rounds": "3"},
        {"aggregation": "{kind: plain}"},
    ]
    digests = [experiment(**change).digest() for change in changes]
    assert len(set(digests)) == len(changes)
    assert experiment().digest() == experiment(**{"attack.trials": "9"}).digest() == digests[0]
    assert re.fullmatch("[0-9a-f]{16}", digests[0])


def test_a_run_may_continue_with_other_waiting_times() -> None:
    """When a round begins and ends changes none of its results; how many devices a sum has room for does."""
    remote = "{{kind: remote-devices, at_least: {}, at_most: {}, wait_minutes: {}, answer_minutes: {}}}"
    first, patient, larger = (
        experiment(devices=remote.format(*numbers)).digest()
        for numbers in ((4, 8, 10, 60), (3, 8, 1440, 90), (4, 9, 10, 60))
    )
    assert first == patient != larger


def test_the_plan_meets_the_privacy_target() -> None:
    """Its upper bound is at most the target epsilon, and not far below."""
    bounds = experiment().plan().epsilon()
    assert bounds is not None and 3.8 < bounds.upper <= 4.0


def test_a_simulated_device_allows_exactly_its_run() -> None:
    """The target's epsilon and delta, the run's protocol; nothing without DP."""
    policy = experiment().device_policy()
    assert (policy.max_epsilon, policy.delta, policy.protocols) == (4.0, 1e-4, ("masked",))
    assert not policy.allow_no_dp and policy.objectives == ("generator",)
    assert experiment(privacy="{kind: no-privacy}").device_policy().allow_no_dp


def test_an_explicit_policy_wins() -> None:
    """An experiment may test what happens when owners allow less."""
    written = experiment(policy="{max_epsilon: 1, delta: 1e-6}")
    assert written.device_policy() == DevicePolicy(max_epsilon=1.0, delta=1e-6)


def test_masked_sums_that_do_not_fit_the_ring_are_refused_before_anything_begins() -> None:
    """24 bits for 1,200 devices take 35 bits, of which there are 32."""
    changes = {"aggregation": "{kind: masked, bits: 24}", "devices.devices_per_fraction": "400"}
    with pytest.raises(ConfigError, match="sums of 1200 updates of 24 bits take 35 bits, more than 32"):
        experiment(**changes)


def test_sums_have_headroom_for_every_device() -> None:
    """And for at least two, so that a sum of one is detected."""
    assert experiment().agreement.max_devices == 3
    alone = {"devices.light_fractions": "[0.5]", "min_responses": "1"}
    assert experiment(**alone, aggregation="{kind: plain}").agreement.max_devices == 2
    with pytest.raises(ConfigError, match="no sum could be revealed"):
        experiment(**alone, aggregation="{kind: homomorphic}")


def test_the_base_is_the_bundled_checkpoint_by_default(tmp_path: Path) -> None:
    """`base:` names another; a missing one is an error when the run starts."""
    assert weights_hash(*experiment().start().modules()) == weights_hash(*load_gan().modules())
    from fedface.errors import WeightsError

    with pytest.raises(WeightsError, match="no such checkpoint"):
        experiment(base=str(tmp_path / "none.safetensors")).start()


def test_a_factor_that_does_not_divide_the_size_is_refused_before_the_run() -> None:
    """Not after the last round, when the audit would fail."""
    with pytest.raises(ConfigError, match="upsampling: .*does not support faces of 32 pixels: .*32, got 5"):
        experiment(**{"upsampling.downscale": "{kind: area, factor: 5}"}).start()


def test_photos_replace_the_folders_of_devices_and_probe(tmp_path: Path) -> None:
    """Both, or the one that is labelled; a path with quotes and colons is preserved."""
    path = tmp_path / "e.yaml"
    path.write_text(TEXT)
    strange = tmp_path / "my 'photos': #1"
    changes = {"devices": "{kind: labelled-devices, count: 3}", "probe": "{kind: labelled-probe}"}
    both = read_experiment(path, photos=strange, changes=changes)
    assert isinstance(both.devices, LabelledDevices) and both.devices.folder == strange
    assert isinstance(both.probe, LabelledProbe) and both.probe.folder == strange
    half = read_experiment(path, photos=strange, changes={"probe": "{kind: labelled-probe}"})
    assert isinstance(half.devices, SyntheticDevices) and isinstance(half.probe, LabelledProbe)
    with pytest.raises(ConfigError, match="this file has neither"):
        read_experiment(path, photos=strange)


def test_remote_devices_have_no_description_of_photos() -> None:
    """In their config."""
    real = experiment(devices="{kind: remote-devices, at_least: 2}")
    assert isinstance(real.devices, RemoteDevices) and real.agreement.max_devices == 64


def test_a_thousand_devices_need_no_thousand_numbers() -> None:
    """Two fractions with 500 devices each; the fractions take turns."""
    devices = SyntheticDevices(light_fractions=(0.75, 0.25), devices_per_fraction=500)
    assert devices.count == 1000
    assert [devices.light_fraction(number) for number in (0, 1, 2, 999)] == [0.75, 0.25, 0.75, 0.25]
