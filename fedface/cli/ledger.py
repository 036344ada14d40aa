"""The work of `fedface device keygen` and `fedface ledger ...`; fedface/cli/device.py declares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from fedface import number_format
from fedface.atomic_io import create_bytes
from fedface.cli.console import print_json, progress_bars, say, table_of
from fedface.cli.device_log import open_device, warn_if_accessible
from fedface.device.config import is_accessible_to_others, read_device_file
from fedface.device.state import LedgerFiles, export
from fedface.errors import ConfigError
from fedface.measurements import Epsilon
from fedface.number_format import format_delta
from fedface.privacy.hash_chain import utc_now
from fedface.privacy.ledger_records import LedgerEntry
from fedface.privacy.policy import EVALUATION
from fedface.privacy.spending import MOMENTS, price_of, totals
from fedface.privacy_units import UNITS, Unit

DEFAULT_DELTA = 1e-5  # of a ledger without a policy: an entry records its unit, but no delta


def device_keygen(out: Path, device: Path | None, experiment: Path | None) -> None:
    from fedface.aggregation.protocols import make_keys
    from fedface.device.config import KEY_FILE
    from fedface.device.device import admitted_plans
    from fedface.experiment import Experiment, read_experiment
    from fedface.messages.messages import EvaluationRequest, RoundConfig

    asked: list[RoundConfig | EvaluationRequest | Experiment] = []
    if device is not None:
        plans = admitted_plans(read_device_file(device))
        asked += [] if plans is None else [part for plan in plans.read().values() for part in plan.parts]
    if experiment is not None:
        asked.append(read_experiment(experiment))
    if not asked:
        raise ConfigError("name a device file with admitted run plans, with --device, or an --experiment")
    keys = next(filter(None, (make_keys(each.aggregation, each.agreement) for each in asked)), None)
    if keys is None:
        raise ConfigError(f"{experiment or device}: sums are not encrypted, so there is no key to share")
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not keys.public:
        keys.save(out)
        say(f"wrote {out} (key {keys.name}); copy it to each device, not to the server")
        return
    others = out.with_name(out.name + ".public")
    keys.for_others().save(others)
    keys.save(out)
    say(f"wrote {out} (key {keys.name}), which decrypts: for this device alone")
    say(f"wrote {others}: copy it to each other device as its {KEY_FILE}")


@dataclass(frozen=True, kw_only=True)
class _PricedLedger:
    ledger: LedgerFiles
    delta: float
    unit: Unit | None  # None: the unit of the entries

    def unit_of(self, entries: Sequence[LedgerEntry]) -> Unit:
        """The unit whose privacy cost is shown.

        Raises:
            ConfigError: No unit was given, and the entries have several.
        """
        if self.unit is not None:
            return self.unit
        units = [unit for unit in UNITS if any(entry.unit == unit for entry in entries)]
        if len(units) > 1:
            raise ConfigError(
                f"{self.ledger.path}: its entries have several privacy units ({', '.join(units)}); choose one, "
                f"such as: fedface ledger show {self.ledger.path} --unit {units[0]}"
            )
        return units[0] if units else "photo"


def _priced_ledger(path: Path, delta: float | None = None, unit: str | None = None) -> _PricedLedger:
    """The ledger of a device's file, or of a path."""
    named = next((known for known in UNITS if known == unit), None)
    if unit is not None and named is None:
        raise ConfigError(f"--unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if path.suffix in (".yaml", ".yml"):
        state = open_device(path)
        policy = state.config.policy
        return _PricedLedger(
            ledger=state.ledger,
            delta=policy.delta if delta is None else delta,
            unit=named or policy.unit,
        )
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; expected a device file or a ledger.sqlite")
    if is_accessible_to_others(path) or LedgerFiles.at(path).head.exists():  # an export may lie in any folder
        warn_if_accessible(path.parent)
    return _PricedLedger(
        ledger=LedgerFiles.at(path),
        delta=DEFAULT_DELTA if delta is None else delta,
        unit=named,
    )


def ledger_show(path: Path, delta: float | None, unit: str | None, all_totals: bool, json_out: bool) -> None:
    chosen = _priced_ledger(path, delta, unit)
    snapshot = chosen.ledger.verify()
    entries = snapshot.entries
    shown_unit = chosen.unit_of(entries)
    with progress_bars() as bars:
        bars.stage("pricing", len(entries))
        most = None if all_totals else MOMENTS
        so_far = totals(snapshot.records, delta=chosen.delta, unit=shown_unit, most=most)
        alone = {entry.number: price_of([entry], delta=chosen.delta, unit=shown_unit) for entry in entries}
        spent = price_of(snapshot.charges, delta=chosen.delta, unit=shown_unit)
    if json_out:
        rows = [
            {
                **asdict(entry),
                "what": _released(entry),
                "alone": alone[entry.number].to_record(),
                "total": so_far[entry.number].to_record() if entry.number in so_far else None,
            }
            for entry in entries
        ]
        record = {"entries": rows, "delta": chosen.delta, "unit": shown_unit, "spent": spent.to_record()}
        print_json(record)
        return
    say(
        f"every epsilon at delta {format_delta(chosen.delta)}, per {shown_unit}, its bounds in brackets; per: the unit "
        "of the run; noise: the multiplier"
    )
    say(_table(entries, alone, so_far))
    if len(so_far) < len(entries):
        say(f"totals of {len(so_far)} of {len(entries)} entries; --all-totals prices them all")
    own = "a run's own guarantee may have another delta or unit"
    if chosen.unit is None:
        own += f"; for another price: fedface ledger show {path} --delta 1e-6"
        own += "" if shown_unit == "photo" else " --unit photo"
    say(f"spent: {spent} ({own})")


def _table(entries: list[LedgerEntry], alone: dict[int, Epsilon], so_far: dict[int, Epsilon]) -> Table:
    headings = ("no.", "written (UTC)", "run", "round", "what", "per", "noise", "this alone", "all so far")
    rows = [
        (
            entry.number,
            entry.written[:16].replace("T", " "),
            entry.run,
            f"{entry.round} (attempt {entry.attempt})" if entry.attempt > 1 else entry.round,
            _released(entry),
            entry.unit,
            _noise(entry.metadata.get("noise_multiplier")),
            _bounds(alone[entry.number]),
            _bounds(so_far[entry.number]) if entry.number in so_far else "",
        )
        for entry in entries
    ]
    return table_of(headings, rows)


def _noise(recorded: str | None) -> str:
    return "not recorded" if recorded is None else f"{float(recorded):.4g}"


def _bounds(price: Epsilon) -> str:
    low, estimate, high = (
        number_format.format_epsilon(value) for value in (price.lower, price.estimate, price.upper)
    )
    return estimate if low == high else f"{estimate} ({low} to {high})"


def _released(entry: LedgerEntry) -> str:
    """What an entry released: metrics, or an update, with its objective."""
    objective = entry.metadata.get("objective")
    if objective is None:
        return "not recorded"
    return "metrics" if objective == EVALUATION else f"update ({objective})"


def ledger_verify(path: Path, json_out: bool) -> None:
    files = _priced_ledger(path).ledger
    snapshot = files.verify()
    witness = files.witness_file if files.witnessed else None
    if json_out:
        found = {
            "path": str(files.path),
            "ok": True,
            "records": len(snapshot.records),
            "entries": len(snapshot.entries),
            "transmissions": len(snapshot.transmissions),
            "head": snapshot.head,
            "witness": None if witness is None else str(witness),
        }
        print_json(found)
        return
    counts = (
        f"{number_format.counted(len(snapshot.records), 'record')}, "
        f"{number_format.counted(len(snapshot.entries), 'release')} recorded, "
        f"{number_format.counted(len(snapshot.transmissions), 'transmission')}"
    )
    seen = f"the witness {witness} agrees" if witness else "it has no witness"
    say(f"ledger {files.path}: ok, {counts}, head {snapshot.head}; {seen}")


def ledger_export(path: Path, out: Path | None, delta: float | None, unit: str | None) -> None:
    chosen = _priced_ledger(path, delta, unit)
    snapshot = chosen.ledger.verify()
    text = export(snapshot, delta=chosen.delta, unit=chosen.unit_of(snapshot.entries), now=utc_now())
    if out is None:
        print(text, end="")
        return
    create_bytes(out, text.encode())
    say(f"wrote {out}")
