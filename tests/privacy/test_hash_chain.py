"""A hash chain detects being rolled back, with its head, its folder or its witness, and survives power cuts."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedface.errors import LedgerError
from fedface.privacy.hash_chain import GENESIS, Chain, Record


class Home:
    """A chain in a folder of its own, a witness elsewhere, and backups of either."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.witness = folder / "disk"
        self.path = self.state / "notes.db"
        self.head = self.state / "notes.db.head"

    def open(self) -> Chain:
        """As its owner opens it, with the witness."""
        return Chain.open(self.path, witness=self.witness)

    def note(self, *words: str) -> None:
        """Add a record for each word."""
        for word in words:
            with self.open().write_transaction() as page:
                page.append(word, {})

    def words(self) -> list[str]:
        """The content of the chain."""
        with self.open().read_transaction() as page:
            return [line.kind for line in page.records]

    def back_up(self, folder: Path) -> Path:
        """Copy a folder."""
        copy = self.folder / f"backup of {folder.name}"
        shutil.copytree(folder, copy)
        return copy

    def restore(self, folder: Path) -> None:
        """Replace a folder by its copy."""
        shutil.rmtree(folder)
        shutil.copytree(self.folder / f"backup of {folder.name}", folder)

    def witness_file(self) -> Path:
        """The one file in the witness folder."""
        (file,) = self.witness.iterdir()
        return file


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_records_are_numbered_and_each_digest_is_over_the_one_before(home: Home) -> None:
    home.note("a", "b", "c")
    with home.open().read_transaction() as page:
        assert [record.number for record in page.records] == [1, 2, 3]
        parents = [GENESIS, *(record.digest for record in page.records)]
        for parent, record in zip(parents, page.records, strict=False):
            assert record.digest == Record.digest_of(*record[:-1], parent)


def test_an_exception_in_the_block_writes_nothing(home: Home) -> None:
    home.note("a")
    with pytest.raises(KeyError), home.open().write_transaction() as page:
        page.append("b", {})
        raise KeyError
    assert home.words() == ["a"]


def test_a_rolled_back_folder_is_detected_by_the_witness(home: Home) -> None:
    home.note("a")
    home.back_up(home.state)
    home.note("b")
    home.restore(home.state)
    with pytest.raises(LedgerError, match="rolled back"):
        home.open()


def test_a_rolled_back_folder_is_detected_without_naming_the_witness(home: Home) -> None:
    """The head names it."""
    home.note("a")
    home.back_up(home.state)
    home.note("b")
    home.restore(home.state)
    with pytest.raises(LedgerError, match="rolled back"):
        Chain.open(home.path)


def test_a_folder_rolled_back_to_before_the_witness_is_detected_by_naming_it(home: Home) -> None:
    with Chain.open(home.path).write_transaction() as page:
        page.append("a", {})
    home.back_up(home.state)
    home.note("b")
    home.restore(home.state)
    with pytest.raises(LedgerError, match="rolled back"):
        home.open()


def test_without_a_witness_rolling_back_file_and_head_is_not_detected(home: Home) -> None:
    """A single folder cannot detect it."""
    for word in ("a", "b"):
        with Chain.open(home.path).write_transaction() as page:
            page.append(word, {})
        if word == "a":
            home.back_up(home.state)
    home.restore(home.state)
    with Chain.open(home.path).read_transaction() as page:
        assert [line.kind for line in page.records] == ["a"]


def test_rolling_back_everything_is_not_detected(home: Home) -> None:
    """The witness must be where no backup restores it together with the chain."""
    home.note("a")
    home.back_up(home.state)
    home.back_up(home.witness)
    home.note("b")
    home.restore(home.state)
    home.restore(home.witness)
    assert home.words() == ["a"]


def test_an_older_witness_is_brought_up_to_date(home: Home) -> None:
    """A crash before the witness was written, or its disk rolled back: the chain has all its records."""
    home.note("a")
    home.back_up(home.witness)
    home.note("b")
    home.restore(home.witness)
    home.open()
    assert home.witness_file().read_text() == home.head.read_text()


def test_a_missing_folder_is_not_created_anew_while_its_witness_exists(home: Home) -> None:
    home.note("a")
    shutil.rmtree(home.state)
    with pytest.raises(LedgerError, match="has gone"):
        home.open()
    assert not home.path.exists()


