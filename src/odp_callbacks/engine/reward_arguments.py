"""What a reward function is called with: by TRL's convention, and no more than it takes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odp_callbacks.engine.prompts import Question, Row

SIGNATURE = "def reward(prompts, completions, **columns) -> list[float]"
"""A signature that works."""
RESERVED_COLUMNS = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
)
"""Columns of a row that are not passed on, because something else has their name."""


class RewardError(ValueError):
    """The reward function cannot be called, or did not return one number in [0, 1] or None for each completion."""


class UnscoredError(RewardError):
    """The reward function gave None to everything, so that there is nothing to measure."""


class RewardTimeoutError(RewardError):
    """One call of the reward function took longer than its timeout."""


class RewardSignatureError(RewardError, TypeError):
    """The reward function needs an argument that nothing provides."""


def ignore(*arguments: Any, **options: Any) -> None:
    """Take what a reward function logs in a probe, which is not a part of the training's own logs."""


@dataclass(frozen=True)
class RewardHost:
    """What TRL passes to a reward function besides prompts, completions and columns.

    Attributes:
        trainer_state: State of the trainer; None stands for one that knows nothing but the step.
        step: Number of optimizer steps taken, where there is no state.
        log_metric: Takes the name of a metric and its value.
        log_extra: Takes the name of a column and its values.
    """

    trainer_state: Any = None
    step: int = 0
    log_metric: Callable[..., Any] = field(default=ignore)
    log_extra: Callable[..., Any] = field(default=ignore)

    def arguments(self) -> dict[str, Any]:
        """The arguments by the names that TRL gives them."""
        state = self.trainer_state
        if state is None:
            from transformers import TrainerState

            state = TrainerState(global_step=self.step)
        return {"trainer_state": state, "log_metric": self.log_metric, "log_extra": self.log_extra}


def check_reward(reward: object) -> None:
    """Check before training that something is a reward function.

    Args:
        reward: A function, an object that can be called, or a module whose ``forward`` takes texts.

    Raises:
        TypeError: If it is not; the message has a signature that works.
    """
    if not callable(reward):
        raise TypeError(f"`reward` must be a function of prompts, completions and columns, but got {reward!r}.")
    if inspect.isclass(reward):
        raise TypeError(f"`reward` must be a function, but the class {reward.__name__} was given; give an instance.")
    parameters = _parameters(reward)
    if isinstance(reward, nn.Module) and "completions" not in parameters:
        raise TypeError(
            f"`reward` is the model {type(reward).__name__}, which reads tokens and gives scores without bounds; give "
            f"a function that calls it on texts and returns numbers in [0, 1], `{SIGNATURE}`."
        )
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    if positional:
        raise TypeError(
            f"`reward` takes {positional[0]!r} by position only, but it is called by name; define it as `{SIGNATURE}`."
        )


def missing_arguments(reward: object, row: Row) -> list[str]:
    """Names of the arguments that a reward function cannot do without and that a row does not provide.

    Args:
        reward: The reward function.
        row: A row, whose columns are arguments.
    """
    provided = RESERVED_COLUMNS - {"prompt", "completion"} | row.keys() - RESERVED_COLUMNS
    return [name for name, parameter in _parameters(reward).items() if _is_required(parameter) and name not in provided]


def check_columns(reward: object, questions: Sequence[Question]) -> None:
    """Check before training that every question has what the reward function takes.

    Raises:
        RewardSignatureError: If a question lacks a column.
    """
    for question in questions:
        if missing := missing_arguments(reward, question.row):
            columns = sorted(str(name) for name in question.row if name not in RESERVED_COLUMNS)
            raise RewardSignatureError(
                f"`reward` needs the argument {missing[0]!r}, but question {question.id} has only the columns "
                f"{columns}; add the column, or define it as `{SIGNATURE}`."
            )


def reward_arguments(
    reward: object,
    questions: Sequence[Question],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    host: RewardHost,
) -> dict[str, Any]:
    """The arguments of one call.

    A function with ``**`` gets what TRL gives it: prompts, completions, token ids, what the host provides, and all
    columns that every row has. Another one gets what it names; a column that only some rows have is None in the others.

    Args:
        reward: The reward function.
        questions: The question of each completion.
        completions: The completions, as texts or messages.
        completion_ids: The completions as token ids.
        host: What else there is.
    """
    check_columns(reward, questions)
    parameters = _parameters(reward)
    accepts_others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments: dict[str, Any] = {}
    for name in dict.fromkeys(name for question in questions for name in question.row):
        is_everywhere = all(name in question.row for question in questions)
        if (
            isinstance(name, str)
            and name not in RESERVED_COLUMNS
            and (name in parameters or (accepts_others and is_everywhere))
        ):
            arguments[name] = [question.row.get(name) for question in questions]
    given = {
        "prompts": [question.row["prompt"] for question in questions],
        "completions": list(completions),
        "completion_ids": [list(token_ids) for token_ids in completion_ids],
    }
    if accepts_others or not parameters.keys().isdisjoint(("trainer_state", "log_metric", "log_extra")):
        given |= host.arguments()
    return arguments | {name: value for name, value in given.items() if accepts_others or name in parameters}


def _parameters(reward: object) -> Mapping[str, inspect.Parameter]:
    """The arguments of a reward function by name; one without a known signature takes whatever it is given."""
    function: Any = reward.forward if isinstance(reward, nn.Module) else reward
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin or C function without a signature
        return {"columns": inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)}


def _is_required(parameter: inspect.Parameter) -> bool:
    is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return is_named and parameter.default is parameter.empty
