"""How the owner of a device leaves a run, or has what the device keeps erased, and what neither can undo.

Called by `fedface device withdraw` and `fedface device erase`. Leaving is written down before anything is dropped, and
the device then refuses by itself (device/client.py); that the server forgets the device is up to rounds.py.
Photos are not touched by anything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedface.device.config import INDEX_REGISTRY
from fedface.device.state import DeviceState
from fedface.errors import ConfigError, LedgerError
from fedface.measurements import Epsilon
from fedface.messages.messages import metrics_ledger_key
from fedface.privacy.ledger import Entry, Ledger
from fedface.privacy.spending import price_of
from fedface.privacy.transmission_log import Withdrawal

NOT_FOUND = "not found (was the device run as another user?)"


@dataclass(frozen=True, kw_only=True)
class WithdrawalImpact:
    """What a device has in a run: what leaving it cannot undo."""

    run: str
    transmissions: str | None  # when its owner left it first, UTC; None: not yet
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
        ConfigError: Neither ledger nor journal knows the run.
    """
    entries, lines = kept.entries(), kept.transmissions() or []
    known = kept.runs()
    if run not in known:
        told = (
            f"it knows {', '.join(known)}" if known else "it knows none: nothing was booked and nothing sent"
        )
        raise ConfigError(f"this device knows no run {run!r}; {told}")
    left = next((line.time_text for line in lines if isinstance(line, Withdrawal) and line.run == run), None)
    policy = kept.device.policy
    mine = [entry for entry in entries if entry.run in (run, metrics_ledger_key(run))]
    return WithdrawalImpact(
        run=run,
        transmissions=left,
        rounds=_rounds(mine, run),
        evaluations=_rounds(mine, metrics_ledger_key(run)),
        price=price_of(mine, delta=policy.delta, unit=policy.unit),
    )


def _rounds(entries: Sequence[Entry], book: str) -> tuple[int, ...]:
    return tuple(sorted({entry.round for entry in entries if entry.run == book}))


def withdraw(kept: DeviceState, run: str, why: str = "") -> int:
    """Leave a run for good, and drop the answers that were kept for it; twice is as once.

    Returns:
        How many kept answers were dropped.

    Raises:
        ConfigError: Neither ledger nor journal knows the run.
        LedgerError: One of them cannot be trusted or written.
    """
    if withdrawal_impact(kept, run).transmissions is None:
        kept.device.journal().withdraw(run, why)
    book = kept.ledger.open_existing(Ledger.open)
    return 0 if book is None else sum(book.delete_replies(name) for name in (run, metrics_ledger_key(run)))


@dataclass(frozen=True, kw_only=True)
class Erased:
    """What was erased, and what still remembers."""

    replies: int  # kept answers that were dropped from a ledger that stays
    files: tuple[Path, ...]  # that are gone
    witnesses: tuple[Path, ...]  # that remember a ledger or a journal that is gone

    def describe(self) -> list[str]:
        """One sentence each."""
        said = [f"Deleted: {', '.join(str(file) for file in self.files) or 'nothing, nothing was there'}."]
        if self.replies:
            said.append(f"Kept answers dropped from the ledger: {self.replies}.")
        if self.witnesses:
            said.append(
                "A witness still remembers, on purpose: while your device file names its folder, this device refuses "
                "to begin anew, since these photos were used. If you begin with other photos, or accept that what was "
                f"spent counts no longer, delete {' and '.join(str(place) for place in self.witnesses)} too."
            )
        return said


def describe_erasure(*, books: bool) -> list[str]:
    """What erasing means, one sentence each."""
    said = [
        "Your photos are not touched.",
        "Kept answers go: a round that is asked once more is computed and paid for anew.",
        "The shared key goes: runs with encrypted sums need a copy of it again.",
        "The index of your photos goes (dates, places, faces cut out for training): the next scan reads them anew.",
        "Files are deleted, not overwritten: disks without moving parts, snapshots and backups may hold them still.",
    ]
    if not books:
        return [*said, "Ledger and journal stay: they say what was given away, and which runs you have left."]
    return [
        *said,
        "LEDGER AND JOURNAL GO. What was given away stays given away; this device only forgets it, and counts from 0.",
        "It also forgets which runs you have left, and would answer them if your policy allows it.",
        "Treat these photos as spent: stop the device, or give it other photos.",
    ]


@dataclass(frozen=True, kw_only=True)
class FileToErase:
    """One file that `erase` would delete, if it is there."""

    file: Path
    what: str
    found: bool = True

    def __str__(self) -> str:
        """Which file, what it is, and whether it is there."""
        return f"{self.file}: {self.what}{'' if self.found else f' - {NOT_FOUND}'}"


def files_to_erase(kept: DeviceState, *, books: bool) -> list[FileToErase]:
    """The files that `erase` would delete, of those that there are; with `books`, ledger and journal too.

    The index is named also where there is none: it lies in the state folder of whoever scanned the photos, which
    need not be that of whoever erases. The books' heads come last: until they are gone, the device refuses to begin
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
    if books:
        both = (kept.journal, kept.ledger)
        for book in both:
            going += [
                FileToErase(file=file, what=f"the {book.form.noun}") for file in _with_side_files(book.path)
            ]
        for book in both:
            head = f"what remembers how far the {book.form.noun} had come"
            draft = book.head.with_name(f"{book.head.name}.draft")
            going += [FileToErase(file=file, what=head) for file in (draft, book.head)]
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


def erase(kept: DeviceState, *, books: bool) -> Erased:
    """Delete what a device keeps: its answers, its key, the index of its photos; with `books`, ledger and journal.

    Kept answers are overwritten in the ledger, also in one that is about to go. Files are deleted, not overwritten.

    Raises:
        ConfigError: One of the files is a link; then nothing was deleted.
        LedgerError: The ledger is to stay and cannot be trusted; then nothing was deleted.
    """
    files_to_erase(kept, books=books)  # a link is found before an answer is dropped
    replies = 0
    try:
        book = kept.ledger.open_existing(Ledger.open)
        dropped = 0 if book is None else book.delete_replies()
        replies = 0 if books else dropped  # a ledger that goes takes them along
    except (LedgerError, ConfigError):
        if not books:  # what is about to go need not be readable
            raise
    files = [one.file for one in files_to_erase(kept, books=books) if one.found]
    for file in files:
        file.unlink()
    remembering = [book.seen_by for book in (kept.ledger, kept.journal) if books and book.witnessed]
    return Erased(
        replies=replies, files=tuple(files), witnesses=tuple(place for place in remembering if place)
    )
