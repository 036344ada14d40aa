"""Sums of updates: masked, masked and homomorphically encrypted, or plain."""
