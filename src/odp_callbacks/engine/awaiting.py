"""Waiting for asynchronous functions, also where another event loop runs already, as in a notebook."""

import asyncio
import os
import threading
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Wait for an awaitable and return its result, or raise its exception.

    All awaitables of a process run in one event loop in a thread of its own, because clients that a function keeps
    between its calls belong to the loop that they were first used in.

    Args:
        awaitable: What an ``async`` function returned.
    """

    async def result() -> Any:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(result(), _event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@lru_cache(maxsize=1)
def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process; a forked process does not inherit its parent's thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name=f"odp-awaiting-{process_id}").start()
    return loop