def test_a_folder_that_was_never_written_is_created_anew(home: Home) -> None:
    home.open()
    shutil.rmtree(home.state)
    home.note("a")
    assert home.words() == ["a"]


def test_an_emptied_file_is_detected_by_its_witness(home: Home) -> None:
    home.note("a")
    home.head.unlink()
    home.path.write_bytes(b"")
    with pytest.raises(LedgerError, match="emptied"):
        home.open()


def test_a_missing_witness_is_an_error_with_instructions(home: Home) -> None:
    home.note("a")
    chain = home.open()
    shutil.rmtree(home.witness)
    for attempt in (
        lambda: home.open(),
        lambda: Chain.open(home.path),
        lambda: chain.read_transaction().__enter__(),
    ):
        with pytest.raises(LedgerError, match="Connect its disk"):
            attempt()
    assert not home.witness.exists()


def test_a_lost_witness_is_replaced_as_the_error_explains(home: Home) -> None:
    home.note("a")
    shutil.rmtree(home.witness)
    home.head.write_text(home.head.read_text().splitlines()[0] + "\n")
    home.note("b")
    assert home.words() == ["a", "b"] and home.witness_file().read_text() == home.head.read_text()


def test_another_witness_folder_is_accepted_only_with_the_old_file(home: Home) -> None:
    home.note("a")
    with pytest.raises(LedgerError, match="Connect its disk"):
        Chain.open(home.path, witness=home.folder / "other")
    shutil.copytree(home.witness, home.folder / "other")
    Chain.open(home.path, witness=home.folder / "other")
    shutil.rmtree(home.witness)
    Chain.open(home.path)


def test_an_existing_chain_creates_a_witness_when_opened_with_one(home: Home) -> None:
    with Chain.open(home.path).write_transaction() as page:
        page.append("a", {})
    assert not home.witness.exists()
    assert home.words() == ["a"] and home.witness_file().read_text() == home.head.read_text()


def test_a_rolled_back_chain_does_not_create_a_witness(home: Home) -> None:
    """Otherwise the witness would confirm the older state."""
    for word in ("a", "b"):
        with Chain.open(home.path).write_transaction() as page:
            page.append(word, {})
        if word == "a":
            older = home.path.read_bytes()
    home.path.write_bytes(older)
    with pytest.raises(LedgerError, match="rolled back"):
        home.open()
    assert not home.witness.exists()


def test_chains_share_a_witness_folder(home: Home) -> None:
    home.note("a")
    other = Chain.open(home.folder / "other" / "notes.db", witness=home.witness)
    with other.write_transaction() as page:
        page.append("z", {})
    home.note("b")
    assert home.words() == ["a", "b"] and len(list(home.witness.iterdir())) == 2


def test_a_copy_of_the_folder_has_no_witness_of_its_own(home: Home) -> None:
    """Two copies of one ledger would spend the same budget twice."""
    home.note("a")
    copy = home.back_up(home.state)
    for witness in (home.witness, None):
        with pytest.raises(LedgerError, match="Connect its disk"):
            Chain.open(copy / "notes.db", witness=witness)


def test_a_witness_in_the_chains_own_folder_is_refused(home: Home) -> None:
    with pytest.raises(LedgerError, match="another folder"):
        Chain.open(home.path, witness=home.state / "witness")


@pytest.mark.parametrize("content", ["", "\n", "3f9a", "0" * 64, '{"witness": null}'])
def test_an_empty_truncated_or_foreign_head_is_not_trusted(home: Home, content: str) -> None:
    home.note("a")
    for place in (home.head, home.witness_file()):
        whole = place.read_text()
        place.write_text(content)
        with pytest.raises(LedgerError):
            home.open()
        place.write_text(whole)
    assert home.words() == ["a"]


def test_a_head_truncated_at_any_byte_never_accepts_an_older_file(home: Home) -> None:
    """Truncated within its first line it is damaged; later it still has the newest digest."""
    home.note("a")
    older = home.path.read_bytes()
    home.note("b")
    newest = home.path.read_bytes()
    whole = home.head.read_text()
    for cut in range(0, len(whole), 3):
        for content in (newest, older):
            home.path.write_bytes(content)
            home.head.write_text(whole[:cut])
            if content == older or cut < 64:
                with pytest.raises(LedgerError):
                    home.open()


