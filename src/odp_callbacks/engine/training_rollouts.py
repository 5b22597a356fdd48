"""The rollouts that a training samples itself, as it shows them to a callback."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.prompts import Row, as_questions
from odp_callbacks.engine.rollouts import Rollout, response_text, score_rollouts
from odp_callbacks.engine.verifier import Verifier


@dataclass(frozen=True)
class TrainingRollout:
    """A response that the training sampled from the student.

    A LightningModule sets ``last_rollouts`` to a list of these in each training step, as
    :class:`~odp_callbacks.OnPolicyDistillation` does.

    Attributes:
        row: The question. Rollouts of one question share the object.
        response_ids: Token ids of the response.
        reward: What the training scored it with, NaN where the scoring failed; None if the training does not score,
            and the callback's ``reward`` scores it.
        log_probs: Natural logarithm of each response token's probability under the student before the optimizer step,
            at the temperature of the sampling and without dropout; None if the training does not have them.
        temperature: Of the sampling; None for that of the callback's configuration.

    Examples:
        >>> rollout = TrainingRollout({"prompt": "1 + 1 ="}, [17, 2], reward=1.0, log_probs=[-0.3, -0.1])
        >>> sum(rollout.log_probs)
        -0.4
    """

    row: Row
    response_ids: Sequence[int]
    reward: float | None = None
    log_probs: Sequence[float] | None = None
    temperature: float | None = None


TrainingRollouts: TypeAlias = Callable[[], Iterable["TrainingRollout | tuple[Row, Sequence[int]]"]]
"""Returns the training's own rollouts; a pair is a row and the token ids of a response."""


def as_training_rollouts(rollouts: Iterable["TrainingRollout | tuple[Row, Sequence[int]]"]) -> list[TrainingRollout]:
    """Turn pairs of a row and response token ids into rollouts."""
    return [one if isinstance(one, TrainingRollout) else TrainingRollout(*one) for one in rollouts]


def read_once(training_rollouts: TrainingRollouts) -> TrainingRollouts:
    """The same rollouts, read at the first call only: to read them may take work, such as encoding their prompts.

    Examples:
        >>> calls = iter([[({"prompt": "2 + 2 ="}, [21])], []])
        >>> rollouts = read_once(lambda: next(calls))
        >>> rollouts() is rollouts()
        True
    """
    return cache(lambda: as_training_rollouts(training_rollouts()))


def as_scored_rollouts(
    rollouts: Sequence[TrainingRollout],
    tokenizer: Any,
    template: ChatTemplate,
    eos_token_ids: Sequence[int],
    verifier: Verifier,
) -> list[Rollout]:
    """Encode the prompts of the training's rollouts for the student, and score those without a reward.

    Args:
        rollouts: With at least one token each. Their responses are taken as they are, whatever ends a response here.
        tokenizer: The student's tokenizer.
        template: How the training renders messages.
        eos_token_ids: Tokens that end a response.
        verifier: Scores the rollouts whose reward is None.

    Returns:
        For each rollout one with its reward; rollouts of one row share their question.
    """
    rows = {id(rollout.row): rollout.row for rollout in rollouts}
    questions = dict(zip(rows, as_questions(list(rows.values()), tokenizer, template=template), strict=True))
    converted = []
    for rollout in rollouts:
        tokens = tuple(int(token) for token in rollout.response_ids)
        text = response_text(tokenizer, tokens, eos_token_ids)
        reward = math.nan if rollout.reward is None else float(rollout.reward)
        converted.append(Rollout(questions[id(rollout.row)], tokens, text, tokens[-1] not in eos_token_ids, reward))
    unscored = [index for index, rollout in enumerate(rollouts) if rollout.reward is None]
    if unscored:
        for index, scored in zip(unscored, score_rollouts(verifier, [converted[i] for i in unscored]), strict=True):
            converted[index] = scored
    return converted
