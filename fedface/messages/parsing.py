"""Messages of strangers, read: every part is checked for kind, size and bounds, and nothing in it is run.

Called by transport/flower.py on the device (`read_task`) and on the server (`read_reply`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from fedface.aggregation.payload import AggregationConfig, AggregationParameters
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.config import parse
from fedface.errors import ConfigError, FederationError, PrivacyError
from fedface.messages.messages import (
    VERSION,
    DecryptResult,
    DecryptTask,
    EvaluateResult,
    EvaluateTask,
    EvaluationRequest,
    Message,
    Refusal,
    Reply,
    RoundConfig,
    Task,
    TrainResult,
    TrainTask,
    vector_from,
)
from fedface.models.model import Architecture
from fedface.privacy.plan import DPParameters
from fedface.training.training_methods import Training
from fedface.upsampling.degradation import Degradation
from fedface.upsampling.methods import Method


def read_task(message: Message) -> Task:
    """The task in a message.

    Raises:
        FederationError: It is no task of this version, or a part is missing or out of bounds.
    """
    header = _header(message)
    try:
        if header["what"] == "train":
            return TrainTask(
                config=RoundConfig(
                    training=_choice(header, "training"),
                    **_agreed(header),
                ),
                **_about(header, message),
            )
        if header["what"] == "evaluate":
            return EvaluateTask(
                request=EvaluationRequest(
                    method=_choice(header, "method"),
                    downscale=_choice(header, "downscale"),
                    metrics=_part(header, "metrics", LocalMetricsConfig),
                    **_agreed(header),
                ),
                **_about(header, message),
            )
        if header["what"] == "reveal":
            if header["of"] not in ("updates", "figures"):
                raise ValueError(f"expected a sum of updates or figures, got {header['of']!r:.80}")
            return DecryptTask(
                count=header["of"],
                run=_run(header["run"]),
                round=_whole(header["round"], 1),
                aggregation=_choice(header, "aggregation"),
                agreement=_part(header, "agreement", AggregationParameters),
                total=message.blobs["total"],
            )
    except (
        KeyError, TypeError, ValueError, OverflowError, MemoryError, ConfigError, PrivacyError
    ) as error:  # fmt: skip
        raise FederationError(f"this task cannot be read: {_said(error)}") from error
    raise FederationError(f"wanted a task to train, evaluate or reveal, got {header['what']!r}")


def _about(header: dict[str, Any], message: Message) -> dict[str, Any]:
    """What every task about a model names: the run, the question, and the model itself."""
    blobs = message.blobs
    return {
        "run": _run(header["run"]),
        "round": _whole(header["round"], 1),
        "cohort": _whole(header["cohort"], 1),
        "seed": _whole(header["seed"], 0),
        "weights": vector_from(blobs["weights"]),
        "buffers": vector_from(blobs["buffers"]) if blobs["buffers"] else torch.zeros(0),
        "model": _word(header["model"]),
    }


def _agreed(header: dict[str, Any]) -> dict[str, Any]:
    """What every task that releases something agrees on."""
    return {
        "dp": DPParameters.from_record(header["dp"]),
        "architecture": _choice(header, "architecture"),
        "aggregation": _choice(header, "aggregation"),
        "agreement": _part(header, "agreement", AggregationParameters),
        "holdout_fraction": _number(header["holdout_fraction"]),
    }


def read_reply(message: Message) -> Reply:
    """The reply in a message.

    Raises:
        FederationError: It is no reply of this version, or a part is missing or out of bounds.
    """
    header = _header(message)
    try:
        device = _word(header["device"])
        if header["what"] == "trained":
            return TrainResult(
                device=device, payload=message.blobs["payload"], seconds_protect=_seconds(header["seconds"])
            )
        if header["what"] == "scored":
            return EvaluateResult(
                device=device, payload=message.blobs["payload"], seconds_protect=_seconds(header["seconds"])
            )
        if header["what"] == "revealed":
            return DecryptResult(device=device, total=vector_from(message.blobs["total"]))
        if header["what"] == "refusal":
            return Refusal(
                device=device, reason=_sentence(header["reason"]), withdrawn=header["withdrawn"] is True
            )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FederationError(f"this reply cannot be read: {_said(error)}") from error
    raise FederationError(f"wanted a reply, got {header['what']!r}")


def _header(message: Message) -> dict[str, Any]:
    try:
        header = json.loads(message.header)
    except (ValueError, RecursionError) as error:
        raise FederationError("this message has no readable header") from error
    if not isinstance(header, dict) or header.get("version") != VERSION or "what" not in header:
        raise FederationError(f"wanted a message of version {VERSION}; update the older of the two sides")
    return header


def _part(header: dict[str, Any], key: str, wanted: type[Any]) -> Any:
    return parse(json.dumps(header[key]), wanted, name=key)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    aggregation: AggregationConfig | None = None
    training: Training | None = None
    architecture: Architecture | None = None
    method: Method | None = None
    downscale: Degradation | None = None


def _choice(header: dict[str, Any], key: str) -> Any:
    """A part that is one of several dataclasses, picked by its `kind`."""
    chosen = getattr(parse(json.dumps({key: header[key]}), _Choices, name="task"), key)
    if chosen is None:
        raise ValueError(f"{key} must be given, got null")
    return chosen


def _word(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise ValueError(f"expected a short text, got {value!r:.80}")
    return value


def _run(value: Any) -> str:
    """A run's name: without a slash, which parts it in the ledger from what the run asks besides."""
    if "/" in (run := _word(value)):
        raise ValueError(f"expected the name of a run without a slash, got {run!r:.80}")
    return run


def _whole(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"expected a whole number of at least {least}, got {value!r:.80}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {value!r:.80}")
    return float(value)


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < 1e9:
        raise ValueError(f"expected a number of seconds, got {value!r:.80}")
    return seconds


def _sentence(value: Any) -> str:
    """A stranger's words for our reports: of bounded length, without control characters or broken UTF-16."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value)[:1000])


def _said(error: Exception) -> str:
    return f"the part {error} is missing" if isinstance(error, KeyError) else str(error)
