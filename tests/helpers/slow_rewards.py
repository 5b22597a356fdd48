"""Reward functions of a module, as processes of their own need them."""

import os
import signal
import time
from collections.abc import Sequence
from typing import Any


def verified(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """As math-verify does: it parses in Python, and limits its own time by an alarm, which needs a main thread."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        return [float(_value(text) == _value(right)) for text, right in zip(completions, answer, strict=True)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _value(text: str, steps: int = 2000) -> int:
    """The sum of the numbers in a text, slowly."""
    total = 0
    for _ in range(steps):
        total = sum(int(word) for word in text.split() if word.isdigit())
    return total


def in_process(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 in another process than that whose number the completion is."""
    assert columns["trainer_state"].global_step == 7
    columns["log_metric"]("a metric", 1.0)
    return [float(completion != str(os.getpid())) for completion in completions]


async def asynchronous(prompts: Sequence[Any], completions: Sequence[str]) -> list[float | None]:
    return [None if completion == "?" else 1.0 for completion in completions]


class UnrepeatableError(Exception):
    """Cannot be made again from what is pickled of it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def misbehaving(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Does what the first completion says."""
    match completions[0]:
        case "fail":
            raise KeyError("verifier")
        case "fail strangely":
            raise UnrepeatableError(3, "a strange failure")
        case "hang":
            time.sleep(60)
        case "die":
            os._exit(9)
        case "exit":
            raise SystemExit(3)
    return [0.5] * len(completions)


def first_letter(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(completion[:1] < "d") for completion in completions]
