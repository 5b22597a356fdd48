r"""Update gain and its contributions, from the Gram matrix of success gradients and distillation gradients.

Questions lie in groups, one question each as long as there are few. For every group there are the sum of its
success gradients :math:`g_f` and its distillation gradients :math:`D_{f,k,c}` (teacher k, class c), kept as inner
products only. A direction is a sum of classes. In all products the two factors belong to different groups, so rewards
that estimate the gradient never select the rollouts of the direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.records import Floats

CLASSES = ("correct", "incorrect")
"""Of rollouts, by their reward; a distillation gradient is kept for each."""


@dataclass(frozen=True)
class UpdateGram:
    """Inner products of the gradients of ``F`` groups of questions, ``K`` teachers and ``C`` classes.

    Attributes:
        teachers: ``K`` names.
        questions: ``(F,)``, how many questions each group has.
        tokens: ``(F, C)``, how many response tokens the directions are sums of.
        success: ``(F, F)``, of the groups' success gradients.
        cross: ``(F, F, K, C)``, of success gradients (first axis) and directions (second axis).
        directions: ``(F, F, K, C, C)``, of the directions of one teacher.
        between: ``(F, F, K, K)``, of the directions of two teachers, all classes together.
    """

    teachers: tuple[str, ...]
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


def gram_of_rows(
    teachers: Sequence[str], questions: Floats, tokens: Floats, success: Floats, directions: Floats
) -> UpdateGram:
    """Gram matrix of explicit gradients.

    Args:
        teachers: ``K`` names.
        questions: ``(F,)``.
        tokens: ``(F, C)``.
        success: ``(F, P)``, summed over each group's questions.
        directions: ``(F, K, C, P)``.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> success, directions = rng.normal(size=(3, 5)), rng.normal(size=(3, 1, 2, 5))
        >>> gram = gram_of_rows(["a"], np.ones(3), np.ones((3, 2)), success, directions)
        >>> gram.cross.shape
        (3, 3, 1, 2)
    """
    whole = directions.sum(axis=2)  # (F, K, P)
    return UpdateGram(
        tuple(teachers),
        np.asarray(questions, float),
        np.asarray(tokens, float),
        success @ success.T,
        np.einsum("fp,hkcp->fhkc", success, directions, optimize=True),
        np.einsum("fkcp,hkdp->fhkcd", directions, directions, optimize=True),
        np.einsum("fkp,hlp->fhkl", whole, whole, optimize=True),
    )


def update_gain_estimator(gram: UpdateGram, teacher: int, classes: Sequence[float] = (1.0, 1.0)) -> Estimator:
    r"""Update gain: mean over questions of the gain along the direction of the other groups.

    .. math:: U = \frac{1}{N} \sum_f \frac{\langle g_f, D_{-f} \rangle}{\|D_{-f}\|}

    The jackknife leaves a group out of both: of the gradients and of the direction, which is summed anew. So its
    interval counts both noises.

    Args:
        gram: The record.
        teacher: Index of the teacher.
        classes: ``C`` weights of the classes in the direction.
    """
    weights = np.asarray(classes, float)
    cross = _without_own(np.einsum("fhc,c->fh", gram.cross[:, :, teacher], weights))
    products = np.einsum("fhcd,c,d->fh", gram.directions[:, :, teacher], weights, weights)

    def figure(chosen: Floats) -> Floats:
        inner = np.einsum("...f,fh,...h->...f", chosen, cross, chosen)
        norms = _norms_without_own(products, chosen)
        gains = np.divide(inner, norms, out=np.full(inner.shape, np.nan), where=norms > 0)
        gains = np.where(chosen > 0, gains, 0.0)
        count = chosen @ gram.questions
        result: Floats = gains.sum(axis=-1) / np.where(count > 0, count, np.nan)
        return result

    used = gram.tokens @ np.abs(weights) > 0
    withheld = "" if gram.groups > 1 else "one question"
    if not withheld and int(used.sum()) < 2:
        withheld = "too few rollouts of this class"
    tokens = int((gram.tokens * (weights != 0)).sum())
    return Estimator(figure, np.ones(gram.groups, bool), tokens, withheld=withheld)


def contribution_estimator(gram: UpdateGram, teacher: int, classes: Sequence[float]) -> Estimator:
    r"""Part of the update's gain that comes from some classes; parts of all classes add up.

    .. math:: C_c = \frac{\sum_h \langle \bar g_{-h}, D_{h,c} \rangle}{\|D\|}

    with :math:`\bar g_{-h}` the mean success gradient of the questions of the other groups, and :math:`D` the
    direction of all classes and groups. The whole is the update gain up to the norm, which here includes all groups.

    Args:
        gram: The record.
        teacher: Index of the teacher.
        classes: ``C`` weights: 1 for the classes that are meant.
    """
    weights = np.asarray(classes, float)
    cross = _without_own(np.einsum("fhc,c->fh", gram.cross[:, :, teacher], weights))
    products = gram.directions[:, :, teacher].sum(axis=(2, 3))

    def figure(chosen: Floats) -> Floats:
        others = (chosen @ gram.questions)[..., None] - chosen * gram.questions
        means = np.einsum("...f,fh->...h", chosen, cross) / np.where(others > 0, others, np.nan)
        norm = np.sqrt(np.einsum("...f,fh,...h->...", chosen, products, chosen).clip(min=0))
        total = np.where(chosen > 0, means * chosen, 0.0).sum(axis=-1)
        result: Floats = np.divide(total, norm, out=np.full(total.shape, np.nan), where=norm > 0)
        return result

    return Estimator(
        figure,
        np.ones(gram.groups, bool),
        int((gram.tokens * (weights != 0)).sum()),
        withheld="" if gram.groups > 1 else "one question",
    )


def step_alignment_estimator(gram: UpdateGram, teacher: int, classes: Sequence[float] = (1.0, 1.0)) -> Estimator:
    r"""Cosine of the update and the success gradient, :math:`U / \|\nabla J\|`.

    The squared norm is estimated without bias by products of different groups. Where that estimate is not positive,
    the alignment is withheld.

    Args:
        gram: The record.
        teacher: Index of the teacher.
        classes: ``C`` weights of the classes in the direction.
    """
    gain = update_gain_estimator(gram, teacher, classes)
    cross = _without_own(gram.success)

    def figure(chosen: Floats) -> Floats:
        total = chosen @ gram.questions
        pairs = total**2 - (chosen**2) @ (gram.questions**2)
        square = np.einsum("...f,fh,...h->...", chosen, cross, chosen) / np.where(pairs > 0, pairs, np.nan)
        norm = np.sqrt(np.where(square > 0, square, np.nan))
        result: Floats = gain.statistic(chosen) / norm
        return result

    return Estimator(figure, gain.questions, gain.nodes, withheld=gain.withheld, bounds=(-1.0, 1.0))


def direction_cosine(gram: UpdateGram, first: int, second: int) -> float:
    """Cosine of the summed directions of two teachers; NaN where one of them is zero."""
    inner, left, right = (
        gram.between[:, :, a, b].sum() for a, b in ((first, second), (first, first), (second, second))
    )
    return float(inner / np.sqrt(left * right)) if left > 0 and right > 0 else float("nan")


def _without_own(matrix: Floats) -> Floats:
    """The matrix with a diagonal of zeros."""
    return matrix - np.diag(np.diag(matrix))


def _norms_without_own(products: Floats, chosen: Floats) -> Floats:
    """Norm of the sum of all chosen directions but the own one, ``(..., F)``."""
    sums = np.einsum("fh,...h->...f", products, chosen)
    total = np.einsum("...f,...f->...", chosen, sums)[..., None]
    squares = total - 2 * chosen * sums + chosen**2 * np.diag(products)
    # What is left of a difference of equal numbers is rounding.
    floor = 1e-12 * np.abs(total).max(axis=-1, keepdims=True)
    return np.sqrt(np.where(squares > floor, squares, 0.0))
