"""fedface: improve face generators and upsamplers with photos that never leave their devices."""

import os

# Read by Flower and Ray when they are imported: no telemetry, no check for updates.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__version__ = "0.1.0"
