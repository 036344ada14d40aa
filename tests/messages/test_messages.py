"""Messages are unchanged by a round trip, and everything invalid is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_experiment, tiny_gan, train_task

from fedface.aggregation.payload import AggregationParameters, HomomorphicConfig
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.errors import FederationError
from fedface.experiment import metrics_dp_parameters
from fedface.messages.messages import (
    VERSION,
    EvaluateResult,
    EvaluateTask,
    EvaluationRequest,
    ExchangeResult,
    ExchangeTask,
    Message,
    Refusal,
    Task,
    TrainResult,
    TrainTask,
    to_message,
    vector_bytes,
    vector_from,
)
from fedface.messages.parsing import read_reply, read_task
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.upsampling.degradation import BicubicPulse
from fedface.upsampling.pulse import PulseConfig

REVEAL = ExchangeTask(
    run="r",
    round=2,
    aggregation=HomomorphicConfig(bits=12),
    agreement=AggregationParameters(value_range=0.5, max_devices=3),
    exchange="decrypt",
    content=b"sum",
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    """A task under a privacy guarantee."""
    return train_task(tiny_experiment(tmp_path_factory.mktemp("task")), tiny_gan())


@pytest.fixture(scope="module")
def question(task: TrainTask) -> EvaluateTask:
    """The same weights, to be scored."""
    asked = EvaluationRequest(
        dp=metrics_dp_parameters(PrivacyTarget(epsilon=2.0, delta=1e-3, unit="occasion"), 3, 0.5),
        architecture=task.config.architecture,
        method=PulseConfig(steps=5),
        downscale=BicubicPulse(4),
        metrics=LocalMetricsConfig(tone_upper_bounds=(5, 10)),
        aggregation=HomomorphicConfig(bits=12),
        agreement=task.config.agreement,
        holdout_fraction=0.25,
    )
    return EvaluateTask(
        run="r",
        round=2,
        cohort=4,
        seed=3,
        request=asked,
        weights=task.weights,
        buffers=task.buffers,
        model="m",
    )


def same(one: Task, other: Task) -> bool:
    """Equal in every field; vectors element by element."""
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return type(one) is type(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


def test_a_task_is_unchanged_by_a_round_trip(task: TrainTask, question: EvaluateTask) -> None:
    """All three kinds, with every number of the DP parameters to the last bit."""
    assert same(read_task(to_message(task)), task)
    assert same(read_task(to_message(question)), question)
    assert same(read_task(to_message(REVEAL)), REVEAL)


def test_a_reply_is_unchanged_by_a_round_trip() -> None:
    """All four kinds, and a refusal after a withdrawal."""
    trained = TrainResult(device="d", payload=b"\x00\xff", seconds_protect=0.25)
    scored = EvaluateResult(device="d", payload=b"\x00\xff", seconds_protect=0.25)
    left = Refusal(device="d", reason="gone", withdrawn=True)
    assert read_reply(to_message(scored)) == scored and read_reply(to_message(left)) == left
    revealed = ExchangeResult(device="d", content=b"sum")
    refusal = Refusal(device="d", reason="not today")
    assert read_reply(to_message(trained)) == trained and read_reply(to_message(refusal)) == refusal
    opened = read_reply(to_message(revealed))
    assert opened == revealed


def test_no_epsilon_and_no_photo_count_is_in_a_task(task: TrainTask) -> None:
    """A device computes epsilon itself."""
    words = set(json.dumps(json.loads(to_message(task).header)).replace('"', " ").replace(":", " ").split())
    assert not words & {"epsilon", "delta", "promise", "photos", "photos_per_device"}


def corrupted(message: Message, key: str, value: Any) -> Message:
    """The message with one header entry replaced, or removed if the value is ..."""
    header = json.loads(message.header)
    place = header
    *path, last = key.split(".")
    for part in path:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return Message(json.dumps(header), message.blobs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "train"), ("request.method", None), ("request.method.kind", "magic"),
        ("request.method.steps", -1), ("request.downscale", 4),
        ("request.downscale.factor", 0), ("request.metrics", None),
        ("request.metrics.tone_upper_bounds", [3, 2, 10]), ("request.metrics.max_units", 0),
        ("request.metrics.shares.table", 0.9), ("request.holdout_fraction", 1.0),
        ("request.holdout_fraction", True), ("request.holdout_fraction", ...), ("round", 0),
        ("request.dp.unit", "street"), ("request.dp.update_clip_norm", float("inf")), ("seed", -1),
    ],
)  # fmt: skip
def test_an_invalid_evaluation_request_is_refused_in_one_sentence(
    question: EvaluateTask, key: str, value: Any
) -> None:
    with pytest.raises(FederationError):
        read_task(corrupted(to_message(question), key, value))


def test_a_run_name_with_a_slash_is_refused(task: TrainTask) -> None:
    """ "r/metrics" is where the metrics of "r" are recorded."""
    with pytest.raises(FederationError, match="without a slash"):
        read_task(corrupted(to_message(task), "run", "r/metrics"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "teach"), ("kind", ...), ("version", 1), ("version", ...),
        ("run", ""), ("run", 3), ("run", "a\nb"), ("run", "x" * 201), ("run", "\ud800"), ("run", ...),
        ("round", 0), ("round", True), ("round", 1.5), ("round", 2**63), ("cohort", 0), ("seed", -1),
        ("config.dp", None), ("config.dp", "config.dp"), ("config.dp", [1]), ("config.dp.noise_multiplier", -1.0),
        ("config.dp.noise_multiplier", float("nan")), ("config.dp.schedule.sampling_rate", 2),
        ("config.dp.schedule.rounds", 0),
        ("config.dp.schedule.rounds", float("inf")), ("config.dp.epsilon", 1), ("config.dp.schedule.clip_norm", ...),
        ("config.training.discriminator_lr", -1), ("config.training.more", 1),
        ("config.training.rounds", "many"), ("config.training", []),
        ("config.architecture.generator.size", 17), ("config.architecture.generator.size", 32),
        ("config.architecture.generator.mapping_layers", 10**9),
        ("config.architecture.discriminator.channel_max", 0), ("config.architecture.kind", "cat-shape"),
        ("config.architecture", None), ("config.training.kind", ...),
        ("config.aggregation.kind", "threshold"), ("config.aggregation", 3), ("config.agreement.max_devices", 0),
        ("config.agreement.value_range", "wide"), ("model", None),
    ],
)  # fmt: skip
def test_an_invalid_task_is_refused_in_one_sentence(task: TrainTask, key: str, value: Any) -> None:
    """Missing, wrong type, out of bounds, unknown: a FederationError each time."""
    with pytest.raises(FederationError):
        read_task(corrupted(to_message(task), key, value))


@pytest.mark.parametrize("error", [OverflowError, MemoryError])
def test_a_task_that_exceeds_memory_is_refused_in_one_sentence(
    task: TrainTask, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted where its header is parsed."""

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedface.messages.parsing.decode", full)
    with pytest.raises(FederationError, match="this task cannot be read"):
        read_task(to_message(task))


