"""Scoring responses with the user's reward function, by TRL's convention."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from odp_callbacks.engine.prompts import Question, is_conversational

RewardFunction = Callable[..., Sequence[float]]
"""A TRL reward function: ``reward(prompts, completions, **columns)`` to one number for each completion."""
RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns of a row that are not passed on to the reward function."""


class RewardError(ValueError):
    """The reward function did not return one number in [0, 1] for each completion."""


def score(
    reward: RewardFunction,
    questions: Sequence[Question],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> list[float]:
    """Score completions by calling ``reward(prompts=..., completions=..., **columns)``, as TRL does.

    A completion of a conversational prompt is passed as ``[{"role": "assistant", "content": ...}]``. The columns are
    those that every row has, except ``prompt``. A function without ``**`` receives only the columns that it names, and
    ``completion_ids`` only if it names them.

    Args:
        reward: The user's function.
        questions: The question of each completion.
        completions: Texts, without special tokens.
        completion_ids: The completions as token ids.

    Returns:
        One float in [0, 1] for each completion.

    Raises:
        RewardError: If the result has another length, or contains anything but numbers in [0, 1].

    Examples:
        >>> import torch
        >>> question = Question("0", {"prompt": "1+1=", "answer": "2"}, torch.tensor([5]))
        >>> def exact(prompts, completions, answer):
        ...     return [float(completion == expected) for completion, expected in zip(completions, answer)]
        >>> score(exact, [question, question], ["2", "3"], [[2], [3]])
        [1.0, 0.0]
    """
    if not questions:
        return []
    columns: dict[str, Any] = {
        key: [question.row[key] for question in questions]
        for key in questions[0].row
        if key not in RESERVED_COLUMNS and all(key in question.row for question in questions)
    }
    argument_names, accepts_others = _named_arguments(reward)
    if not accepts_others:
        columns = {key: column for key, column in columns.items() if key in argument_names}
    if "completion_ids" in argument_names:
        columns["completion_ids"] = [list(ids) for ids in completion_ids]
    prompts = [question.row["prompt"] for question in questions]
    responses = [
        [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    return _check_rewards(reward(prompts=prompts, completions=responses, **columns), len(questions))


def _named_arguments(reward: RewardFunction) -> tuple[set[str], bool]:
    """Return the names of a function's arguments, and whether it accepts others through ``**``."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin or C function without a signature
        return set(), True
    accepts_others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return {parameter.name for parameter in parameters}, accepts_others


def _check_rewards(result: object, expected: int) -> list[float]:
    """Convert what a reward function returned to floats, or raise :class:`RewardError`."""
    try:
        if isinstance(result, str | bytes | Mapping):
            raise TypeError
        numbers = list(result)  # type: ignore[call-overload]  # the user's function may return anything
    except TypeError:
        raise RewardError(
            f"`reward` must return a list of {expected} numbers in [0, 1], but it returned {result!r}."
        ) from None
    if len(numbers) != expected:
        raise RewardError(
            f"`reward` must return one number for each of the {expected} completions, but it returned {len(numbers)}."
        )
    rewards = []
    for number in numbers:
        try:
            value = float(number)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise RewardError(f"`reward` must return numbers in [0, 1], but {number!r} was among them; rescale it.")
        rewards.append(value)
    return rewards
