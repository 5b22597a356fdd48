"""Reward functions that a command line can name."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction

TASK_REWARD = "task"
"""Names the reward function that came with the questions."""


def load_reward(name: str, task_reward: RewardFunction | None, rows: Sequence[Row] = ()) -> RewardFunction:
    """Find a reward function by its name.

    Args:
        name: ``"task"`` for the function that came with the questions, ``"exact"``, ``"math-verify"``, or the import
            path of a TRL reward function, as in ``my_package.rewards.correct``.
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
                "`reward` is 'task', but this dataset has no reward function of its own; give 'exact', 'math-verify' "
                "or an import path."
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
        return REWARDS[name]
    return _import_reward(name)


def _import_reward(path: str) -> RewardFunction:
    module, _, function_name = path.rpartition(".")
    try:
        function: Any = getattr(import_module(module), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`reward` is {path!r}, which is none of {sorted([TASK_REWARD, *REWARDS])} and cannot be imported: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"`reward` is {path!r}, which is not a function.")
    reward: RewardFunction = function
    return reward


def exact(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """Give 1 where the completion equals the column ``answer``, apart from white space around both, else 0."""
    return [
        float(_completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def math_verify(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """Give 1 where Math-Verify finds the completion's result equal to the column ``answer``, else 0."""
    from math_verify import parse, verify

    return [
        float(verify(parse(str(expected)), parse(_completion_text(completion))))
        for completion, expected in zip(completions, answer, strict=True)
    ]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact, "math-verify": math_verify}
NEEDS_ANSWER = frozenset(REWARDS)


def _require_math_verify() -> None:
    try:
        import_module("math_verify")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`reward` is 'math-verify', which needs the package {error.name}: pip install 'odp-callbacks[math]'."
        ) from error


def _completion_text(completion: Any) -> str:
    """The text of a completion: a string, or chat messages of which the last counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
