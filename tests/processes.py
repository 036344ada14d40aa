"""Processes that tests start and kill: each is forked from a server that has imported fedface and computed nothing."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fedface.cli", "fedface.coordinator.run", "fedface.simulation.in_process"])
