"""Reward functions that a command line can name."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from odp_callbacks.engine.answer_rewards import answer_reward, check_references, completion_text
from odp_callbacks.engine.answers import ANSWER_RULES
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.reward_arguments import SIGNATURE, check_reward, missing_arguments
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.rows import is_missing

TASK_REWARD = "task"
"""Names the reward function that came with the questions."""
SHORTEST_ALARM = 0.001
"""Seconds; an alarm of 0 would be none."""


def load_reward(name: str, task_reward: RewardFunction | None, rows: Sequence[Row] = ()) -> RewardFunction:
    """Find a reward function by its name.

    Args:
        name: ``"task"`` for the function that came with the questions, ``"exact"``, ``"math-verify"``, a rule of
            :data:`~odp_callbacks.engine.answers.ANSWER_RULES` such as ``"number"``, or the import path of a TRL reward
            function, as in ``my_package.rewards.correct``.
        task_reward: The function that came with the questions, or None.
        rows: The questions. They must have the columns that the function reads.

    Raises:
        ValueError: If there is no such function, if its package is not installed, or if a column is missing.

    Examples:
        >>> load_reward("exact", None)(["1+1="], [" 2 "], answer=["2"])
        [1.0]
    """
    if name == TASK_REWARD:
        if task_reward is None:
            raise ValueError(
                "`reward` is 'task', but this dataset has no reward function of its own; give one of "
                f"{sorted(REWARDS)}, an import path, or a `preset`."
            )
        return task_reward
    if name in REWARDS:
        if name in NEEDS_ANSWER and (rows_without_answer := [row for row in rows if "answer" not in row]):
            raise ValueError(
                f"`reward` is {name!r}, which reads a column 'answer', but `dataset` has "
                f"{sorted(rows_without_answer[0])}."
            )
        if name == "math-verify":
            _require_math_verify()
        if name in ANSWER_RULES:
            check_references(name, rows)
        return REWARDS[name]
    reward = _import_reward(name)
    for row_index, row in enumerate(rows):
        if missing := missing_arguments(reward, row):
            raise ValueError(
                f"`reward` is {name!r}, which needs the argument {missing[0]!r}, but row {row_index} of `dataset` has "
                f"only {sorted(row)}; add the column, or define it as `{SIGNATURE}`."
            )
    return reward


def _import_reward(path: str) -> RewardFunction:
    module, _, function_name = path.rpartition(".")
    try:
        function: Any = getattr(import_module(module), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`reward` is {path!r}, which is none of {sorted([TASK_REWARD, *REWARDS])} and cannot be imported: {error}"
        ) from error
    try:
        check_reward(function)
    except TypeError as error:
        raise ValueError(f"`reward` is {path!r}, which is not a function that can be used: {error}") from error
    reward: RewardFunction = function
    return reward


def exact(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """Give 1 where the completion equals the column ``answer``, apart from white space, else 0; None without answer."""
    return [
        None if is_missing(expected) else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def math_verify(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """Give 1 where Math-Verify finds the result equal to the column ``answer``, else 0; None without answer."""
    from math_verify import parse, verify

    with _alarm_kept():
        return [
            None if is_missing(expected) else float(verify(parse(str(expected)), parse(completion_text(completion))))
            for completion, expected in zip(completions, answer, strict=True)
        ]


# Math-Verify limits the time of each comparison by a signal. Elsewhere it fails, and takes all answers for wrong.
math_verify.main_thread_only = True  # type: ignore[attr-defined]


@contextmanager
def _alarm_kept() -> Iterator[None]:
    """Let an alarm that is set run on: Math-Verify uses the same one, and switches it off."""
    seconds_left = signal.getitimer(signal.ITIMER_REAL)[0] if hasattr(signal, "setitimer") else 0.0
    start_time = time.monotonic()
    try:
        yield
    finally:
        if seconds_left:
            elapsed = time.monotonic() - start_time
            signal.setitimer(signal.ITIMER_REAL, max(seconds_left - elapsed, SHORTEST_ALARM))


REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "exact": exact,
    "math-verify": math_verify,
    **{rule: answer_reward(rule) for rule in ANSWER_RULES},
}
NEEDS_ANSWER = frozenset(REWARDS)


def _require_math_verify() -> None:
    """Import what Math-Verify reads LaTeX with, too, which its own extra installs.

    Raises:
        ValueError: If a package is missing.
    """
    for module in ("math_verify", "antlr4"):
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(
                f"`reward` is 'math-verify', which needs the package {error.name or module}: "
                "pip install 'odp-callbacks[math]'."
            ) from error
