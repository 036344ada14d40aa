"""A run plan: everything public that a run asks of a device, signed by the operator and named by its hash.

The owner of a device admits a plan; the device then answers only requests of admitted plans. Signatures are Ed25519
(RFC 8032), the hash is SHA-256 of the signed bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedface.codec import CodecError, encode, loads
from fedface.errors import ConfigError, PolicyRefusal
from fedface.messages.messages import (
    EvaluateTask,
    EvaluationRequest,
    ExchangeTask,
    Name,
    RoundConfig,
    Task,
    TrainTask,
)
from fedface.privacy.plan import RunReleases
from fedface.validation import checked

MAX_BYTES = 1 << 20  # of a signed plan; plans have about two thousand


@dataclass(frozen=True, kw_only=True)
@checked
class RunPlan:
    """What every request of a run contains beside weights, rounds and seeds.

    A run without training ranks models, which may have several architectures and upsampling methods. It has an
    evaluation for each, in no order that tells which model is which.

    Raises:
        ValueError: Neither training nor evaluation, both that cannot be of one run, or evaluations that differ in more.
    """

    version: ClassVar[int] = 2

    name: Name  # of the run, before a number is added to it
    question: str  # that the experiment asks, for the owner
    training: RoundConfig | None = None
    evaluations: tuple[EvaluationRequest, ...] = ()

    def __post_init__(self) -> None:
        _ = self.releases
        first = self.evaluations[:1] * len(self.evaluations)
        if self.evaluations != tuple(
            replace(each, architecture=own.architecture, method=own.method)
            for each, own in zip(first, self.evaluations, strict=True)
        ):
            raise ValueError("evaluations of one run may differ in architecture and method alone")

    @property
    def parts(self) -> list[RoundConfig | EvaluationRequest]:
        """What there is of training and evaluation; the first evaluation stands for all."""
        return [*([] if self.training is None else [self.training]), *self.evaluations[:1]]

    @property
    def releases(self) -> RunReleases:
        """Everything that a run of this plan releases."""
        return RunReleases(
            training=None if self.training is None else self.training.dp,
            evaluation=self.evaluations[0].dp if self.evaluations else None,
        )

    def difference(self, task: Task) -> str:
        """Where a task differs from this plan, such as "dp.noise_multiplier"; empty if it is one of its requests."""
        if not re.fullmatch(rf"{re.escape(self.name)}(-\d+)?", task.run):
            return "name"
        parts: Sequence[RoundConfig | EvaluationRequest] = self.evaluations
        if isinstance(task, TrainTask) or (isinstance(task, ExchangeTask) and task.sum_of == "updates"):
            parts = [] if self.training is None else [self.training]
        differences = [self._difference(task, part) for part in parts]
        if "" in differences:
            return ""
        return differences[0] if differences else task.sum_of if isinstance(task, ExchangeTask) else task.kind

    def _difference(self, task: Task, part: RoundConfig | EvaluationRequest) -> str:
        requested: dict[str, object]
        expected: dict[str, object]
        if isinstance(task, ExchangeTask):
            requested = {"aggregation": task.aggregation, "agreement": task.agreement}
            expected = {"aggregation": part.aggregation, "agreement": part.agreement}
        else:
            asked = task.request if isinstance(task, EvaluateTask) else task.config
            requested = {"": asked, "releases": task.releases}
            expected = {"": part, "releases": self.releases}
        one, other = ({key: encode(value) for key, value in each.items()} for each in (requested, expected))
        found, admitted = dict(_flat(one)), dict(_flat(other))
        return next((path for path in found | admitted if found.get(path) != admitted.get(path)), "")

    def signed(self, operator: Ed25519PrivateKey) -> SignedPlan:
        """The plan as JSON (RFC 8259) with sorted keys, and the operator's signature."""
        content = json.dumps(encode(self), sort_keys=True, separators=(",", ":")).encode()
        return SignedPlan(plan=self, content=content, signature=operator.sign(content))


@dataclass(frozen=True, kw_only=True)
class SignedPlan:
    """A run plan whose signature was verified, or just made."""

    plan: RunPlan
    content: bytes  # what is signed
    signature: bytes

    @property
    def hash(self) -> str:
        """SHA-256 of the signed bytes, 64 hexadecimal digits: what an invitation names."""
        return hashlib.sha256(self.content).hexdigest()

    def to_bytes(self) -> bytes:
        """The file: the signature in hexadecimal digits on the first line, then the signed bytes."""
        return self.signature.hex().encode() + b"\n" + self.content

    @classmethod
    def from_bytes(cls, file: bytes, operator: bytes) -> SignedPlan:
        """Inverse of `to_bytes`.

        Args:
            file: Untrusted.
            operator: The public key that must have signed it, 32 bytes.

        Raises:
            ConfigError: It is not a plan, or somebody else signed it.
        """
        digits, _, content = file.partition(b"\n")
        try:
            if len(file) > MAX_BYTES:
                raise ValueError(f"{len(file)} bytes")
            signature = bytes.fromhex(digits.decode())
            Ed25519PublicKey.from_public_bytes(operator).verify(signature, content)
            plan = loads(RunPlan, content.decode())
        except InvalidSignature as error:
            raise ConfigError(
                "this run plan is not signed by the operator of this device's server"
            ) from error
        except (CodecError, ValueError) as error:
            raise ConfigError(
                f"expected a run plan of this version, signed by its operator ({error})"
            ) from error
        return cls(plan=plan, content=content, signature=signature)


@dataclass(frozen=True, kw_only=True)
class AdmittedPlans:
    """The plans that an owner has admitted: files HASH.plan in a folder, each signed by the operator."""

    folder: Path
    operator: bytes  # Ed25519 public key, 32 bytes

    def path(self, plan_hash: str) -> Path:
        """Where a plan is stored."""
        return self.folder / f"{plan_hash}.plan"

    def read(self) -> dict[str, RunPlan]:
        """The plans by hash.

        Raises:
            ConfigError: One of them is damaged, or not signed by the operator.
        """
        plans = {}
        for path in sorted(self.folder.glob("*.plan")):
            try:
                signed = SignedPlan.from_bytes(path.read_bytes(), self.operator)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
            if signed.hash != path.stem:
                raise ConfigError(f"{path}: has the hash {signed.hash}; its owner has not admitted it")
            plans[signed.hash] = signed.plan
        return plans

    def check(self, task: Task) -> None:
        """Return if a task is a request of an admitted plan.

        Raises:
            PolicyRefusal: It is of none.
            ConfigError: A plan is damaged.
        """
        differences = [(plan.name, plan.difference(task)) for plan in self.read().values()]
        if all(path for _, path in differences):
            where = "".join(f"; it differs from {name} in {path}" for name, path in differences)
            raise PolicyRefusal(
                f"this request is of no run plan that the owner of this device has admitted{where}",
                advice="Send the owner the plan's hash.",
            )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of plain data with its path, such as "dp.schedule.rounds"."""
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            yield from _flat(inner, f"{path}.{key}".strip("."))
    else:
        yield path, value
