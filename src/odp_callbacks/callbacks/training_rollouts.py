"""Measures the rollouts that the training itself has sampled, by update gain."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.records import ProbeReport


@dataclass(frozen=True)
class TrainingRollout:
    """A response that the training sampled from the student.

    Attributes:
        row: The question. Rollouts of one question share the object.
        response_ids: Token ids of the response.
        reward: What the training scored it with; None if it did not, and the callback's ``reward`` scores it.
        log_probs: Natural logarithm of each response token's probability under the student before the optimizer step,
            at the temperature of the sampling; None if the training does not have them.
    """

    row: Row
    response_ids: Sequence[int]
    reward: float | None = None
    log_probs: Sequence[float] | None = None


TrainingRollouts: TypeAlias = Callable[[], Iterable["TrainingRollout | tuple[Row, Sequence[int]]"]]
"""Returns the training's own rollouts; a pair is a row and the token ids of a response."""


def as_training_rollouts(rollouts: Iterable["TrainingRollout | tuple[Row, Sequence[int]]"]) -> list[TrainingRollout]:
    """Turn pairs of a row and response token ids into rollouts."""
    return [one if isinstance(one, TrainingRollout) else TrainingRollout(*one) for one in rollouts]


def measure_training_rollouts(
    update_probe: Probe, training_rollouts: TrainingRollouts, context: TrainerContext, seed: int
) -> ProbeReport | None:
    """Measure the training's rollouts in this process.

    Args:
        update_probe: A probe that measures no nodes.
        training_rollouts: Returns the rollouts.
        context: The trainer.
        seed: Seed of the probe.

    Returns:
        The report; None if there are no rollouts.
    """
    # The responses to one row form one question, so that they are each other's baseline.
    rows: dict[int, Row] = {}
    responses: dict[int, list[Sequence[int]]] = {}
    for rollout in as_training_rollouts(training_rollouts()):
        rows[id(rollout.row)] = rollout.row
        responses.setdefault(id(rollout.row), []).append(rollout.response_ids)
    if not rows:
        return None
    question_ids = [f"{context.processes.rank}.{position}" for position in range(len(rows))]
    with remembering_user_defaults(), context.precision_context():
        return update_probe.run(list(rows.values()), seed=seed, ids=question_ids, responses=list(responses.values()))
