"""The promise, the mechanism that keeps it, what it costs, where that is written down, who may say no."""
