"""How the owner of a device withdraws from a run, or erases what the device stores, and what neither can undo.

A withdrawal is recorded before anything is deleted, and the device then refuses by itself (device/client.py); the
server learns of it when it asks next. Photos are not touched by anything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedface.device.config import INDEX_REGISTRY
from fedface.device.state import DeviceState, known_runs
from fedface.errors import ConfigError, LedgerError
from fedface.measurements import Epsilon
from fedface.messages.messages import metrics_ledger_key
from fedface.privacy.ledger_records import LedgerEntry
from fedface.privacy.spending import price_of

NOT_FOUND = "not found (was the device run as another user?)"


@dataclass(frozen=True, kw_only=True)
class WithdrawalImpact:
    """What a device has in a run: what leaving it cannot undo."""

    run: str
    withdrawn: str | None  # when its owner withdrew first, UTC; None: not yet
    rounds: tuple[int, ...]  # whose updates were booked
    evaluations: tuple[int, ...]  # whose figures were booked
    price: Epsilon  # of everything booked for it, together

    def ahead(self) -> list[str]:
        """What leaving it does, one sentence each."""
        return [
            f"From now on this device answers {self.run} with a refusal and nothing else, for good.",
            "The server is told the next time it asks; it then takes this device off the run, removes its name from "
            "the run's files, and does not ask again.",
            "Answers that were kept here for this run are dropped. Bookings stay: what was given away is not given "
            "back.",
            "A server that asks under another name begins another run, about which your policy decides.",
        ]

    def lasting(self) -> list[str]:
        """What leaving it cannot undo, one sentence each."""
        if not self.rounds and not self.evaluations:
            return ["Nothing was booked for this run, so there is nothing that could not be undone."]
        booked = [
            f"{what} of {word}{'s' if len(numbers) > 1 else ''} {', '.join(str(n) for n in numbers)}"
            for what, word, numbers in (
                ("updates", "round", self.rounds),
                ("figures", "question", self.evaluations),
            )
            if numbers
        ]
        return [
            f"Booked for this run: {' and '.join(booked)}. What of it was summed with others' is part of the network "
            "since, and of every copy of it.",
            f"What it may have told, all of it together: {self.price}.",
        ]


def withdrawal_impact(kept: DeviceState, run: str) -> WithdrawalImpact:
    """What a device has in a run.

    Raises:
        ConfigError: The ledger knows no such run.
    """
    snapshot = kept.ledger.read()
    known = known_runs(snapshot)
    if run not in known:
        told = (
            f"it knows {', '.join(known)}" if known else "it knows none: nothing was booked and nothing sent"
        )
        raise ConfigError(f"this device knows no run {run!r}; {told}")
    policy = kept.device.policy
    mine = [entry for entry in snapshot.entries if entry.run in (run, metrics_ledger_key(run))]
    return WithdrawalImpact(
        run=run,
        withdrawn=snapshot.withdrawals.get(run),
        rounds=_rounds(mine, run),
        evaluations=_rounds(mine, metrics_ledger_key(run)),
        price=price_of(mine, delta=policy.delta, unit=policy.unit),
    )


def _rounds(entries: Sequence[LedgerEntry], book: str) -> tuple[int, ...]:
    return tuple(sorted({entry.round for entry in entries if entry.run == book}))


def withdraw(kept: DeviceState, run: str, reason: str = "") -> int:
    """Withdraw from a run for good, and delete the replies that are stored for it; twice is as once.

    Returns:
        How many replies were deleted.

    Raises:
        ConfigError: The ledger knows no such run.
        LedgerError: It cannot be trusted or written.
    """
    withdrawn = withdrawal_impact(kept, run).withdrawn
    with kept.device.ledger() as ledger:
        if withdrawn is None:
            ledger.withdraw(run, reason)
        return ledger.delete_replies(run, metrics_ledger_key(run))


@dataclass(frozen=True, kw_only=True)
class Erased:
    """What was erased, and what still remembers."""

    replies: int  # that were deleted from a ledger that stays
    files: tuple[Path, ...]  # that are gone
    witness: Path | None  # the file that remembers a ledger that is gone

    def describe(self) -> list[str]:
        """One sentence each."""
        sentences = [
            f"Deleted: {', '.join(str(file) for file in self.files) or 'nothing, nothing was there'}."
        ]
        if self.replies:
            sentences.append(f"Stored replies deleted from the ledger: {self.replies}.")
        if self.witness is not None:
            sentences.append(
                "A witness still remembers, on purpose: while your device file names its folder, this device refuses "
                "to begin anew, since these photos were used. If you begin with other photos, or accept that what was "
                f"spent counts no longer, delete {self.witness} too."
            )
        return sentences


@dataclass(frozen=True, kw_only=True)
class FileToErase:
    """One file that `erase` would delete, if it is there."""

    file: Path
    what: str
    found: bool = True

    def __str__(self) -> str:
        """Which file, what it is, and whether it is there."""
        return f"{self.file}: {self.what}{'' if self.found else f' - {NOT_FOUND}'}"


def describe_erasure(kept: DeviceState, *, ledger: bool) -> list[str]:
    """What erasing means for this device, one sentence each; silent about files that are not there."""
    found = {one.file for one in files_to_erase(kept, ledger=ledger) if one.found}
    effects = (
        (True, "Your photos are not touched."),
        (
            kept.ledger.path.is_file(),
            "Stored replies go: a round that is asked once more is computed and paid for anew.",
        ),
        (
            kept.device.key_path in found,
            "The shared key goes: runs with encrypted sums need a copy of it again.",
        ),
        (
            kept.index in found,
            "The index of your photos goes (dates, places, faces cut out for training): the next scan reads them anew.",
        ),
        (
            bool(found),
            "Files are deleted, not overwritten: disks without moving parts, snapshots and backups may hold them "
            "still.",
        ),
        (
            not ledger,
            "The ledger stays: it says what was given away, and which runs you have left.",
        ),
        (
            ledger,
            "THE LEDGER GOES. What was given away stays given away; this device only forgets it, and counts from 0.",
        ),
        (
            ledger,
            "It also forgets which runs you have left, and would answer them if your policy allows it.",
        ),
        (ledger, "Treat these photos as spent: stop the device, or give it other photos."),
    )
    return [sentence for holds, sentence in effects if holds]


def files_to_erase(kept: DeviceState, *, ledger: bool) -> list[FileToErase]:
    """The files that `erase` would delete, of those that there are; with `ledger`, the ledger too.

    The index is named also where there is none: it lies in the state folder of whoever scanned the photos, which
    need not be that of whoever erases. The ledger's head comes last: until it is gone, the device refuses to begin
    anew.

    Raises:
        ConfigError: One of them is a link. Deleting it would leave the file that it points to, and that file may be
            of use to others, such as a key that several devices share.
    """
    going = [FileToErase(file=kept.device.key_path, what="the shared key")]
    for place in kept.indexes:
        where = f"in {kept.photos}" if place == kept.index else "where they lay before"
        going += [
            FileToErase(file=file, what=f"the index of the photos {where}")
            for file in _with_side_files(place)
        ]
    going.append(
        FileToErase(file=kept.device.state / INDEX_REGISTRY, what="the note of where such indexes lie")
    )
    if ledger:
        head = kept.ledger.head
        going += [FileToErase(file=file, what="the ledger") for file in _with_side_files(kept.ledger.path)]
        going += [
            FileToErase(file=file, what="the head of the ledger")
            for file in (head.with_name(f"{head.name}.draft"), head)
        ]
    for one in going:
        if one.file.is_symlink():
            raise ConfigError(
                f"{one.file} is a link to {one.file.readlink()}, so nothing was deleted: without the link that file "
                "would stay. Delete both by hand, unless others use the file, then erase once more"
            )
    there = [replace(one, found=one.file.exists()) for one in going]
    return [one for one in there if one.found or one.file == kept.index]


def _with_side_files(database: Path) -> list[Path]:
    """An SQLite file and those that SQLite may keep beside it."""
    return [database, *(database.with_name(database.name + end) for end in ("-journal", "-wal", "-shm"))]


def erase(kept: DeviceState, *, ledger: bool) -> Erased:
    """Delete what a device stores: its replies, its key, the index of its photos; with `ledger`, the ledger.

    Replies are overwritten in the ledger, also in one that is about to go. Files are deleted, not overwritten.

    Raises:
        ConfigError: One of the files is a link; then nothing was deleted.
        LedgerError: The ledger is to stay and cannot be trusted; then nothing was deleted.
    """
    files_to_erase(kept, ledger=ledger)  # a link is found before a reply is deleted
    replies = 0
    try:
        if (session := kept.ledger.open_existing()) is not None:
            with session:
                replies = session.delete_replies()
    except (LedgerError, ConfigError):
        if not ledger:  # what is about to go need not be readable
            raise
    files = [one.file for one in files_to_erase(kept, ledger=ledger) if one.found]
    for file in files:
        file.unlink()
    return Erased(
        replies=0 if ledger else replies,  # a ledger that goes takes them along
        files=tuple(files),
        witness=kept.ledger.witness_file if ledger and kept.ledger.witnessed else None,
    )
