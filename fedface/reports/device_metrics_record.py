"""What devices themselves told, and who left: figures from private photos with their noise, and withdrawals.

Part of reports/run_record.py's record. Each figure was clipped and noised on the device (per library: noised by the server,
which is trusted), booked in its ledger, and summed with those of other devices; intervals include that noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedface.measurements import Epsilon, Measurement, NotMeasured
from fedface.number_format import format_delta, rounded_down, rounded_up

WITHDRAWN = "a device that left"  # in place of the name of a device whose owner left the run


@dataclass(frozen=True, kw_only=True)
class DeviceMetricsGroup:
    """How one tone group of the devices' own photos is served."""

    group: str
    units: (
        Measurement  # how many units (photos, occasions, libraries) were asked; noised, or why it is not told
    )
    figures: dict[str, Measurement]  # by measure
    at_end: tuple[str, ...] = field(default_factory=tuple)  # measures at an end of their range


@dataclass(frozen=True, kw_only=True)
class DeviceMetricsRecord:
    """One model, scored by the devices on their own photos."""

    when: str  # "before", "after", or a candidate's name
    weights_hash: str
    method: str  # how photos were made large again, in words
    devices: int  # that answered
    refusals: tuple[str, ...]  # reasons of those that did not, without names
    epsilon: Epsilon | NotMeasured  # what this question cost one unit
    noise_multiplier: float
    overall: DeviceMetricsGroup
    groups: tuple[DeviceMetricsGroup, ...]
    sentences: tuple[str, ...]
    lead: str = field(default_factory=str)  # the one sentence of a short answer
    answered: tuple[str, ...] = field(default_factory=tuple)  # names of the devices in the sum

    def without(self, name: str) -> DeviceMetricsRecord:
        """The same without a device's name: its owner has left the run."""
        return replace(
            self, answered=tuple(WITHDRAWN if device == name else device for device in self.answered)
        )


@dataclass(frozen=True, kw_only=True)
class WithdrawalRecord:
    """A device whose owner left the run, without its name: what was forgotten, and what cannot be."""

    rounds: tuple[int, ...]  # that it took part in
    epsilon: Epsilon | NotMeasured  # what its answers may have told about one unit
    sentence: str
    questions: int = field(default_factory=int)  # sets of figures that it answered

    @staticmethod
    def of(rounds: tuple[int, ...], questions: int, epsilon: Epsilon | NotMeasured) -> WithdrawalRecord:
        """The record of a device that took part in these rounds and answered so many sets of figures."""
        if isinstance(epsilon, Epsilon):
            bound = "its noise bounds what they can tell"
            if epsilon.unit == "library":  # the server adds the noise
                bound = "the server saw them bare; its noise bounds what the published ones can tell"
            told = (
                f"{bound}: epsilon at most {rounded_up(epsilon.upper)} (at least "
                f"{rounded_down(epsilon.lower)}) at delta {format_delta(epsilon.delta)}, per {epsilon.unit}"
            )
        else:
            told = f"nothing bounds what they can tell: {epsilon.not_measured}"
        done = []
        if rounds:
            numbers = ", ".join(str(number) for number in rounds)
            what = (
                f"its updates of rounds {numbers} were"
                if len(rounds) > 1
                else f"its update of round {numbers} was"
            )
            done.append(
                f"{what} summed with those of others, and the sums are part of the weights since then and of every "
                "copy of them"
            )
        if questions:
            done.append(f"its answers to {_counted_sets(questions)} are part of the figures of this report")
        return WithdrawalRecord(
            rounds=rounds,
            questions=questions,
            epsilon=epsilon,
            sentence=(
                "One device left the run. None of its answers was kept by itself, and its name is gone from this run's "
                f"files. What cannot be undone: {'; '.join(done)}; {told}."
            ),
        )


def _counted_sets(count: int) -> str:
    return "one set of figures" if count == 1 else f"{count} sets of figures"
