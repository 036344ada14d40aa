"""The Flower ClientApp: asks which device it stands for and lets the installed fedface answer.

Called by Flower: in a simulation, or on a SuperNode started with a device file (see clients/README.md). There
is no more to it on purpose. This file may come from a server; what enforces the owner's policy may not.
"""

from functools import partial
from pathlib import Path

from fedface.transport.flower import client_app, device_of

app = client_app(partial(device_of, home=Path(__file__).resolve().parents[1]))