@pytest.mark.parametrize(
    "weights", [b"", b"123", b"\x00\x00\xc0\x7f", vector_bytes(torch.tensor([1.0, float("inf")]))]
)
def test_weights_that_are_not_finite_are_refused(task: TrainTask, weights: bytes) -> None:
    """Missing, truncated, NaN, infinite."""
    with pytest.raises(FederationError, match="cannot be read"):
        read_task(Message(to_message(task).header, {"weights": weights}))
    with pytest.raises(FederationError, match="missing"):
        read_task(Message(to_message(task).header, {}))


TRAINED = to_message(TrainResult(device="d", payload=b"p", seconds_protect=0.5))
REFUSAL = to_message(Refusal(device="d", reason="no"))


@pytest.mark.parametrize(
    ("message", "key", "value"),
    [
        (TRAINED, "kind", "train"),
        (TRAINED, "device", ...),
        (TRAINED, "device", ["d"]),
        (TRAINED, "device", "a\x1b[31mb"),
        (TRAINED, "seconds_protect", "soon"),
        (TRAINED, "seconds_protect", float("nan")),
        (TRAINED, "seconds_protect", float("inf")),
        (TRAINED, "seconds_protect", -1),
        (TRAINED, "seconds_protect", 10**400),
        (TRAINED, "seconds_protect", {}),
        (REFUSAL, "reason", ...),
    ],
)
def test_an_invalid_reply_is_refused_in_one_sentence(message: Message, key: str, value: Any) -> None:
    """No number of a device may stop the run that records it."""
    with pytest.raises(FederationError):
        read_reply(corrupted(message, key, value))


@pytest.mark.parametrize("header", ["", "{", "[]", "3", "[" * 200_000, '{"version": ' + "9" * 9000 + "}"])
def test_an_invalid_header_is_refused(header: str) -> None:
    """Endless nesting and digits as well."""
    for reader in (read_task, read_reply):
        with pytest.raises(FederationError):
            reader(Message(header, {}))


def test_a_refusals_reason_is_sanitised() -> None:
    """Shortened, without control characters or surrogates: it is printed and stored."""
    hostile = corrupted(REFUSAL, "reason", "no\x1b[2J\n\ud800" + "x" * 5000)
    reply = read_reply(hostile)
    assert isinstance(reply, Refusal)
    assert reply.reason.isprintable() and len(reply.reason) == 1000 and reply.reason.startswith("no ")
    reply.reason.encode("utf-8")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_a_vector_is_its_little_endian_bytes(numbers: list[float]) -> None:
    """Four bytes per number, without loss."""
    vector = torch.tensor(numbers, dtype=torch.float32)
    assert vector_bytes(vector) == np.array(numbers, dtype="<f4").tobytes()
    assert torch.equal(vector_from(vector_bytes(vector)), vector)


ATOMS = st.none() | st.booleans() | st.integers() | st.text()


@settings(max_examples=100, deadline=None)
@given(st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_json_is_a_message_or_a_federation_error(value: Any) -> None:
    """No other error is raised, for any header."""
    for kind in ("train", "decrypt", "train-result", "decrypt-result", "refusal"):
        header = {**value, "version": VERSION, "kind": kind} if isinstance(value, dict) else value
        for reader in (read_task, read_reply):
            try:
                assert is_dataclass(reader(Message(json.dumps(header), {})))
            except FederationError:
                continue


def test_a_task_contains_no_path(task: TrainTask, tmp_path: Path) -> None:
    """Not even of the base checkpoint."""
    assert str(tmp_path.parent.parent) not in to_message(task).header
