"""Withdrawal from a run and erasure of a device's files, and what neither can undo.

A withdrawal is recorded before anything is deleted. From then on the device refuses (device/client.py), and the server
learns of it at its next request. No function here touches photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedface.device.config import INDEX_REGISTRY, SIGNING_KEY_FILE
from fedface.device.state import DeviceState, known_runs
from fedface.errors import ConfigError, LedgerError
from fedface.measurements import Epsilon
from fedface.privacy.ledger_records import LedgerEntry, metrics_ledger_key
from fedface.privacy.spending import price_of

NOT_FOUND = "not found (was the device run as another user?)"


@dataclass(frozen=True, kw_only=True)
class WithdrawalImpact:
    """A device's part in a run, which withdrawing cannot undo."""

    run: str
    withdrawn: str | None  # UTC time of the first withdrawal; None: not withdrawn
    rounds: tuple[int, ...]  # rounds with recorded updates
    evaluations: tuple[int, ...]  # evaluations with recorded metrics
    price: Epsilon  # privacy loss of all releases of the run together

    def ahead(self) -> list[str]:
        """The effects of withdrawing, one sentence each."""
        return [
            f"From now on this device sends only refusals to {self.run}. This cannot be revoked.",
            "The server is informed at its next request. It then removes this device from the run and its name from "
            "the run's files, and sends no further requests.",
            "Stored replies for this run are deleted. The recorded privacy loss remains, because it cannot be undone.",
            "A server that uses another name starts another run, which your policy judges anew.",
        ]

    def lasting(self) -> list[str]:
        """What withdrawing cannot undo, one sentence each."""
        if not self.rounds and not self.evaluations:
            return ["Nothing was recorded for this run, so there is nothing to undo."]
        recorded = [
            f"{what} of {word}{'s' if len(numbers) > 1 else ''} {', '.join(str(n) for n in numbers)}"
            for what, word, numbers in (
                ("updates", "round", self.rounds),
                ("metrics", "evaluation", self.evaluations),
            )
            if numbers
        ]
        return [
            f"Recorded for this run: {' and '.join(recorded)}. Updates that were summed with those of other "
            "devices are part of the model and of every copy of it.",
            f"Privacy loss of all of them together: {self.price}.",
        ]


def withdrawal_impact(state: DeviceState, run: str) -> WithdrawalImpact:
    """A device's part in a run.

    Raises:
        ConfigError: The ledger has no such run.
    """
    snapshot = state.ledger.read()
    known = known_runs(snapshot)
    if run not in known:
        detail = f"its ledger has {', '.join(known)}" if known else "its ledger has no runs"
        raise ConfigError(f"no run {run!r} on this device; {detail}")
    policy = state.config.policy
    mine = [entry for entry in snapshot.entries if entry.run in (run, metrics_ledger_key(run))]
    charged = [charge for charge in snapshot.charges if charge.is_of(run)]
    return WithdrawalImpact(
        run=run,
        withdrawn=snapshot.withdrawals.get(run),
        rounds=_rounds(mine, run),
        evaluations=_rounds(mine, metrics_ledger_key(run)),
        price=price_of(charged, delta=policy.delta, unit=policy.unit),
    )


def _rounds(entries: Sequence[LedgerEntry], key: str) -> tuple[int, ...]:
    return tuple(sorted({entry.round for entry in entries if entry.run == key}))


def withdraw(state: DeviceState, run: str, reason: str = "") -> int:
    """Withdraw from a run permanently, and delete its stored replies; repeating it has no further effect.

    Returns:
        The number of deleted replies.

    Raises:
        ConfigError: The ledger has no such run.
        LedgerError: It cannot be trusted or written.
    """
    withdrawn = withdrawal_impact(state, run).withdrawn
    with state.ledger.open() as ledger:
        if withdrawn is None:
            ledger.withdraw(run, reason)
        return ledger.delete_replies(run, metrics_ledger_key(run))


@dataclass(frozen=True, kw_only=True)
class Erased:
    """The deleted files, and the witness that remains."""

    replies: int  # deleted from a ledger that remains
    files: tuple[Path, ...]  # deleted files
    witness: Path | None  # the witness file of a deleted ledger

    def describe(self) -> list[str]:
        """One sentence each."""
        sentences = [
            f"Deleted: {', '.join(str(file) for file in self.files) or 'nothing, there were no files'}."
        ]
        if self.replies:
            sentences.append(f"Stored replies deleted from the ledger: {self.replies}.")
        if self.witness is not None:
            sentences.append(
                f"The witness {self.witness} was not deleted. While your device file names its folder, this device "
                "refuses to start with an empty ledger, because these photos were used. If you use other photos, or "
                "accept that earlier privacy losses are not counted any more, delete it too."
            )
        return sentences


