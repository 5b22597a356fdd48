"""Measures the rollouts that the training itself has sampled, by update gain."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.records import ProbeReport

TrainingRollouts: TypeAlias = Callable[[], Iterable[tuple[Row, Sequence[int]]]]
"""Returns the training's own rollouts: each one's row and response token ids."""


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
    for row, response in training_rollouts():
        rows[id(row)] = row
        responses.setdefault(id(row), []).append(response)
    if not rows:
        return None
    question_ids = [f"{context.processes.rank}.{position}" for position in range(len(rows))]
    with remembering_user_defaults(), context.precision_context():
        return update_probe.run(list(rows.values()), seed=seed, ids=question_ids, responses=list(responses.values()))
