"""Where each rollout counts in the measurement of an update: its question, group, class and fold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES


@dataclass(frozen=True)
class RolloutPlaces:
    """The places of ``N`` rollouts of ``Q`` questions in ``F`` groups and ``S`` folds.

    Groups and folds take turns along the order in which questions are measured, so that they stay balanced if the last
    questions are left out.

    Attributes:
        question: ``N`` indices of questions.
        group: ``N`` indices of groups of questions.
        kind: ``N`` classes, as indices into :data:`~odp_callbacks.update_records.CLASSES`.
        fold: ``N`` indices of folds of groups.
        advantage: ``N`` numbers: reward less baseline, divided by the number of rollouts of the question, whose success
            gradient is their mean.
        groups: ``F``.
        folds: ``S``.
    """

    question: list[int]
    group: list[int]
    kind: list[int]
    fold: list[int]
    advantage: list[float]
    groups: int
    folds: int

    @classmethod
    def of(
        cls, rollouts: Sequence[Rollout], order: Sequence[int], success_threshold: float, groups: int, folds: int
    ) -> "RolloutPlaces":
        """Place rollouts.

        Args:
            rollouts: Scored rollouts; those of one question share their ``question`` object.
            order: The questions in the order in which they are measured.
            success_threshold: Reward from which a rollout counts as correct.
            groups: Number of groups.
            folds: Number of folds of groups, at most ``groups``.
        """
        question_of = question_indices(rollouts)
        place_of = {question: place for place, question in enumerate(order)}
        group_of = [place_of[question] % groups for question in question_of]
        return cls(
            question_of,
            group_of,
            [CLASSES.index("correct" if one.reward >= success_threshold else "incorrect") for one in rollouts],
            [group % folds for group in group_of],
            _advantages(rollouts, question_of),
            groups,
            folds,
        )

    @property
    def correct(self) -> list[bool]:
        """For each rollout, whether it is correct."""
        return [CLASSES[kind] == "correct" for kind in self.kind]

    @property
    def fold_of_group(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """``(F,)``, the fold of each group."""
        return np.arange(self.groups) % self.folds

    def questions_by(self, places: Sequence[int], count: int) -> Floats:
        """``(count,)``, how many questions there are at each of ``N`` places, such as :attr:`group`."""
        place_of_question = dict(zip(self.question, places, strict=True))
        return np.bincount(list(place_of_question.values()), minlength=count).astype(float)

    def subset(self, rollouts: Sequence[int], groups: int) -> "RolloutPlaces":
        """The places of some rollouts, all of them in the first ``groups`` groups."""
        columns = (self.question, self.group, self.kind, self.fold)
        question, group, kind, fold = ([column[index] for index in rollouts] for column in columns)
        advantage = [self.advantage[index] for index in rollouts]
        return RolloutPlaces(question, group, kind, fold, advantage, groups, min(self.folds, groups))


def _advantages(rollouts: Sequence[Rollout], question_of: Sequence[int]) -> list[float]:
    if not rollouts:
        return []
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    place = torch.tensor(question_of)
    advantages: list[float] = (leave_one_out_advantages(rewards, place) / torch.bincount(place)[place]).tolist()
    return advantages