@dataclass(frozen=True, kw_only=True)
class FileToErase:
    """A file that `erase` would delete if it exists."""

    file: Path
    what: str
    found: bool = True

    def __str__(self) -> str:
        """The path, its content, and whether it exists."""
        return f"{self.file}: {self.what}{'' if self.found else f' - {NOT_FOUND}'}"


def describe_erasure(state: DeviceState, *, ledger: bool) -> list[str]:
    """The consequences of erasing, one sentence each, for the files that exist."""
    found = {one.file for one in files_to_erase(state, ledger=ledger) if one.found}
    effects = (
        (True, "Your photos are not touched."),
        (
            state.ledger.path.is_file(),
            "Stored replies are deleted: a round that is requested again is computed again, at a new privacy cost.",
        ),
        (
            state.key_path in found,
            "The key of homomorphic sums is deleted: such runs need a new copy of it.",
        ),
        (
            state.index in found,
            "The photo index (dates, places, face crops) is deleted: the next scan reads all photos again.",
        ),
        (bool(found), "Files are deleted, not overwritten: SSDs, snapshots and backups may still hold them."),
        (not ledger, "The ledger remains: privacy losses so far, and the runs that you withdrew from."),
        (
            ledger,
            "THE LEDGER IS DELETED. This restores no privacy: the device only forgets its losses and counts from 0.",
        ),
        (
            ledger,
            "It also forgets which runs you withdrew from, and would take part in them if your policy allows it.",
        ),
        (ledger, "Treat these photos as spent: stop the device, or give it other photos."),
    )
    return [sentence for holds, sentence in effects if holds]


def files_to_erase(state: DeviceState, *, ledger: bool) -> list[FileToErase]:
    """The existing files that `erase` would delete; with `ledger`, including the ledger.

    The index is listed even if it does not exist, because it is in the state folder of the user who scanned the photos,
    who may be another user. The ledger's head is last: until it is deleted, the device refuses to start anew.

    Raises:
        ConfigError: One of them is a symbolic link. Deleting it would leave its target, which may be shared, such as a
            key of several devices.
    """
    going = [
        FileToErase(file=state.key_path, what="the key of homomorphic sums"),
        FileToErase(file=state.config.state / SIGNING_KEY_FILE, what="the signing key"),
    ]
    for place in state.indexes:
        where = f"in {state.config.photos}" if place == state.index else "in an earlier folder"
        going += [
            FileToErase(file=file, what=f"the index of the photos {where}")
            for file in _with_side_files(place)
        ]
    going.append(FileToErase(file=state.config.state / INDEX_REGISTRY, what="the list of such indexes"))
    if ledger:
        head = state.ledger.head
        going += [FileToErase(file=file, what="the ledger") for file in _with_side_files(state.ledger.path)]
        going += [
            FileToErase(file=file, what="the head of the ledger")
            for file in (head.with_name(f"{head.name}.draft"), head)
        ]
    for one in going:
        if one.file.is_symlink():
            raise ConfigError(
                f"{one.file} is a link to {one.file.readlink()}, so nothing was deleted: deleting the link would leave "
                "that file. Delete both by hand, unless others use the file, then erase again"
            )
    there = [replace(one, found=one.file.exists()) for one in going]
    return [one for one in there if one.found or one.file == state.index]


def _with_side_files(database: Path) -> list[Path]:
    """An SQLite database and its journal files."""
    return [database, *(database.with_name(database.name + end) for end in ("-journal", "-wal", "-shm"))]


def erase(state: DeviceState, *, ledger: bool) -> Erased:
    """Delete a device's stored replies, keys and photo index; with `ledger`, the ledger too.

    Replies are overwritten in the ledger even if it is then deleted. Files are deleted, not overwritten.

    Raises:
        ConfigError: One of the files is a symbolic link; nothing was deleted.
        LedgerError: The ledger remains and cannot be trusted; nothing was deleted.
    """
    files_to_erase(state, ledger=ledger)  # detect links before a reply is deleted
    replies = 0
    try:
        if (session := state.ledger.open_existing()) is not None:
            with session:
                replies = session.delete_replies()
    except (LedgerError, ConfigError):
        if not ledger:  # a ledger to be deleted need not be readable
            raise
    files = [one.file for one in files_to_erase(state, ledger=ledger) if one.found]
    for file in files:
        file.unlink()
    return Erased(
        replies=0 if ledger else replies,  # they are deleted with the ledger
        files=tuple(files),
        witness=state.ledger.witness_file if ledger and state.ledger.witnessed else None,
    )
