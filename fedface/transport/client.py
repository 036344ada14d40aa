"""The device's side of Flower: a ClientApp that answers tasks.

The same ClientApp runs in one process (simulation/in_process.py), in Ray's actors, and on a SuperNode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from flwr.app import Context, Error
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedface.device.client import handle_task
from fedface.device.device import Device
from fedface.errors import FederationError, FedfaceError, WeightsError
from fedface.messages.messages import to_message
from fedface.messages.parsing import read_task
from fedface.transport.wire import DEVICE_ERROR, MAX_REASON, from_record, to_record

log = logging.getLogger("fedface.device")


def client_app(device_for: Callable[[Context], Device]) -> ClientApp:
    """A ClientApp for one or several devices; `device_for` returns the device that a message is for."""
    app = ClientApp()

    @app.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    @app.evaluate()
    def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    @app.query("exchange")
    def exchange(message: FlowerMessage, context: Context) -> FlowerMessage:
        return _answer(message, context, device_for)

    return app


def _answer(
    message: FlowerMessage, context: Context, device_for: Callable[[Context], Device]
) -> FlowerMessage:
    try:
        task = read_task(from_record(message.content))
        reply = handle_task(task, device_for(context))
        return FlowerMessage(to_record(to_message(reply)), reply_to=message)
    except (FederationError, WeightsError) as error:
        log.warning("%s", error)
        return FlowerMessage(Error(DEVICE_ERROR, str(error)[:MAX_REASON]), reply_to=message)
    except Exception as error:
        # Every error is caught: Flower would otherwise send its text to the server.
        if isinstance(error, FedfaceError):
            log.warning("this device could not answer: %s", error)
        else:
            log.exception("this device could not answer")
        reason = f"the device stopped with {type(error).__name__}; see its own log"
        return FlowerMessage(Error(DEVICE_ERROR, reason), reply_to=message)


@cache
def prepare_torch() -> None:
    """Let a photo's numbers show neither in time nor in rounding; call it before torch has computed anything.

    Sums of tiny numbers take no longer than others, in every thread. Private steps use one thread: where a tensor is
    divided among threads, kernels round differently (training/per_example_gradients.py).

    Raises:
        FederationError: Threads of torch had started before, which do not take it over, or this processor cannot do it.
    """
    possible = torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if not possible or bool((torch.full((1 << 22,), 1e-39) * 0.5).count_nonzero()):
        raise FederationError(
            "tiny numbers take longer than others here, which would show in the time of replies"
        )
