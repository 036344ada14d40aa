"""Records of metrics from the devices' own photos, and of devices that withdrew.

Metrics are clipped and noised on the device (unit library: noised by the trusted server), recorded in its ledger, and
summed with those of other devices; intervals include the noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedface import number_format
from fedface.audits.dp_metric_estimates import DPMetricEstimates
from fedface.measurements import Epsilon, NotMeasured
from fedface.privacy.privacy_target import Noise

WITHDRAWN = "a withdrawn device"  # replaces the name of a device that withdrew


@dataclass(frozen=True, kw_only=True)
class DeviceMetricsRecord:
    """One model, evaluated by the devices on their own photos."""

    when: str  # "before", "after", or a candidate's name
    weights_hash: str
    method: str  # title of the upsampling method
    participants: tuple[str, ...]  # names of the devices in the sum; empty if they are not stored
    refusals: tuple[str, ...]  # reasons of the devices that did not take part, without names
    epsilon: Epsilon | NotMeasured  # privacy loss of this evaluation for one unit
    noise_multiplier: float
    estimates: DPMetricEstimates

    def without(self, name: str) -> DeviceMetricsRecord:
        """The same with a withdrawn device's name removed."""
        return replace(
            self, participants=tuple(WITHDRAWN if device == name else device for device in self.participants)
        )


@dataclass(frozen=True, kw_only=True)
class WithdrawalRecord:
    """A device that withdrew from the run, without its name: what was deleted, and what cannot be undone."""

    rounds: tuple[int, ...]  # that it took part in
    evaluations: int  # sets of metrics that it sent
    epsilon: Epsilon | NotMeasured  # privacy loss of all its replies for one unit
    noise: Noise  # where it was added

    def sentence(self) -> str:
        match self.epsilon:
            case Epsilon() if self.noise == "central":
                bound = (
                    "the server saw them without noise; the noise bounds what the published sums reveal: "
                    f"{self.epsilon.at_most()}"
                )
            case Epsilon():
                bound = f"the noise bounds what they reveal: {self.epsilon.at_most()}"
            case NotMeasured(not_measured=reason):
                bound = f"nothing bounds what they reveal: {reason}"
        permanent = []
        if self.rounds:
            numbers = ", ".join(str(number) for number in self.rounds)
            which = (
                f"its updates of rounds {numbers} were"
                if len(self.rounds) > 1
                else f"its update of round {numbers} was"
            )
            permanent.append(
                f"{which} summed with those of other devices, and the sums are part of the weights since then and of "
                "every copy of them"
            )
        if self.evaluations:
            sets = number_format.counted(self.evaluations, "set")
            permanent.append(f"its {sets} of metrics are part of the metrics in this report")
        return (
            "One device withdrew from the run. Its individual replies were deleted and its name was removed from the "
            f"run's files. What cannot be undone: {'; '.join(permanent)}; {bound}."
        )
