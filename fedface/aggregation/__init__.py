"""Sums of updates, plain or homomorphically encrypted."""
