"""What the measurement of an update leaves behind: inner products of gradients, and the influence of every token."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

CLASSES = ("correct", "incorrect")
"""Classes of rollouts by their reward; the distillation gradient of each is kept apart."""


@dataclass(frozen=True)
class UpdateGram:
    """Inner products of the gradients of ``F`` groups of questions, ``K`` teachers and ``C`` classes of rollouts.

    Attributes:
        questions: ``(F,)``, how many questions each group has.
        tokens: ``(F, C)``, how many response tokens the directions are sums of.
        success: ``(F, F)``, of the groups' success gradients, each summed over the questions of its group.
        cross: ``(F, F, K, C)``, of success gradients (first axis) and directions (second axis).
        directions: ``(F, F, K, C, C)``, of the directions of one teacher.
        between: ``(F, F, K, K)``, of the directions of two teachers, all classes together.
    """

    questions: Floats
    tokens: Floats
    success: Floats
    cross: Floats
    directions: Floats
    between: Floats

    @property
    def groups(self) -> int:
        """How many groups of questions there are, ``F``."""
        return len(self.questions)


def gram_of_rows(questions: Floats, tokens: Floats, success: Floats, directions: Floats) -> UpdateGram:
    """Compute the inner products of explicit gradients.

    Args:
        questions: ``(F,)``.
        tokens: ``(F, C)``.
        success: ``(F, P)``, summed over each group's questions.
        directions: ``(F, K, C, P)``.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> success, directions = rng.normal(size=(3, 5)), rng.normal(size=(3, 1, 2, 5))
        >>> gram_of_rows(np.ones(3), np.ones((3, 2)), success, directions).cross.shape
        (3, 3, 1, 2)
    """
    groups, teachers, classes, size = directions.shape
    flat = directions.reshape(-1, size)
    products = (flat @ flat.T).reshape(groups, teachers, classes, groups, teachers, classes)
    return UpdateGram(
        np.asarray(questions, float),
        np.asarray(tokens, float),
        success @ success.T,
        (success @ flat.T).reshape(groups, groups, teachers, classes),
        np.einsum("fkchkd->fhkcd", products),
        np.einsum("fkchld->fhkl", products),
    )


@dataclass(frozen=True)
class TokenInfluence:
    """Influence of ``N`` response tokens for ``K`` teachers, along the success gradients of ``S`` folds of questions.

    Attributes:
        rollout: ``(N,)``, index of the rollout.
        depth: ``(N,)``, position in the response.
        by_fold: ``(S, N, K)``, inner product of the token's distillation gradient with the mean success gradient of
            each fold; NaN for the fold that holds the token's own question.
        fold_questions: ``(S,)``, questions of each fold.
        direction_norm: ``(K,)``, norm of each teacher's summed direction.
        logit_norm: ``(N, K)``, norm of the token's distillation direction on the logits.
    """

    rollout: NDArray[np.int64]
    depth: NDArray[np.int64]
    by_fold: Floats32
    fold_questions: Floats
    direction_norm: Floats
    logit_norm: Floats32


@dataclass(frozen=True)
class UpdateRecord:
    """One measurement of an update.

    Attributes:
        gram: Inner products of success gradients and distillation gradients.
        influence: Of every response token; None if it was not measured.
    """

    gram: UpdateGram
    influence: TokenInfluence | None = None

    def with_rollout_offset(self, offset: int) -> "UpdateRecord":
        """The same record where ``offset`` rollouts stand before its own."""
        if self.influence is None:
            return self
        return replace(self, influence=replace(self.influence, rollout=self.influence.rollout + offset))

    def with_rollouts(self, new_index: NDArray[np.int64]) -> "UpdateRecord":
        """The same record where rollout ``i`` is called ``new_index[i]``; tokens whose rollout is -1 are dropped."""
        if self.influence is None:
            return self
        rollout = new_index[self.influence.rollout]
        kept = rollout >= 0
        influence = replace(
            self.influence,
            rollout=rollout[kept],
            depth=self.influence.depth[kept],
            by_fold=self.influence.by_fold[:, kept],
            logit_norm=self.influence.logit_norm[kept],
        )
        return replace(self, influence=influence)
