"""Sums of updates: in the open or encrypted."""
