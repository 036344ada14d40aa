"""Quality by group, and leakage from updates."""
