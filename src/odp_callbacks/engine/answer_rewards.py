"""Reward functions that find the answer in a response by a rule, and compare it with the right one."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from odp_callbacks.engine.answers import ANSWER_RULES, AnswerRule, same_answer
from odp_callbacks.engine.messages import content_text
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rows import is_missing

AnswerReward = Callable[..., list[float | None]]
"""A TRL reward function."""


def answer_reward(rule: str | AnswerRule, column: str = "answer") -> AnswerReward:
    r"""Make a TRL reward function: 1 where the answer in the response is the right one, else 0.

    Args:
        rule: How the answer is found in a response: ``"stated"`` (after "Answer:"), ``"boxed"``, ``"number"`` (the last
            one), ``"yes-no"``, ``"letter"``, or a function from a text to the answer or None.
        column: The column with the right answer. It may hold the answer alone, or a text that the rule finds it in.

    Returns:
        ``reward(prompts, completions, **columns)``. It gives None where the column has no value.

    Raises:
        ValueError: If there is no such rule.

    Examples:
        >>> reward = answer_reward("number")
        >>> reward(["6 * 7?"] * 2, ["6 * 7 = 42.", "I do not know."], answer=["42", "42"])
        [1.0, 0.0]
    """
    find_answer = answer_rule(rule)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        references = [None if is_missing(value) else right_answer(find_answer, value) for value in columns[column]]
        return [
            None if reference is None else float(same_answer(find_answer(completion_text(completion)), reference))
            for completion, reference in zip(completions, references, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = rule.replace("-", "_") if isinstance(rule, str) else rule.__name__
    # So that a row without the column is noticed before training.
    keywords = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("prompts", "completions")]
    keywords.append(inspect.Parameter(column, inspect.Parameter.KEYWORD_ONLY))
    keywords.append(inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD))
    reward.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # what inspect reads
    return reward


def answer_rule(rule: str | AnswerRule) -> AnswerRule:
    """The rule of this name, or the function that was given.

    Raises:
        ValueError: If there is no such rule.
    """
    if not isinstance(rule, str):
        return rule
    if rule not in ANSWER_RULES:
        raise ValueError(
            f"`rule` must be one of {list(ANSWER_RULES)}, or a function of a text, but {rule!r} was given."
        )
    return ANSWER_RULES[rule]


def right_answer(rule: AnswerRule, reference: Any) -> str | None:
    """The right answer: what the rule finds in the reference, or else the reference itself where the rule takes it.

    A reference such as ``"Paris"`` or ``7`` has neither "Answer:" nor a box. It is right as it stands if the rule finds
    it again behind "Answer:" or in a box, and it is unusable if not: ``"Paris"`` for the rule "number".

    Args:
        rule: The rule.
        reference: The value of the row's column.

    Examples:
        >>> right_answer(ANSWER_RULES["stated"], "Paris"), right_answer(ANSWER_RULES["yes-no"], True)
        ('Paris', 'yes')
        >>> right_answer(ANSWER_RULES["number"], "Paris")
    """
    text = str(reference).strip()
    for written in (text, f"Answer: {text}", rf"\boxed{{{text}}}"):
        if (answer := rule(written)) is not None:
            return answer
    return None


def check_references(rule: str | AnswerRule, rows: Sequence[Row], column: str = "answer") -> None:
    """Check before training that the right answer can be found in every row.

    Args:
        rule: As in :func:`answer_reward`.
        rows: The rows.
        column: The column with the right answer.

    Raises:
        ValueError: If it cannot; the message names the row.
    """
    find_answer = answer_rule(rule)
    for row_index, row in enumerate(rows):
        if column not in row:
            raise ValueError(
                f"`reward` {rule!r} reads a column {column!r}, but row {row_index} has only {sorted(row)}."
            )
        if not is_missing(row[column]) and right_answer(find_answer, row[column]) is None:
            raise ValueError(
                f"`reward` {rule!r} finds no answer in the column {column!r} of row {row_index}, which is "
                f"{str(row[column])[:200]!r}; give the column in the form that the rule reads, or another rule "
                f"({', '.join(ANSWER_RULES)})."
            )


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or chat messages of which the last counts."""
    return completion if isinstance(completion, str) else content_text(completion[-1]["content"])
