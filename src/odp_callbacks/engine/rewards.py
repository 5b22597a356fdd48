"""Scoring finished responses with the user's verifier, by TRL's convention for reward functions."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from odp_callbacks.engine.prompts import Question, is_conversational

RewardFunction = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """The reward function did not return one number in [0, 1] for each completion."""


def score(
    reward: RewardFunction,
    questions: Sequence[Question],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> list[float]:
    """Score completions: ``reward(prompts, completions, **columns) -> list[float]``, as in TRL.

    A completion of a conversational prompt is wrapped as ``[{"role": "assistant", "content": ...}]``. Columns are all
    those that every row has, less ``prompt``; a function without ``**`` gets only those that it names, and
    ``completion_ids`` if it names them.

    Args:
        reward: The user's function.
        questions: One for each completion.
        completions: Texts, without special tokens.
        completion_ids: The same as token ids.

    Returns:
        One float in [0, 1] each.

    Raises:
        RewardError: If the result has another length or holds something else.

    Examples:
        >>> import torch
        >>> question = Question("0", {"prompt": "1+1=", "answer": "2"}, torch.tensor([5]))
        >>> def exact(prompts, completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> score(exact, [question, question], ["2", "3"], [[2], [3]])
        [1.0, 0.0]
    """
    if not questions:
        return []
    columns: dict[str, Any] = {
        key: [question.row[key] for question in questions]
        for key in questions[0].row
        if key not in ("prompt", "completion", "completion_ids") and all(key in q.row for q in questions)
    }
    named, open_ended = _named_arguments(reward)
    if not open_ended:
        columns = {key: column for key, column in columns.items() if key in named}
    if "completion_ids" in named:
        columns["completion_ids"] = [list(ids) for ids in completion_ids]
    prompts = [question.row["prompt"] for question in questions]
    wrapped = [
        [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    return _checked(reward(prompts=prompts, completions=wrapped, **columns), len(questions))


def _named_arguments(reward: RewardFunction) -> tuple[set[str], bool]:
    """The arguments that a reward function names, and whether it takes any others besides."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin or C function without a signature
        return set(), True
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _checked(result: object, expected: int) -> list[float]:
    try:
        if isinstance(result, str | bytes | Mapping):
            raise TypeError
        scores = list(result)  # type: ignore[call-overload]  # whatever the user's function gave
    except TypeError:
        raise RewardError(
            f"`reward` must return a list of {expected} numbers in [0, 1], but it returned {result!r}."
        ) from None
    if len(scores) != expected:
        raise RewardError(
            f"`reward` must return one number for each of the {expected} completions, but it returned {len(scores)}."
        )
    rewards = []
    for number in scores:
        try:
            value = float(number)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise RewardError(f"`reward` must return numbers in [0, 1], but {number!r} was among them; rescale it.")
        rewards.append(value)
    return rewards
