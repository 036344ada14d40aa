"""CPU time of one reply in a device's ledger, compared with the same calls that verify all records at each access.

Run: python benchmarks/device_record.py --entries 2000

Both sides make the calls of one training task (fedface.device.client.handle_task) on a ledger of that many releases,
each computed, answered and sent: withdrawn? stored reply? recorded? then record the release, the attempt, the
reply and the transmission. Computing the privacy cost is left out: it depends on the policy, not on the ledger's
length. The naive side opens a session for each call. The result is the ratio of the fastest CPU times, which other
programs disturb less than wall-clock time.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from fedface.privacy.hash_chain import Chain
from fedface.privacy.ledger import Ledger
from fedface.privacy.ledger_records import LedgerEntry, TransmissionInfo
from fedface.privacy.mechanism import GaussianSum

EVENT = GaussianSum(sigma=6.0, clip_norm=1.0).event()
METADATA = {
    "unit": "photo", "neighbours": "add or remove one", "sampler": "poisson", "noise": "local",
    "noise_multiplier": "6", "clip_norm": "1", "expected_batch_size": "8", "objective": "generator",
    "model": "0" * 64, "recipe": "1" * 64, "protocol": "homomorphic", "training": "gan-training",
}  # fmt: skip
PAYLOAD = b"x" * 40_000

Session = Callable[[], AbstractContextManager[Ledger]]


def fill(path: Path, entries: int) -> None:
    """Append the records of so many answered rounds in one transaction each kind, as `answer` would."""
    ledger = Ledger.open(path)
    with ledger._chain.write_transaction() as page:
        for number in range(entries):
            run, event = f"run-{number // 100}", '[{"count":1,"kind":"gaussian","q":1.0,"scale":6.0}]'
            if number % 100 == 0:
                whole = {
                    "run": run, "unit": "photo", "event": event.replace('"count":1', '"count":100'),
                    "counted": "per photo at delta 1e-05", "rounds": {run: 100}, "events": {run: event},
                }  # fmt: skip
                covering = page.append("run", whole).number
            content = {"run": run, "round": number % 100, "attempt": 1, "event": event, "metadata": METADATA}
            entry = page.append("release", content, entry=covering).number
            page.append("attempt", {}, entry=entry)
            page.append("reply", {"payload_digest": f"{number:064x}"}, entry=entry)
            sent = {
                "run": run, "round": number % 100, "kind": "update", "receiver": "server:9092",
                "protection": "noise multiplier 6 per photo, encrypted", "reason": "", "bytes": len(PAYLOAD),
                "payload_digest": f"{number:064x}", "resent": False,
            }  # fmt: skip
            page.append("transmission", sent, entry=entry)
    ledger.close()


def answer(session: Session, round: int) -> None:
    """The ledger's part of one training task."""
    with session() as ledger:
        ledger.has_withdrawn("new")
    with session() as ledger:
        ledger.load_reply("new", round)
    with session() as ledger:
        ledger.is_recorded("new", round)
    with session() as ledger:
        entry: LedgerEntry = ledger.record(EVENT, run="new", round=round, metadata=METADATA)
    with session() as ledger:
        ledger.record_attempt("new", round, attempt=entry.attempt)
    with session() as ledger:
        ledger.store_reply("new", round, PAYLOAD, attempt=entry.attempt)
    info = TransmissionInfo(
        run="new", round=round, kind="update", receiver="server:9092", protection="noise", entry=entry.number
    )
    with session() as ledger:
        ledger.record_transmission(PAYLOAD, info)


def in_one_session(path: Path, round: int) -> None:
    """As a device does it."""
    with Ledger.open(path) as ledger:
        answer(lambda: nullcontext(ledger), round)


def verifying_each_time(path: Path, round: int) -> None:
    """The naive baseline."""
    answer(lambda: Ledger.open(path), round)


def fastest(task: Callable[[Path, int], None], path: Path, repeats: int) -> tuple[float, float]:
    """Milliseconds of CPU time and of time that passes, of the fastest of some tasks on one ledger."""
    cpu, wall = [], []
    for round in range(repeats):
        started = time.process_time(), time.perf_counter()
        task(path, round)
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    return 1000 * min(cpu), 1000 * min(wall)


def verifying(path: Path, round: int) -> None:
    """One pass over all records."""
    Chain.open(path).close()


def main() -> None:
    """Measure both ways and print the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=2000, help="releases in the ledger, four records each")
    parser.add_argument("--repeats", type=int, default=11)
    chosen = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one" / "ledger.sqlite"
        fill(path, chosen.entries)
        shutil.copytree(path.parent, Path(folder) / "other")
        other = Path(folder) / "other" / "ledger.sqlite"
        verify = fastest(verifying, path, chosen.repeats)
        one = fastest(in_one_session, path, chosen.repeats)
        each = fastest(verifying_each_time, other, chosen.repeats)
    print(
        f"{chosen.entries} releases, {4 * chosen.entries} records; fastest of {chosen.repeats}: CPU time, time passed"
    )
    print("one pass over all records: {:.1f} ms, {:.1f} ms".format(*verify))
    print("one answer, one session: {:.1f} ms, {:.1f} ms".format(*one))
    print("one answer, verified at each access: {:.1f} ms, {:.1f} ms".format(*each))
    print(f"ratio of CPU times: {one[0] / each[0]:.3f}")


if __name__ == "__main__":
    main()
