"""Scoring finished responses in another thread, or in processes, while the model goes on sampling.

Some verifiers fail outside the main thread without raising an error: one that limits its own time by a signal counts
every response there as wrong. The verifier therefore first scores some responses in both threads, and stays in the main
thread unless the rewards agree.
"""

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.reward_arguments import RewardTimeoutError
from odp_callbacks.engine.reward_processes import RewardProcesses
from odp_callbacks.engine.rewards import RewardFunction, RewardHost, call_arguments, checked_rewards, score
from odp_callbacks.engine.user_defaults import user_dtype_is_set

BATCH_SIZE = 64
"""Maximum number of responses that are scored in one call."""
Submission = tuple[int, Question, str, Sequence[int]]
"""A response to score: its number, question, text and token ids."""


class _Interrupt(BaseException):
    """Raised inside a call that takes too long.

    It is not an ``Exception``: a verifier that catches every exception and returns a wrong answer must not catch it.
    """


@dataclass
class _Job:
    """One call of the reward function in the other thread."""

    arguments: tuple[Any, ...]
    context: Context = field(default_factory=copy_context)
    done: threading.Event = field(default_factory=threading.Event)
    rewards: list[float] | None = None
    error: BaseException | None = None


class Verifier:
    """Scores responses in batches, in another thread where that gives the same rewards.

    Args:
        reward: A TRL reward function. One with an attribute ``main_thread_only`` that is true is called in this thread.
        timeout: Maximum number of seconds that one call may take; None for no limit.
        processes: Number of processes that call the function at a time; 0 calls it in this one.

    Attributes:
        host: What a trainer passes to reward functions; a callback sets it before each probe.
        threaded: Whether the other thread gives the same rewards; None until that is known.
    """

    def __init__(self, reward: RewardFunction, timeout: float | None = None, *, processes: int = 0) -> None:
        self.reward = reward
        self.timeout = timeout
        self.host = RewardHost()
        self._processes = RewardProcesses(reward, processes) if processes else None
        self.threaded: bool | None = False if getattr(reward, "main_thread_only", False) else None
        if self._processes is not None:
            self.threaded = True  # it waits there for the processes, each of which calls in its main thread
        self._trial: tuple[_Job, list[float]] | None = None  # with the rewards that are expected
        self._queue: SimpleQueue[_Job | None] | None = None
        self._thread: threading.Thread | None = None

    def score(
        self, questions: Sequence[Question], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score in this thread; see :func:`~odp_callbacks.engine.rewards.score`.

        Args:
            questions: The question of each completion.
            completions: Texts, without special tokens.
            completion_ids: The completions as token ids.

        Raises:
            RewardTimeoutError: If the call exceeds the timeout. Only a call in the main thread can be interrupted.
        """
        if self._processes is not None:
            return self._score_in_processes(self._processes, questions, completions, completion_ids)
        with _interrupt_after(self.timeout, len(questions)):
            return score(self.reward, questions, completions, completion_ids, self.host)

    def _score_in_processes(self, processes: RewardProcesses, *columns: Sequence[Any]) -> list[float]:
        """Score in several calls, as many as there are processes; the columns are the arguments of :meth:`score`."""
        count = len(columns[0])
        size = max(1, math.ceil(count / processes.count))
        parts = [[column[first : first + size] for column in columns] for first in range(0, count, size)]
        calls = [call_arguments(self.reward, part[0], part[1], part[2], self.host) for part in parts]
        try:
            results = processes.call(calls, self.timeout)
        except RewardTimeoutError:
            raise _timeout_error(self.timeout, size) from None
        scored = [checked_rewards(result, len(part[0])) for part, result in zip(parts, results, strict=True)]
        return [reward for rewards in scored for reward in rewards]

    def try_thread(self, rewards: Sequence[float], *arguments: Any) -> None:
        """Score responses again in the other thread, to find out whether it gives the same rewards.

        Args:
            rewards: The rewards from the main thread.
            *arguments: The arguments of :meth:`score` that gave them.
        """
        # If all rewards are alike, a verifier that fails every time would agree with them too.
        different = {reward for reward in rewards if not math.isnan(reward)}
        if self.threaded is None and self._trial is None and len(different) > 1 and user_dtype_is_set():
            self._trial = self._submit(arguments), list(rewards)

    def close(self) -> None:
        """Wait until the thread has done its work, and end it."""
        self._finish_trial()
        thread = self._thread
        self._release_thread()
        if thread is not None:
            # The thread must not draw from the training's random streams after the probe.
            thread.join(self.timeout)
        if self._processes is not None:
            self._processes.close()

    def _release_thread(self) -> None:
        """Let the thread end after its current work; no later call waits for it."""
        if self._queue is not None:
            self._queue.put(None)
        self._queue = self._thread = None

    def _finish_trial(self) -> None:
        """Compare the rewards of both threads, if there was a trial."""
        if self._trial is None:
            return
        job, expected = self._trial
        self._trial = None
        has_answered = job.done.wait(self.timeout) and job.error is None
        self.threaded = has_answered and _are_equal(job.rewards or [], expected)
        if not self.threaded:
            self._release_thread()
            warnings.warn(
                "`reward` gives other rewards, or fails, outside the main thread. It is therefore called in the main "
                "thread, and sampling waits for it.",
                stacklevel=2,
            )

    def _submit(self, arguments: tuple[Any, ...]) -> _Job:
        job = _Job(arguments)
        if self._queue is None:
            self._queue = SimpleQueue()
            # The thread is a daemon, so that a verifier that never returns does not keep the program from ending.
            self._thread = threading.Thread(
                target=self._score_jobs, args=(self._queue,), daemon=True, name="odp-verifier"
            )
            self._thread.start()
        self._queue.put(job)
        return job

    def _score_job(self, job: _Job) -> list[float]:
        questions, completions, completion_ids = job.arguments
        if self._processes is not None:
            return self._score_in_processes(self._processes, questions, completions, completion_ids)
        return score(self.reward, questions, completions, completion_ids, self.host)

    def _score_jobs(self, queue: "SimpleQueue[_Job | None]") -> None:
        while (job := queue.get()) is not None:
            try:
                with torch.no_grad():
                    job.rewards = job.context.run(self._score_job, job)
            except BaseException as error:
                job.error = error
            job.done.set()

    @property
    def uses_thread(self) -> bool:
        """Whether to score in the other thread: all threads share a default dtype, which must be the user's."""
        return bool(self.threaded) and (self._processes is not None or user_dtype_is_set())

    def open(self) -> "Scoring":
        """Start to collect responses that are scored as they finish."""
        self._finish_trial()
        return Scoring(self)


class Scoring:
    """Responses that are submitted one by one and scored in batches.

    Args:
        verifier: Scores them.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._waiting: list[Submission] = []
        self._jobs: list[tuple[list[int], _Job]] = []

    def add(self, number: int, question: Question, completion: str, completion_ids: Sequence[int]) -> None:
        """Submit a response.

        Args:
            number: Identifies the response in :meth:`rewards`.
            question: The question.
            completion: The text, without special tokens.
            completion_ids: The response as token ids.
        """
        self._waiting.append((number, question, completion, completion_ids))
        if self.verifier.uses_thread and len(self._waiting) >= BATCH_SIZE:
            self._start_job()

    def _start_job(self) -> None:
        numbers, arguments = self._take_waiting()
        self._jobs.append((numbers, self.verifier._submit(arguments)))

    def _take_waiting(self) -> tuple[list[int], tuple[Any, ...]]:
        """Empty the list of waiting responses, and return their numbers and the arguments of a call."""
        # Sorted by number, so that a call does not depend on the order in which responses finished.
        submissions = sorted(self._waiting, key=lambda submission: submission[0])
        self._waiting = []
        numbers, *arguments = (list(column) for column in zip(*submissions, strict=True))
        return numbers, tuple(arguments)

    def start(self) -> None:
        """Let the other thread score what has been submitted, without waiting for a whole batch."""
        if self._waiting and self.verifier.uses_thread:
            self._start_job()

    def is_ready(self) -> bool:
        """Whether :meth:`rewards` would not wait for the other thread."""
        return all(job.done.is_set() for _, job in self._jobs)

    def rewards(self) -> dict[int, float]:
        """Wait until all responses are scored, and return their rewards by number.

        Raises:
            RewardTimeoutError: If a call exceeds the timeout.
            Exception: What the reward function raised.
        """
        rewards: dict[int, float] = {}
        self.start()
        if self._waiting:
            numbers, arguments = self._take_waiting()
            for first in range(0, len(numbers), BATCH_SIZE):
                part = slice(first, first + BATCH_SIZE)
                part_rewards = self.verifier.score(*(column[part] for column in arguments))
                rewards.update(zip(numbers[part], part_rewards, strict=True))
        for numbers, job in self._jobs:
            # The calls run one after the other, so the timeout of each starts when the one before has ended.
            if not job.done.wait(self.verifier.timeout):
                self.verifier._release_thread()
                raise _timeout_error(self.verifier.timeout, len(numbers))
            if job.error is not None:
                raise job.error
            rewards.update(zip(numbers, job.rewards or [], strict=True))
        return rewards


@contextmanager
def _interrupt_after(timeout: float | None, count: int) -> Iterator[None]:
    """Interrupt code that exceeds the timeout, where this thread can be interrupted and no other alarm is set."""
    is_main = threading.current_thread() is threading.main_thread()
    if timeout is None or not is_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise _Interrupt

    previous_handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    except _Interrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
    if interrupted:  # also where a bare `except` caught the exception
        raise _timeout_error(timeout, count)


def _are_equal(rewards: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two lists of rewards are the same, with NaN equal to NaN."""
    return len(rewards) == len(expected) and all(
        reward == other or (math.isnan(reward) and math.isnan(other))
        for reward, other in zip(rewards, expected, strict=True)
    )


def _timeout_error(timeout: float | None, count: int) -> RewardTimeoutError:
    return RewardTimeoutError(
        f"`reward` took longer than {timeout:g} s for {count} completions; make it faster, or increase "
        "`reward_timeout`."
    )
