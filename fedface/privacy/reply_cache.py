"""What became of booked releases: how often each was begun, and the bytes that answered it.

Called from privacy/ledger.py alone, within its transactions; both tables lie in the ledger's file beside its chain.
A computation that was killed may have been killed by what the photos are (a picture that fills the memory), and
whoever asks sees that no answer came. Power goes too, so `FREE_ATTEMPTS` computations are begun on one booking; one
that is asked for after these is another look at the photos, and is booked as one.
"""

from __future__ import annotations

from fedface.errors import LedgerError
from fedface.privacy.hash_chain import Transaction

CACHED_REPLIES = 16  # of the latest runs; bytes of older ones are dropped
FREE_ATTEMPTS = 3  # computations that may be begun on one booking before one is answered

_BEGUN = (
    "CREATE TABLE IF NOT EXISTS begun (number INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, "
    "round INTEGER NOT NULL, attempt INTEGER NOT NULL, times INTEGER NOT NULL, UNIQUE (run, round, attempt, times))",
    "CREATE TRIGGER IF NOT EXISTS begun_stay BEFORE UPDATE ON begun BEGIN SELECT RAISE(ABORT, 'append only'); END",
    "CREATE TRIGGER IF NOT EXISTS begun_remain BEFORE DELETE ON begun BEGIN SELECT RAISE(ABORT, 'append only'); END",
)

TABLES = (
    "CREATE TABLE replies (run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, body BLOB, "
    "PRIMARY KEY (run, round))",
    *_BEGUN,
)

_SEQUENCE = (
    "SELECT seq FROM sqlite_sequence WHERE name = 'begun'"  # also where an older file has no such table
)

# Put back to between a booking and its answer, or to before it was begun, a file holds the whole chain and would
# compute once more.
GROWS = f"SELECT coalesce((SELECT sum(attempt) FROM replies), 0) + coalesce(({_SEQUENCE}), 0)"


def check_attempts(page: Transaction, booked: set[tuple[str, int, int]]) -> None:
    """Check that everything begun was booked, as (run, round, attempt), and that nothing was taken away.

    Raises:
        LedgerError: The table was altered.
    """
    counted: dict[tuple[str, int, int], int] = {}
    rows = _rows(page)
    for run, round, attempt, times in rows:
        which = (run, round, attempt)
        counted[which] = counted.get(which, 0) + 1
        if which not in booked or times != counted[which]:
            raise LedgerError(
                f"the ledger was altered: computation {times} of round {round} of {run} (attempt {attempt}) "
                "does not add up; restore it from a backup"
            )
    last = page.sql.execute(_SEQUENCE).fetchone()
    if (last[0] if last else 0) != len(rows):
        raise LedgerError(f"the ledger has lost computations; {len(rows)} remain. Restore it from a backup")


def attempt_count(page: Transaction, run: str, round: int, attempt: int) -> int:
    """How many computations were begun on one booking."""
    return sum(row[:3] == (run, round, attempt) for row in _rows(page))


def record_attempt(page: Transaction, run: str, round: int, attempt: int) -> None:
    """Write down that a computation begins, on a booking that is there.

    Raises:
        LedgerError: This booking has its answer, or its computations are used up.
    """
    if answered_attempt(page, run, round) >= attempt:
        raise LedgerError(f"round {round} of {run} was answered already; send the kept reply")
    times = attempt_count(page, run, round, attempt) + 1
    if times > FREE_ATTEMPTS:
        raise LedgerError(
            f"round {round} of {run} was begun {FREE_ATTEMPTS} times and never answered; "
            "ask once more, and it is booked anew"
        )
    for statement in _BEGUN:  # a file from before has no such table
        page.sql.execute(statement)
    page.sql.execute(
        "INSERT INTO begun (run, round, attempt, times) VALUES (?, ?, ?, ?)", (run, round, attempt, times)
    )


def _rows(page: Transaction) -> list[tuple[str, int, int, int]]:
    """Run, round, attempt and times of every computation, oldest first; none in a file from before."""
    if page.sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'begun'").fetchone() is None:
        return []
    return page.sql.execute("SELECT run, round, attempt, times FROM begun ORDER BY number").fetchall()


def answered_attempt(page: Transaction, run: str, round: int) -> int:
    """The latest attempt that was answered, whether or not its bytes are kept; 0 if none was."""
    sql = "SELECT attempt FROM replies WHERE run = ? AND round = ?"
    row = page.sql.execute(sql, (run, round)).fetchone()
    return 0 if row is None else int(row[0])


def answered_attempts(page: Transaction) -> dict[tuple[str, int], int]:
    """The latest attempt that was answered, of each run and round that was."""
    rows = page.sql.execute("SELECT run, round, attempt FROM replies")
    return {(run, round): attempt for run, round, attempt in rows}


def load_reply(page: Transaction, run: str, round: int) -> tuple[int, bytes] | None:
    """The attempt that answered a round, and its bytes; None if it was never answered or they were dropped."""
    row = page.sql.execute(
        "SELECT attempt, body FROM replies WHERE run = ? AND round = ? AND body IS NOT NULL", (run, round)
    ).fetchone()
    return None if row is None else (int(row[0]), bytes(row[1]))


def store_reply(page: Transaction, run: str, round: int, attempt: int, body: bytes) -> None:
    """Keep the bytes that answer a booking, once; the run's reply before is dropped.

    Raises:
        LedgerError: This booking, or a later one of its round, has a different answer already.
    """
    if answered_attempt(page, run, round) >= attempt:
        kept = load_reply(page, run, round)
        if kept is None or kept[1] != body:
            raise LedgerError(f"round {round} of {run} was answered already; send the kept reply")
        return
    # That a round was answered is remembered for good; its bytes only until the next answer.
    page.sql.execute("UPDATE replies SET body = NULL WHERE run = ?", (run,))
    page.sql.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (run, round, attempt, body))
    # Whoever names a new run each time must not fill the disk. A round whose bytes went is booked anew if asked again.
    page.sql.execute(
        "UPDATE replies SET body = NULL WHERE body IS NOT NULL AND rowid NOT IN "
        "(SELECT rowid FROM replies WHERE body IS NOT NULL ORDER BY rowid DESC LIMIT ?)",
        (CACHED_REPLIES,),
    )


def delete_replies(page: Transaction, run: str | None) -> int:
    """Drop the kept bytes of one run, or of all; how many there were."""
    which, values = ("", ()) if run is None else (" AND run = ?", (run,))
    return page.sql.execute(f"UPDATE replies SET body = NULL WHERE body IS NOT NULL{which}", values).rowcount
