"""A process that calls a reward function: ``python reward_worker.py DESCRIPTOR``, started by ``reward_processes.py``.

It imports nothing of this package and no torch, so that it is there at once; the reward function imports what it needs.
Messages go through a pipe: ``(sys.path, pickled function)`` first, then the arguments of calls. Each is answered by
``("result", what the function returned)`` or ``("error", exception)``.
"""

import asyncio
import inspect
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any


def serve(connection: Any) -> None:
    """Answer until the other end is closed.

    Args:
        connection: To the process that asks.
    """
    try:
        reward = _received_function(connection)
    except BaseException as error:
        connection.send_bytes(_packed("error", error))
        return
    connection.send_bytes(_packed("result", None))
    loop = asyncio.new_event_loop()
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = _packed("result", _called(reward, pickle.loads(message), loop))
        except BaseException as error:  # also an exit, which would say nothing
            answer = _packed("error", error)
        connection.send_bytes(answer)


def _received_function(connection: Any) -> Callable[..., Any]:
    path, function = pickle.loads(connection.recv_bytes())
    sys.path[:] = path
    reward: Callable[..., Any] = pickle.loads(function)
    return reward


def _called(reward: Callable[..., Any], arguments: dict[str, Any], loop: asyncio.AbstractEventLoop) -> Any:
    """What a function returns, as something that can be sent."""
    if "trainer_state" in arguments:
        arguments["trainer_state"] = SimpleNamespace(**arguments["trainer_state"])
        arguments |= {"log_metric": _ignore, "log_extra": _ignore}
    result = reward(**arguments)
    if inspect.isawaitable(result):
        result = loop.run_until_complete(_awaited(result))
    return list(result) if inspect.isgenerator(result) else result


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _ignore(*arguments: Any, **options: Any) -> None:
    """Take what a reward function logs in a probe."""


def _packed(kind: str, value: Any) -> bytes:
    """A message; an exception that cannot be sent, or would end the other process, becomes one of the same text."""
    try:
        if kind == "error" and not isinstance(value, Exception):
            raise TypeError
        packed = pickle.dumps((kind, value))
        pickle.loads(packed)  # some exceptions cannot be made again
        return packed
    except Exception as error:
        shown = f"{type(value).__name__}: {value}" if kind == "error" else f"its result cannot be sent: {error}"
        return pickle.dumps(("error", RuntimeError(shown)))


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules must not stand for others
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted, and ends this process
    serve(Connection(int(sys.argv[1])))
