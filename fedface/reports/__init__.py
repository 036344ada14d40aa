"""The records of runs, and the reports written from them."""
