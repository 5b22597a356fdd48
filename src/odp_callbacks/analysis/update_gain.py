r"""Update gain and its contributions, from the Gram matrices of success gradients and distillation gradients.

Questions lie in groups, one question each as long as there are few. For every group there are the sum of its success
gradients :math:`g_f` and its distillation gradients :math:`D_{f,k,c}` (teacher k, class c), kept as inner products
only. A direction is a sum of classes. In all products the two factors belong to different groups, so rewards that
estimate the gradient never select the rollouts of the direction.

A report may hold several measurements (of several processes or steps), between which there are no inner products. A
figure is then the mean over measurements, weighted by their questions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.records import Floats
from odp_callbacks.update_records import UpdateGram

ALL_CLASSES = (1.0, 1.0)
Statistic = Callable[[Floats], Floats]


def update_gain(grams: Sequence[UpdateGram], teacher: int, classes: Sequence[float] = ALL_CLASSES) -> Estimator:
    r"""Update gain: mean over questions of the gain along the direction of the other groups.

    .. math:: U = \frac{1}{N} \sum_f \frac{\langle g_f, D_{-f} \rangle}{\|D_{-f}\|}

    The jackknife leaves a group out of both: of the gradients and of the direction, which is summed anew. So its
    interval counts both noises.

    Args:
        grams: One for each measurement.
        teacher: Index of the teacher.
        classes: ``C`` weights of the classes in the direction.
    """
    return _estimator(grams, classes, [_gain_statistic(gram, teacher, np.asarray(classes, float)) for gram in grams])


def update_contribution(grams: Sequence[UpdateGram], teacher: int, classes: Sequence[float]) -> Estimator:
    r"""Part of the update's gain that comes from some classes; the parts of all classes add up.

    .. math:: C_c = \frac{\sum_h \langle \bar g_{-h}, D_{h,c} \rangle}{\|D\|}

    with :math:`\bar g_{-h}` the mean success gradient of the questions of the other groups, and :math:`D` the
    direction of all classes and groups. The whole is the update gain up to the norm, which here includes all groups.

    Args:
        grams: One for each measurement.
        teacher: Index of the teacher.
        classes: ``C`` weights: 1 for the classes that are meant.
    """
    statistics = [_contribution_statistic(gram, teacher, np.asarray(classes, float)) for gram in grams]
    return _estimator(grams, classes, statistics)


def update_alignment(grams: Sequence[UpdateGram], teacher: int, classes: Sequence[float] = ALL_CLASSES) -> Estimator:
    r"""Cosine of the update and the success gradient, :math:`U / \|\nabla J\|`.

    The squared norm is estimated without bias by products of different groups. Where that estimate is not positive,
    the alignment is too noisy to be reported.

    Args:
        grams: One for each measurement.
        teacher: Index of the teacher.
        classes: ``C`` weights of the classes in the direction.
    """
    weights = np.asarray(classes, float)
    gains = [_gain_statistic(gram, teacher, weights) for gram in grams]
    squares = [_square_norm_statistic(gram) for gram in grams]
    gain, square = _pooled(grams, gains), _pooled(grams, squares)

    def statistic(chosen: Floats) -> Floats:
        square_norm = square(chosen)
        cosines: Floats = gain(chosen) / np.sqrt(np.where(square_norm > 0, square_norm, np.nan))
        return cosines

    return _estimator(grams, classes, [statistic], bounds=(-1.0, 1.0), pooled=True)


def direction_cosine(grams: Sequence[UpdateGram], first: int, second: int) -> float:
    """Cosine of the summed directions of two teachers; NaN where one of them is zero."""
    inner, left, right = (
        sum(float(gram.between[:, :, a, b].sum()) for gram in grams)
        for a, b in ((first, second), (first, first), (second, second))
    )
    return inner / np.sqrt(left * right) if left > 0 and right > 0 else float("nan")


def _estimator(
    grams: Sequence[UpdateGram],
    classes: Sequence[float],
    statistics: Sequence[Statistic],
    bounds: tuple[float, float] | None = None,
    *,
    pooled: bool = False,
) -> Estimator:
    groups = sum(gram.groups for gram in grams)
    tokens = [gram.tokens * (np.asarray(classes) != 0) for gram in grams]
    withheld = ""
    if not any(gram.groups > 1 for gram in grams):
        withheld = "one question"
    elif not any((of_gram.sum(axis=1) > 0).sum() > 1 for of_gram in tokens):
        withheld = "too few rollouts of this class"
    return Estimator(
        statistics[0] if pooled else _pooled(grams, statistics),
        np.ones(groups, bool),
        int(sum(of_gram.sum() for of_gram in tokens)),
        withheld=withheld,
        bounds=bounds,
        pairs=True,
    )


def _pooled(grams: Sequence[UpdateGram], statistics: Sequence[Statistic]) -> Statistic:
    """Mean of the measurements' statistics, weighted by the questions that count."""
    edges = np.cumsum([gram.groups for gram in grams])[:-1]

    def statistic(chosen: Floats) -> Floats:
        total, questions = np.zeros(chosen.shape[:-1]), np.zeros(chosen.shape[:-1])
        for gram, of_gram, part in zip(grams, statistics, np.split(chosen, edges, axis=-1), strict=True):
            value, count = of_gram(part), part @ gram.questions
            usable = np.isfinite(value)
            total = total + np.where(usable, value * count, 0.0)
            questions = questions + np.where(usable, count, 0.0)
        mean: Floats = total / np.where(questions > 0, questions, np.nan)
        return mean

    return statistic


