"""What devices themselves told, and who left: figures from private photos with their noise, and withdrawals.

Part of reports/run.py's record. Each figure was clipped and noised on the device, booked in its ledger, and summed
with those of other devices before anybody saw it; intervals include that noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedface.reports.quantities import Epsilon, Figure, NotMeasured


@dataclass(frozen=True, kw_only=True)
class PrivateGroup:
    """How one tone group of the devices' own photos is served."""

    group: str
    units: Figure  # how many units (photos, occasions) were asked; noised, or why it is not told
    figures: dict[str, Figure]  # by measure


@dataclass(frozen=True, kw_only=True)
class PrivateRecord:
    """One model, scored by the devices on their own photos."""

    when: str  # "before", "after", or a candidate's name
    weights_hash: str
    method: str  # how photos were made large again, in words
    devices: int  # that answered
    refusals: tuple[str, ...]  # reasons of those that did not, without names
    epsilon: Epsilon | NotMeasured  # what this question cost one unit
    noise_multiplier: float
    overall: PrivateGroup
    groups: tuple[PrivateGroup, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LeftRecord:
    """A device whose owner left the run, without its name: what was forgotten, and what cannot be."""

    rounds: tuple[int, ...]  # that it took part in
    epsilon: Epsilon | NotMeasured  # what these rounds may have told about one unit
    sentence: str

    @staticmethod
    def of(rounds: tuple[int, ...], epsilon: Epsilon | NotMeasured) -> LeftRecord:
        """The record of a device that took part in these rounds, at least one."""
        said = ", ".join(str(number) for number in rounds)
        if isinstance(epsilon, Epsilon):
            told = (
                f"its noise bounds what they can tell: epsilon at most {epsilon.upper:.2f} at delta "
                f"{epsilon.delta:g}, per {epsilon.unit}"
            )
        else:
            told = f"nothing bounds what they can tell: {epsilon.not_measured}"
        return LeftRecord(
            rounds=rounds,
            epsilon=epsilon,
            sentence=(
                "One device left the run. It is not asked again, none of its updates was kept, and its name is gone "
                f"from this run's files. What cannot be undone: its updates of rounds {said} were summed with those "
                "of others and are part of the weights since then and of every copy of them; "
                f"{told}."
            ),
        )
