"""Ledger and journal beside each other: each notices by itself that it was put back, and here that the other was.

Called from device/client.py before anything is answered.
"""

from __future__ import annotations

from fedface.errors import LedgerError
from fedface.privacy.ledger import Ledger
from fedface.privacy.transmission_log import TransmissionLog


def check_books(journal: TransmissionLog, ledger: Ledger) -> None:
    """Raises LedgerError if the journal knows bookings or answers that the ledger lacks: then it was put back."""
    lacking = ledger.unanswered({line.entry for line in journal.transmissions() if line.entry is not None})
    if not lacking:
        return
    booked = max(lacking) <= len(ledger.entries())
    lacks = (
        "answers that the ledger does not know to be given"
        if booked
        else "bookings that the ledger does not have"
    )
    raise LedgerError(
        f"the journal names {lacks}: the ledger was put back; restore the newest copy of both, or treat these photos "
        "as spent"
    )
