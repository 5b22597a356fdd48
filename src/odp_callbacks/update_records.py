"""What the measurement of an update leaves behind: inner products of gradients, and the influence of every token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

CLASSES = ("correct", "incorrect")
"""Classes of rollouts by their reward; the distillation gradient of each is kept apart."""


@dataclass(frozen=True)
class ModuleProducts:
    """Inner products of success gradients and directions on the parameters of each of ``M`` LoRA modules alone.

    Attributes:
        names: The modules.
        cross: ``(F, F, K, M)``, of success gradients (first axis) and directions of all classes (second axis). Summed
            over modules it is that of :attr:`UpdateGram.cross` over classes.
    """

    names: tuple[str, ...]
    cross: Floats


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
        modules: The same as ``cross`` by module; None if it was not measured.
        folds: ``(F,)``, the fold of each group: contributions multiply a direction only with success gradients of other
            folds, as influences of tokens do, so that these add up to them. None: every group is a fold of its own.
    """

    questions: Floats
    tokens: Floats
    success: Floats
    cross: Floats
    directions: Floats
    between: Floats
    modules: ModuleProducts | None = None
    folds: NDArray[np.int64] | None = None

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
    flat = directions.reshape(-1, directions.shape[-1])
    return gram_of_products(
        questions, tokens, success @ success.T, success @ flat.T, flat @ flat.T, directions.shape[1]
    )


def gram_of_products(
    questions: Floats, tokens: Floats, success: Floats, cross: Floats, directions: Floats, teachers: int
) -> UpdateGram:
    """Arrange inner products of gradients that were computed elsewhere.

    Args:
        questions: ``(F,)``.
        tokens: ``(F, C)``.
        success: ``(F, F)``, of the success gradients.
        cross: ``(F, D)``, of the success gradients and all ``D = F K C`` directions, by group, teacher and class.
        directions: ``(D, D)``, of the directions.
        teachers: ``K``.
    """
    groups, classes = np.asarray(tokens).shape
    products = directions.reshape(groups, teachers, classes, groups, teachers, classes)
    return UpdateGram(
        np.asarray(questions, float),
        np.asarray(tokens, float),
        success,
        cross.reshape(groups, groups, teachers, classes),
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
class TokenFeatures:
    """What rules for where to distil may ask about ``N`` response tokens and ``K`` teachers.

    Attributes:
        rollout: ``(N,)``, index of the rollout.
        depth: ``(N,)``, position in the response.
        student_entropy: ``(N,)``, in nats.
        student_log_prob: ``(N,)``, log-probability that the student gives the token, in nats.
        teacher_entropy: ``(N, K)``, in nats.
        teacher_log_prob: ``(N, K)``, log-probability that each teacher gives the token, in nats.
        reverse_kl: ``(N, K)``, divergence ``KL(student || teacher)``, in nats.
        top_k_overlap: ``(N, K)``, and the three below: see :mod:`~odp_callbacks.functional.top_k`. No rule asks about
            them; None in records from before they existed.
        overlap_advantage: ``(N, K)``, in nats; NaN where no token is shared.
        student_mass_on_teacher_top_k: ``(N, K)``.
        teacher_mass_on_student_top_k: ``(N, K)``.
    """

    rollout: NDArray[np.int64]
    depth: NDArray[np.int64]
    student_entropy: Floats32
    student_log_prob: Floats32
    teacher_entropy: Floats32
    teacher_log_prob: Floats32
    reverse_kl: Floats32
    top_k_overlap: Floats32 | None = None
    overlap_advantage: Floats32 | None = None
    student_mass_on_teacher_top_k: Floats32 | None = None
    teacher_mass_on_student_top_k: Floats32 | None = None

    def take(self, chosen: NDArray[np.bool_]) -> "TokenFeatures":
        """Those of some tokens, by a mask ``(N,)``."""
        columns: dict[str, Any] = {name: None if v is None else v[chosen] for name, v in vars(self).items()}
        return TokenFeatures(**columns)


@dataclass(frozen=True)
class RuleProducts:
    """Inner products of the directions of ``R`` rules; a rule gives each token a weight in the distillation gradient.

    Attributes:
        names: The rules.
        weight: ``(R, K)``, sum of the weights of all tokens.
        tokens: ``(R, F, K)``, tokens with a weight above 0.
        cross: ``(R, F, F, K)``, of success gradients (first group) and the rule's directions (second group).
        own: ``(R, F, F, K)``, of the rule's directions.
        whole: ``(R, F, F, K)``, of the rule's directions (first group) and those of all tokens (second group).
    """

    names: tuple[str, ...]
    weight: Floats
    tokens: Floats
    cross: Floats
    own: Floats
    whole: Floats


@dataclass(frozen=True)
class UpdateRecord:
    """One measurement of an update.

    Attributes:
        gram: Inner products of success gradients and distillation gradients.
        influence: Of every response token; None if it was not measured.
        features: Of every response token, for rules; None if neither influences nor rules were measured.
        rules: Inner products of the directions of rules; None if there were none.
    """

    gram: UpdateGram
    influence: TokenInfluence | None = None
    features: TokenFeatures | None = None
    rules: RuleProducts | None = None

    def with_rollout_offset(self, offset: int) -> "UpdateRecord":
        """The same record where ``offset`` rollouts stand before its own."""
        influence, features = self.influence, self.features
        return replace(
            self,
            influence=None if influence is None else replace(influence, rollout=influence.rollout + offset),
            features=None if features is None else replace(features, rollout=features.rollout + offset),
        )

    def with_rollouts(self, new_index: NDArray[np.int64]) -> "UpdateRecord":
        """The same record where rollout ``i`` is called ``new_index[i]``; tokens whose rollout is -1 are dropped."""
        influence, features = self.influence, self.features
        if influence is not None:
            rollout = new_index[influence.rollout]
            kept = rollout >= 0
            influence = replace(
                influence,
                rollout=rollout[kept],
                depth=influence.depth[kept],
                by_fold=influence.by_fold[:, kept],
                logit_norm=influence.logit_norm[kept],
            )
        if features is not None:
            rollout = new_index[features.rollout]
            features = replace(features.take(rollout >= 0), rollout=rollout[rollout >= 0])
        return replace(self, influence=influence, features=features)
