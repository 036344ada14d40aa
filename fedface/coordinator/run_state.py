"""The state of a run on disk, written atomically: a kill at any moment loses at most the round in progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fedface.atomic_io import replace_text
from fedface.codec import dumps, load
from fedface.errors import RunError
from fedface.measurements import Epsilon, Measurement, NotMeasured
from fedface.privacy.privacy_target import Noise
from fedface.reports.device_metrics_record import DeviceMetricsRecord, WithdrawalRecord
from fedface.reports.run_record import RoundRecord


def weights_path(folder: Path, round: int) -> Path:
    """The checkpoint after a round; round 0 is the base."""
    return folder / "rounds" / f"{round:03d}.safetensors"


def sums_folder(folder: Path) -> Path:
    """Where sums that are under way are stored."""
    return folder / "sums"


@dataclass(frozen=True)
class RunState:
    """The state of a run on disk."""

    version: ClassVar[int] = 2

    folder: Path
    started: str  # ISO 8601, UTC
    rounds: tuple[RoundRecord, ...]
    withdrawals: tuple[WithdrawalRecord, ...] = ()  # devices whose owners withdrew, without their names
    device_metrics: tuple[DeviceMetricsRecord, ...] = ()  # computed on the devices' own photos, by evaluation

    def save(self) -> None:
        """Atomically, and on the disk before it returns."""
        replace_text(self.folder / "state.json", dumps(self, leave_out=("folder",)))

    def with_round(self, record: RoundRecord) -> RunState:
        """With one more round, saved."""
        return self._saved(replace(self, rounds=(*self.rounds, record)))

    def with_round_metrics(self, metrics: dict[str, Measurement]) -> RunState:
        """With the metrics of the last round's model, saved."""
        *before, last = self.rounds
        return self._saved(replace(self, rounds=(*before, replace(last, metrics=metrics))))

    def with_device_metrics(self, record: DeviceMetricsRecord) -> RunState:
        """With one more evaluation by the devices, saved."""
        return self._saved(replace(self, device_metrics=(*self.device_metrics, record)))

    def without(
        self, name: str, noise: Noise, price: Callable[[int, int], Epsilon | NotMeasured]
    ) -> RunState:
        """Without the name of a device whose owner has withdrawn, and with a record of what cannot be undone; saved.

        Args:
            name: The device's name.
            noise: Where the run's noise is added.
            price: Rounds and evaluations that it took part in -> the epsilon of one unit that these cost.
        """
        rounds = tuple(record.round for record in self.rounds if name in record.participants)
        records = tuple(record.without(name) for record in self.rounds)
        evaluations = sum(name in record.participants for record in self.device_metrics)
        private = tuple(record.without(name) for record in self.device_metrics)
        withdrawals = self.withdrawals
        if rounds or evaluations:
            withdrawals = (
                *withdrawals,
                WithdrawalRecord(
                    rounds=rounds,
                    evaluations=evaluations,
                    epsilon=price(len(rounds), evaluations),
                    noise=noise,
                ),
            )
        return self._saved(replace(self, rounds=records, device_metrics=private, withdrawals=withdrawals))

    def _saved(self, state: RunState) -> RunState:
        state.save()
        return state

    @staticmethod
    def read(folder: Path) -> RunState:
        """Raises RunError if there is no run here, or its state is damaged."""
        path = folder / "state.json"
        try:
            return load(RunState, path, given={"folder": folder})
        except FileNotFoundError as error:
            raise RunError(f"{folder}: there is no run to resume here") from error
        except RunError as error:
            raise RunError(f"{error}; the state of this run is damaged, start a new run") from error
