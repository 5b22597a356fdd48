"""Scoring responses with the user's reward function, by TRL's convention."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from odp_callbacks.engine.awaiting import wait_for
from odp_callbacks.engine.prompts import Question, is_conversational
from odp_callbacks.engine.reward_arguments import (
    RESERVED_COLUMNS,
    RewardError,
    RewardHost,
    RewardSignatureError,
    UnscoredError,
    check_columns,
    check_reward,
    reward_arguments,
)
from odp_callbacks.engine.rows import is_missing
from odp_callbacks.engine.user_defaults import call_with_user_defaults

__all__ = [
    "RESERVED_COLUMNS",
    "RewardError",
    "RewardFunction",
    "RewardHost",
    "RewardSignatureError",
    "UnscoredError",
    "check_columns",
    "check_reward",
    "score",
]

RewardFunction = Callable[..., Any]
"""A TRL reward function: ``reward(prompts, completions, **columns)`` to one number, or None, for each completion."""
NO_HOST = RewardHost()
"""A probe outside any trainer."""


def score(
    reward: RewardFunction,
    questions: Sequence[Question],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    host: RewardHost = NO_HOST,
) -> list[float]:
    """Score completions by calling ``reward(prompts=..., completions=..., **columns)``, as TRL does.

    A completion of a conversational prompt is passed as ``[{"role": "assistant", "content": ...}]``. A function with
    ``**`` receives the columns that every row has, except those of :data:`RESERVED_COLUMNS`, and what TRL passes
    besides: ``completion_ids``, ``trainer_state``, ``log_metric`` and ``log_extra``. One without ``**`` receives what
    it names. The function may be asynchronous.

    Args:
        reward: The user's function.
        questions: The question of each completion.
        completions: Texts, without special tokens.
        completion_ids: The completions as token ids.
        host: What a trainer passes to reward functions.

    Returns:
        One float in [0, 1] for each completion; NaN where the function gave None, which means "no reward".

    Raises:
        RewardError: If the result has another length, or contains anything but None and numbers in [0, 1].
        RewardSignatureError: If the function needs an argument that is not there.

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
    arguments = call_arguments(reward, questions, completions, completion_ids, host)
    return call_with_user_defaults(_rewards_of_call, reward, arguments, len(questions))


def call_arguments(
    reward: RewardFunction,
    questions: Sequence[Question],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    host: RewardHost = NO_HOST,
) -> dict[str, Any]:
    """What one call of a reward function is given; the arguments are those of :func:`score`.

    Raises:
        RewardSignatureError: If the function needs an argument that is not there.
    """
    responses = [
        [{"role": "assistant", "content": text}] if is_conversational(question.row["prompt"]) else text
        for question, text in zip(questions, completions, strict=True)
    ]
    return reward_arguments(reward, questions, responses, completion_ids, host)


def _rewards_of_call(reward: RewardFunction, arguments: Mapping[str, Any], expected: int) -> list[float]:
    """Call a reward function, and wait for it if it is asynchronous."""
    result: Any = reward(**arguments)
    if inspect.isawaitable(result):
        result = wait_for(result)
    return checked_rewards(result, expected)


def checked_rewards(result: object, expected: int) -> list[float]:
    """Convert what a reward function returned to floats.

    Args:
        result: What it returned.
        expected: Number of completions.

    Returns:
        One float in [0, 1] for each completion; NaN for None.

    Raises:
        RewardError: If the result has another length, or contains anything but None and numbers in [0, 1].
    """
    numbers = _as_iterator(result)
    if numbers is None:
        raise RewardError(
            f"`reward` must return a list of {expected} numbers in [0, 1], but it returned {result!r}."
        ) from None
    rewards = [_checked(number) for number in numbers]
    if len(rewards) != expected:
        raise RewardError(
            f"`reward` must return one number for each of the {expected} completions, but it returned {len(rewards)}."
        )
    return rewards


def _as_iterator(result: Any) -> Iterator[Any] | None:
    """Iterate over a result; None if it is no list or what resembles one."""
    if isinstance(result, Tensor):
        result = result.detach().cpu()
    if isinstance(result, str | bytes | Mapping | set | frozenset | nn.Module):
        return None
    try:
        numbers: Iterator[Any] = iter(result)
    except TypeError:
        return None
    return numbers


def _checked(number: Any) -> float:
    """A reward as a float, NaN for None."""
    if is_missing(number):
        return math.nan
    if isinstance(number, Tensor):
        number = number.detach()
    try:
        value = math.inf if isinstance(number, str | bytes) else float(number)
    except (TypeError, ValueError):
        value = math.inf
    if math.isnan(value):  # of a tensor or array; TRL takes it for None, too
        return math.nan
    if not 0 <= value <= 1:
        raise RewardError(f"`reward` must return numbers in [0, 1], but {number!r} was among them; rescale it.")
    return value
