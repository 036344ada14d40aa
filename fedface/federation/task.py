"""What crosses between server and device: tasks going out, replies coming back, each a header and some bytes.

Called by federation/device.py (answers), coordinator.py (asks) and flower.py (carries). Nothing here is
executable and nothing is trusted: whoever reads a message checks it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fedface.aggregation.protocol import AggregationConfig, Agreement
from fedface.config import parse, plain
from fedface.errors import ConfigError, FederationError, PrivacyError
from fedface.models.family import Shape
from fedface.privacy.plan import Terms
from fedface.shapes import Vector
from fedface.training.ways import Training

VERSION = 2  # 2: families of models and ways of training


@dataclass(frozen=True)
class Message:
    """The neutral form of every task and reply: a JSON header, and named blobs."""

    header: str  # JSON text
    blobs: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Everything public that a device must know to compute one update; carries no epsilon on purpose."""

    terms: Terms
    training: Training
    shape: Shape  # of the model: which family, and how large
    aggregation: AggregationConfig
    agreement: Agreement


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Fine-tune these weights for one round and send the protected change."""

    run: str  # name of the run, the same in every round
    round: int  # from 1
    cohort: int  # how many devices are asked, as the server says
    seed: int  # of replayable streams: latents of made pictures, directions of low-rank changes
    agreed: Agreed
    weights: Vector  # of all networks of the model, flat (d,)
    buffers: Vector  # noise maps and mean style, flat; a flow has none
    model: str  # hash of the weights, for the ledger

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "train", "version": VERSION, "run": self.run, "round": self.round, "cohort": self.cohort,
            "seed": self.seed, "model": self.model, "terms": self.agreed.terms.to_record(),
            "training": plain(self.agreed.training), "shape": plain(self.agreed.shape),
            "aggregation": plain(self.agreed.aggregation), "agreement": plain(self.agreed.agreement),
        }  # fmt: skip
        return Message(
            json.dumps(header), {"weights": vector_bytes(self.weights), "buffers": vector_bytes(self.buffers)}
        )


@dataclass(frozen=True, kw_only=True)
class RevealTask:
    """Open this sum: only a device that holds the key can. The sum is public once opened."""

    run: str
    round: int
    aggregation: AggregationConfig
    agreement: Agreement
    total: bytes  # a payload

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "reveal", "version": VERSION, "run": self.run, "round": self.round,
            "aggregation": plain(self.aggregation), "agreement": plain(self.agreement),
        }  # fmt: skip
        return Message(json.dumps(header), {"total": self.total})


Task = TrainTask | RevealTask


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A protected update."""

    device: str  # the name under which the device wants to be listed
    payload: bytes
    seconds_protect: float

    def message(self) -> Message:
        """For the wire."""
        header = {
            "what": "trained",
            "version": VERSION,
            "device": self.device,
            "seconds": self.seconds_protect,
        }
        return Message(json.dumps(header), {"payload": self.payload})


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """An opened sum."""

    device: str
    total: Vector

    def message(self) -> Message:
        """For the wire."""
        header = {"what": "revealed", "version": VERSION, "device": self.device}
        return Message(json.dumps(header), {"total": vector_bytes(self.total)})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A device's "no", a normal reply."""

    device: str
    reason: str

    def message(self) -> Message:
        """For the wire."""
        return Message(json.dumps({"what": "refusal", "version": VERSION, **asdict(self)}), {})


Reply = Trained | Revealed | Refusal


@dataclass(frozen=True)
class Fault:
    """No usable reply from a device, and why: it is dropped for the round and named."""

    reason: str


def read_task(message: Message) -> Task:
    """The task in a message.

    Raises:
        FederationError: It is no task of this version, or a part is missing or out of bounds.
    """
    header = _header(message)
    try:
        if header["what"] == "train":
            return TrainTask(
                run=_word(header["run"]),
                round=_whole(header["round"], 1),
                cohort=_whole(header["cohort"], 1),
                seed=_whole(header["seed"], 0),
                agreed=Agreed(
                    terms=Terms.from_record(header["terms"]),
                    training=_choice(header, "training"),
                    shape=_choice(header, "shape"),
                    aggregation=_choice(header, "aggregation"),
                    agreement=_part(header, "agreement", Agreement),
                ),
                weights=vector_from(message.blobs["weights"]),
                buffers=vector_from(message.blobs["buffers"]) if message.blobs["buffers"] else torch.zeros(0),
                model=_word(header["model"]),
            )
        if header["what"] == "reveal":
            return RevealTask(
                run=_word(header["run"]),
                round=_whole(header["round"], 1),
                aggregation=_choice(header, "aggregation"),
                agreement=_part(header, "agreement", Agreement),
                total=message.blobs["total"],
            )
    except (
        KeyError, TypeError, ValueError, OverflowError, MemoryError, ConfigError, PrivacyError
    ) as error:  # fmt: skip
        raise FederationError(f"this task cannot be read: {_said(error)}") from error
    raise FederationError(f"wanted a task to train or reveal, got {header['what']!r}")


def read_reply(message: Message) -> Reply:
    """The reply in a message.

    Raises:
        FederationError: It is no reply of this version, or a part is missing or out of bounds.
    """
    header = _header(message)
    try:
        device = _word(header["device"])
        if header["what"] == "trained":
            return Trained(
                device=device, payload=message.blobs["payload"], seconds_protect=_seconds(header["seconds"])
            )
        if header["what"] == "revealed":
            return Revealed(device=device, total=vector_from(message.blobs["total"]))
        if header["what"] == "refusal":
            return Refusal(device=device, reason=_sentence(header["reason"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FederationError(f"this reply cannot be read: {_said(error)}") from error
    raise FederationError(f"wanted a reply, got {header['what']!r}")


def vector_bytes(vector: Vector) -> bytes:
    """Little-endian float32."""
    return vector.detach().cpu().numpy().astype("<f4").tobytes()


def vector_from(written: bytes) -> Vector:
    """What `vector_bytes` wrote; ValueError where the length does not fit or a number is not finite."""
    if not written or len(written) % 4:
        raise ValueError(f"a vector needs 4 bytes for each number, got {len(written)} bytes")
    vector = torch.from_numpy(np.frombuffer(written, dtype="<f4").astype(np.float32))
    if not torch.isfinite(vector).all():
        raise ValueError("a vector holds numbers that are not finite")
    return vector


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
    shape: Shape | None = None


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


def _whole(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"expected a whole number of at least {least}, got {value!r:.80}")
    return value


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
