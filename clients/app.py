"""The Flower ClientApp of a bundle: answers for simulated devices (`flwr run .`) and for no other.

A real device never runs this file: it answers with its installed fedface, started by `fedface device start`.
"""

from pathlib import Path

from flwr.app import Context

from fedface.device.device import Device
from fedface.errors import FederationError
from fedface.simulation.devices import device_of_partition
from fedface.transport.client import client_app

HOME = Path(__file__).resolve().parents[1]  # base of relative paths of experiments


def device_of(context: Context) -> Device:
    """The simulated device that a message is for. Raises FederationError on a node that is not simulated."""
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int):
        raise FederationError(
            "this node runs the code that servers send, which no owner should allow; start a device with "
            "`fedface device start DEVICE.yaml`"
        )
    return device_of_partition(partition, context.run_config, HOME)


app = client_app(device_of)
