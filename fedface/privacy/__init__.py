"""Privacy guarantees: mechanisms, accounting, the ledger of what was spent, and the owner's policy."""