def _gain_statistic(gram: UpdateGram, teacher: int, classes: Floats) -> Statistic:
    cross = _without_diagonal(np.einsum("fhc,c->fh", gram.cross[:, :, teacher], classes))
    products = np.einsum("fhcd,c,d->fh", gram.directions[:, :, teacher], classes, classes)

    def statistic(chosen: Floats) -> Floats:
        inner = chosen * (chosen @ cross.T)  # (..., F)
        norms = _norms_of_other_groups(products, chosen)
        gains = np.divide(inner, norms, out=np.full(inner.shape, np.nan), where=norms > 0)
        counted = np.where(chosen > 0, gains, 0.0).sum(axis=-1)
        questions = chosen @ gram.questions
        mean: Floats = counted / np.where(questions > 0, questions, np.nan)
        return mean

    return statistic


def _contribution_statistic(gram: UpdateGram, teacher: int, classes: Floats) -> Statistic:
    cross = _without_diagonal(np.einsum("fhc,c->fh", gram.cross[:, :, teacher], classes))
    products = gram.directions[:, :, teacher].sum(axis=(2, 3))

    def statistic(chosen: Floats) -> Floats:
        other_questions = (chosen @ gram.questions)[..., None] - chosen * gram.questions
        means = chosen @ cross / np.where(other_questions > 0, other_questions, np.nan)
        norm = np.sqrt(np.einsum("...f,...f->...", chosen, chosen @ products).clip(min=0))
        total = np.where(chosen > 0, means * chosen, 0.0).sum(axis=-1)
        return np.asarray(np.divide(total, norm, out=np.full(total.shape, np.nan), where=norm > 0))

    return statistic


def _square_norm_statistic(gram: UpdateGram) -> Statistic:
    cross = _without_diagonal(gram.success)

    def statistic(chosen: Floats) -> Floats:
        total = chosen @ gram.questions
        pairs = total**2 - (chosen**2) @ (gram.questions**2)
        products = np.einsum("...f,...f->...", chosen, chosen @ cross)
        return np.asarray(products / np.where(pairs > 0, pairs, np.nan))

    return statistic


def _without_diagonal(matrix: Floats) -> Floats:
    return matrix - np.diag(np.diag(matrix))


def _norms_of_other_groups(products: Floats, chosen: Floats) -> Floats:
    """Norm of the sum of the directions of all other chosen groups, ``(..., F)``."""
    sums = chosen @ products
    total = np.einsum("...f,...f->...", chosen, sums)[..., None]
    squares = total - 2 * chosen * sums + chosen**2 * np.diag(products)
    # The difference of two equal sums is rounding, not a direction.
    rounding = 1e-12 * np.maximum(np.abs(total), np.abs(np.diag(products)).max(initial=0.0))
    return np.sqrt(np.where(squares > rounding, squares, 0.0))