def test_a_draft_left_by_a_crash_is_not_a_head(home: Home) -> None:
    home.note("a")
    for place in (home.head, home.witness_file()):
        place.with_name(f"{place.name}.draft").write_text("tor")
    home.note("b")
    assert home.words() == ["a", "b"]


def test_a_head_is_synced_before_it_is_renamed_and_its_folder_after(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a name without content, or the old name."""
    home.note("a")
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        sync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"name {Path(target).parent.name}")
        replace(source, target)

    chain = home.open()
    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with chain.write_transaction() as page:
        page.append("b", {})
        assert done == []
    each = [["sync file", f"name {place}", "sync folder"] for place in ("disk", "state")]
    assert done == [*each[0], *each[1]]


def test_a_record_whose_witness_cannot_be_written_is_not_confirmed(home: Home) -> None:
    """A full or unplugged disk: the record may be in the chain, but its writer gets an error."""
    home.note("a")
    draft = home.witness_file().with_name(f"{home.witness_file().name}.draft")
    draft.mkdir()
    with pytest.raises(LedgerError):
        home.note("b")
    draft.rmdir()
    assert home.words()[0] == "a"


def crash_while_writing(path: Path) -> None:
    """Die in the middle of a transaction whose pages have reached the file already."""
    sql = sqlite3.connect(path, isolation_level=None)
    sql.execute("PRAGMA journal_mode = DELETE")
    sql.execute("PRAGMA cache_size = 1")
    sql.execute("PRAGMA cache_spill = 1")
    sql.execute("BEGIN IMMEDIATE")
    for number in range(2, 400):
        sql.execute("INSERT INTO records VALUES (?, 'now', ?, 1, '{}', ?)", (number, "w" * 3000, str(number)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_transaction_interrupted_by_a_crash_is_rolled_back(home: Home) -> None:
    home.note("a")
    size = home.path.stat().st_size
    process = multiprocessing.get_context("fork").Process(target=crash_while_writing, args=(home.path,))
    process.start()
    process.join(timeout=30)
    hot = home.path.with_name("notes.db-journal")
    assert process.exitcode == -signal.SIGKILL and hot.stat().st_size > 0 and home.path.stat().st_size > size
    assert home.words() == ["a"]
    assert not hot.exists()
    home.note("b")
    assert home.words() == ["a", "b"]


def test_a_crash_without_its_rollback_journal_is_detected(home: Home) -> None:
    """What remains is half a transaction, which is not a chain."""
    home.note("a")
    process = multiprocessing.get_context("fork").Process(target=crash_while_writing, args=(home.path,))
    process.start()
    process.join(timeout=30)
    home.path.with_name("notes.db-journal").unlink()
    with pytest.raises(LedgerError):
        home.open()


def test_a_clock_set_back_does_not_date_a_record_before_the_previous_one(tmp_path: Path) -> None:
    times = [datetime(2031, 5, 1, 12, tzinfo=UTC) + timedelta(days=days) for days in (0, 3, -200, 2, 4)]
    for time in times:
        with Chain.open(tmp_path / "notes.db", now=lambda time=time: time).write_transaction() as page:
            page.append("a", {})
    with Chain.open(tmp_path / "notes.db").read_transaction() as page:
        assert [line.time.day for line in page.records] == [1, 4, 4, 4, 5]


def test_a_clock_without_a_zone_is_refused(tmp_path: Path) -> None:
    chain = Chain.open(tmp_path / "notes.db", now=lambda: datetime(2031, 5, 1))
    with pytest.raises(ValueError, match="zone"), chain.write_transaction() as page:
        page.append("a", {})


def test_a_value_of_another_type_is_a_modification(home: Home) -> None:
    home.note("a")
    sql = sqlite3.connect(home.path)
    sql.execute("DROP TRIGGER records_no_update")
    sql.execute("UPDATE records SET content = x'00ff'")
    sql.commit()
    sql.close()
    with pytest.raises(LedgerError, match="altered"):
        home.open()


def test_all_files_are_private(home: Home) -> None:
    home.note("a")
    for file in (home.path, home.head, home.witness_file()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for folder in (home.state, home.witness):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_draft_left_by_a_killed_process_keeps_the_head_private(home: Home) -> None:
    home.note("a")
    draft = home.head.with_name(f"{home.head.name}.draft")
    draft.write_text("half")
    draft.chmod(0o666)
    home.note("b")
    assert stat.S_IMODE(home.head.stat().st_mode) == 0o600 and not draft.exists()
