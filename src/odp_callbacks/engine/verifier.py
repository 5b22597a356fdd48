"""The user's verifier off the critical path: it scores what has finished while the model goes on sampling.

Only where that is safe. A verifier may be of no use outside the main thread, and may not say so (one that limits its
own time by a signal returns a failure there); so it first scores some responses both ways, and it stays in the main
thread unless both agree.
"""

import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rewards import RewardError, RewardFunction, score

BATCH = 64
"""Responses that are scored in one call, if so many have finished."""


class RewardTimeoutError(RewardError):
    """The reward function took longer than it may."""


class _Interrupt(BaseException):
    """Not an Exception: a verifier that takes any of those for a wrong answer must not take this one."""


@dataclass
class _Job:
    arguments: tuple[Any, ...]
    done: threading.Event = field(default_factory=threading.Event)
    rewards: list[float] | None = None
    error: BaseException | None = None


class Verifier:
    """Scores responses in batches, in a thread of its own where that gives the same rewards.

    Args:
        reward: A TRL reward function.
        seconds: The most that one call may take; None for no limit.
    """

    def __init__(self, reward: RewardFunction, seconds: float | None = None) -> None:
        self.reward = reward
        self.seconds = seconds
        self.threaded: bool | None = None
        self._trial: tuple[_Job, list[float]] | None = None
        self._queue: SimpleQueue[_Job | None] | None = None
        self._thread: threading.Thread | None = None

    def score(
        self, questions: Sequence[Question], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score now, in this thread; see :func:`~odp_callbacks.engine.rewards.score`.

        Raises:
            RewardTimeoutError: If it takes longer than it may (in the main thread, where it can be interrupted).
        """
        with _limited(self.seconds, len(questions)):
            return score(self.reward, questions, completions, completion_ids)

    def try_thread(self, rewards: Sequence[float], *arguments: Any) -> None:
        """Score once more what has these rewards, in the other thread, to see whether both agree."""
        # Rewards that are all alike would agree with a verifier that fails every time.
        if self.threaded is None and self._trial is None and len(set(rewards)) > 1:
            self._trial = self._submit(arguments), list(rewards)

    def close(self) -> None:
        """End the thread, once it has done its work."""
        self._settle()
        thread = self._thread
        self._abandon()
        if thread is not None:
            # It must not draw from the training's random streams once the probe is over.
            thread.join(self.seconds)

    def _abandon(self) -> None:
        """Let the thread end when it has done what it has; no later call waits for it."""
        if self._queue is not None:
            self._queue.put(None)
        self._queue = self._thread = None

    def _settle(self) -> None:
        """Look how the trial went."""
        if self._trial is None:
            return
        job, expected = self._trial
        self._trial = None
        self.threaded = job.done.wait(self.seconds) and job.error is None and job.rewards == expected
        if not self.threaded:
            self._abandon()
            warnings.warn(
                "`reward` gives other rewards, or fails, outside the main thread, so it is called there, and sampling "
                "waits for it.",
                stacklevel=2,
            )

    def _submit(self, arguments: tuple[Any, ...]) -> _Job:
        job = _Job(arguments)
        if self._queue is None:
            self._queue = SimpleQueue()
            # A daemon: a verifier that never returns must not keep the program from ending.
            self._thread = threading.Thread(target=self._work, args=(self._queue,), daemon=True, name="odp-verifier")
            self._thread.start()
        self._queue.put(job)
        return job

    def _work(self, queue: "SimpleQueue[_Job | None]") -> None:
        while (job := queue.get()) is not None:
            try:
                with torch.no_grad():
                    job.rewards = score(self.reward, *job.arguments)
            except BaseException as error:
                job.error = error
            job.done.set()

    def open(self) -> "Scoring":
        """Take responses as they finish."""
        self._settle()
        return Scoring(self)


class Scoring:
    """Responses that are handed in one by one, scored in batches."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._waiting: list[tuple[int, Question, str, Sequence[int]]] = []
        self._jobs: list[tuple[list[int], _Job]] = []

    def add(self, key: int, question: Question, completion: str, completion_ids: Sequence[int]) -> None:
        """Hand in a response, under a number of its own."""
        self._waiting.append((key, question, completion, completion_ids))
        if self.verifier.threaded and len(self._waiting) >= BATCH:
            self._send()

    def _send(self) -> None:
        keys, arguments = self._take()
        self._jobs.append((keys, self.verifier._submit(arguments)))

    def _take(self) -> tuple[list[int], tuple[Any, ...]]:
        # By number: which of them finished first is of no concern to the verifier.
        keys, *arguments = (list(column) for column in zip(*sorted(self._waiting, key=_number), strict=True))
        self._waiting = []
        return keys, tuple(arguments)

    def rewards(self) -> dict[int, float]:
        """The rewards of all, by their numbers.

        Raises:
            RewardTimeoutError: If a call takes longer than it may.
            Exception: What the reward function raised.
        """
        found: dict[int, float] = {}
        if self._waiting and self.verifier.threaded:
            self._send()
        elif self._waiting:
            keys, arguments = self._take()
            for first in range(0, len(keys), BATCH):
                part = slice(first, first + BATCH)
                rewards = self.verifier.score(*(column[part] for column in arguments))
                found.update(zip(keys[part], rewards, strict=True))
        for keys, job in self._jobs:
            # Calls follow each other, so each one has its time from the end of the one before.
            if not job.done.wait(self.verifier.seconds):
                self.verifier._abandon()
                raise _too_long(self.verifier.seconds, len(keys))
            if job.error is not None:
                raise job.error
            found.update(zip(keys, job.rewards or [], strict=True))
        return found


def _number(entry: tuple[int, Question, str, Sequence[int]]) -> int:
    return entry[0]


@contextmanager
def _limited(seconds: float | None, count: int) -> Iterator[None]:
    """Interrupt what takes too long, where this thread can be interrupted and no other alarm is set."""
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    fired = False

    def interrupt(*_: object) -> None:
        nonlocal fired
        fired = True
        raise _Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Interrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if fired:  # also where a bare `except` swallowed it
        raise _too_long(seconds, count)


def _too_long(seconds: float | None, count: int) -> RewardTimeoutError:
    return RewardTimeoutError(
        f"`reward` took longer than {seconds:g} s for {count} completions; make it faster, or give it more time by "
        "`reward_seconds`."
    )
