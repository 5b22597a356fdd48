"""Calls of the reward function in processes of their own: several at a time, and one that hangs can be ended.

They are not forked: a process that has used a GPU or threads cannot be. A script is not run again either, as the
``spawn`` of multiprocessing does, so the function must be one of a module.
"""

import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from weakref import finalize

from odp_callbacks.engine.reward_arguments import RewardError, RewardTimeoutError
from odp_callbacks.text import first_line

WORKER = Path(__file__).with_name("reward_worker.py")
START_SECONDS = 120.0
"""Seconds in which a process must have imported the reward function."""
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Each process computes in one thread."""
UNSENT = ("stateful_callbacks",)
"""Attributes of a trainer's state that stay in its process."""


class RewardProcesses:
    """Calls a reward function in processes, which are started with the first call.

    Args:
        reward: A function of a module, or an object that can be pickled.
        count: Number of processes.

    Raises:
        ValueError: If the function cannot be sent to another process.
    """

    def __init__(self, reward: Any, count: int) -> None:
        self.count = count
        self._function = _pickled(reward)
        self._workers: list[tuple[subprocess.Popen[bytes], Any]] = []
        self._lock = threading.Lock()
        finalize(self, _end, self._workers)

    def call(self, calls: Sequence[Mapping[str, Any]], timeout: float | None) -> list[Any]:
        """Make calls, one in each process at a time, and return what the function returned.

        Args:
            calls: The arguments of at most as many calls as there are processes.
            timeout: Seconds that a call may take; None for no limit.

        Raises:
            RewardTimeoutError: If a call takes longer. The processes are ended, and start anew with the next call.
            RewardError: If a process dies, or the function or its arguments cannot be sent.
            Exception: What the function raised.
        """
        if not calls:
            return []
        with self._lock:
            try:
                self._start()
                for (_, connection), arguments in zip(self._workers, calls, strict=False):
                    connection.send_bytes(_packed(arguments))
                return self._answers(len(calls), timeout)
            except BaseException:
                _end(self._workers)
                raise

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            _end(self._workers)

    def _start(self) -> None:
        """Start the processes, and wait until they have the function."""
        if self._workers:
            return
        for _ in range(self.count):
            near_end, far_end = Pipe()
            self._workers.append(
                (
                    subprocess.Popen(
                        [sys.executable, str(WORKER), str(far_end.fileno())],
                        pass_fds=[far_end.fileno()],
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **THREADS},
                    ),
                    near_end,
                )
            )
            far_end.close()
            with suppress(OSError):  # one that has ended already is noticed when it does not answer
                near_end.send_bytes(pickle.dumps((sys.path, self._function)))
        try:
            self._answers(self.count, START_SECONDS)
        except RewardTimeoutError:
            raise RewardError(
                f"`reward` was not there in another process after {START_SECONDS:g} s; see what its module does when "
                "it is imported, or leave `reward_processes` out."
            ) from None
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"`reward` cannot be imported in another process ({type(error).__name__}: {first_line(error)}); define "
                "it at the top level of a module, or leave `reward_processes` out."
            ) from error

    def _answers(self, count: int, timeout: float | None) -> list[Any]:
        """What the first so many processes answer."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        answers: dict[int, Any] = {}
        pending: dict[Any, int] = {connection: place for place, (_, connection) in enumerate(self._workers[:count])}
        while pending:
            remaining = end - time.monotonic()
            ready = wait(list(pending), None if remaining == math.inf else max(0.0, remaining))
            if not ready:
                raise RewardTimeoutError
            for connection in [connection for connection in pending if connection in ready]:
                place = pending.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    process = self._workers[place][0]
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=5.0)
                    raise RewardError(
                        f"a process of `reward_processes` ended with the code {process.returncode} in a call of "
                        "`reward`; see whether memory suffices for so many of them, or leave `reward_processes` out."
                    ) from None
                kind, value = answer
                if kind == "error":
                    raise value
                answers[place] = value
        return [answers[place] for place in range(count)]


def _pickled(reward: Any) -> bytes:
    """A reward function as bytes that another process can read."""
    try:
        if os.name != "posix":
            raise ValueError("this operating system passes no pipes on")
        if getattr(reward, "__module__", None) == "__main__":
            raise ValueError("it is defined in the script itself")
        return pickle.dumps(reward)
    except Exception as error:
        raise ValueError(
            f"`reward_processes` needs a `reward` that another process can import, but {first_line(error)}; define it "
            "at the top level of a module, or leave `reward_processes` out."
        ) from error


def _packed(arguments: Mapping[str, Any]) -> bytes:
    """The arguments of a call, without what cannot leave this process."""
    sent = {name: value for name, value in arguments.items() if name not in ("log_metric", "log_extra")}
    if "trainer_state" in sent:
        state = vars(sent["trainer_state"])
        sent["trainer_state"] = {name: value for name, value in state.items() if name not in UNSENT}
    try:
        return pickle.dumps(sent)
    except Exception as error:
        raise RewardError(
            f"the arguments of `reward` cannot be sent to another process ({first_line(error)}); keep the columns to "
            "texts, numbers and lists of them, or leave `reward_processes` out."
        ) from error


def _end(workers: list[tuple[subprocess.Popen[bytes], Any]]) -> None:
    """End processes, also those that hang."""
    for process, connection in workers:
        connection.close()
        process.kill()
    for process, _ in workers:
        process.wait()
    workers.clear()
