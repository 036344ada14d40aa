"""The Flower ClientApp: answers for the device whose file the owner named, or for a simulated one.

A SuperNode started with a device file (see clients/README.md) is that device, whatever the run config. This file
may come from a server; the code that enforces the owner's policy is the installed fedface.
"""

from pathlib import Path

from flwr.app import Context

from fedface.device.device import Device
from fedface.transport.client import client_app, configured_device

HOME = Path(__file__).resolve().parents[1]  # base of relative paths of experiments


def device_of(context: Context) -> Device:
    """The device that a message is for."""
    partition = context.node_config.get("partition-id")
    if "device" not in context.node_config and isinstance(partition, int):
        # A real device does not import what only a simulation needs.
        from fedface.simulation.devices import device_of_partition  # noqa: PLC0415

        return device_of_partition(partition, context.run_config, HOME)
    return configured_device(context.node_config)


app = client_app(device_of)
