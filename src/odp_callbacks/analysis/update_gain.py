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
ONE_QUESTION, FEW_ROLLOUTS = "one question", "too few rollouts of this class"
EQUAL_REWARDS, EQUAL_TEACHER = "equal rewards", "teacher equals student"
"""Why a figure is withheld: there is no other question; no other question has rollouts of the class; no reward of a
question differs from the others', so that every success gradient is zero; and the direction is zero or rounding."""
ROUNDING = 1e-4
"""Length of a direction, relative to that of the success gradients, up to which it is taken for rounding."""
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
    statistics = [_gain_statistic(gram, teacher, np.asarray(classes, float)) for gram in grams]
    return _estimator(grams, teacher, classes, statistics)


def update_contribution(grams: Sequence[UpdateGram], teacher: int, classes: Sequence[float]) -> Estimator:
    r"""Part of the update's gain that comes from some classes; the parts of all classes add up.

    .. math:: C_c = \frac{\sum_h \langle \bar g_{-h}, D_{h,c} \rangle}{\|D\|}

    with :math:`\bar g_{-h}` the mean success gradient of the questions of the other folds, and :math:`D` the direction
    of all classes and groups. Folds are those of the tokens' influences, whose sum this is. The whole differs from the
    update gain in two ways: the norm includes all groups, and the gradient leaves out a fold and not only a question.

    Args:
        grams: One for each measurement.
        teacher: Index of the teacher.
        classes: ``C`` weights: 1 for the classes that are meant.
    """
    statistics = [_contribution_statistic(gram, teacher, np.asarray(classes, float)) for gram in grams]
    return _estimator(grams, teacher, classes, statistics)


def module_contribution(grams: Sequence[UpdateGram], teacher: int, modules: Floats) -> Estimator:
    r"""Part of the update's gain that comes from the parameters of some LoRA modules; the parts of all add up.

    It is :func:`update_contribution` of all classes, with inner products on the parameters of these modules alone.

    Args:
        grams: One for each measurement; all with products by module, of the same modules.
        teacher: Index of the teacher.
        modules: ``(M,)`` weights: 1 for the modules that are meant.

    Raises:
        ValueError: If ``grams`` has no products by module.
    """
    statistics = []
    for gram in grams:
        if gram.modules is None:
            raise ValueError("`grams` has no products by module; measure again, with this release.")
        cross = gram.modules.cross[:, :, teacher] @ np.asarray(modules, float)
        statistics.append(_share_statistic(gram, teacher, cross))
    return _estimator(grams, teacher, ALL_CLASSES, statistics)


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

    return _estimator(grams, teacher, classes, [statistic], bounds=(-1.0, 1.0), pooled=True)


def direction_cosine(grams: Sequence[UpdateGram], first: int, second: int) -> float:
    """Cosine of the summed directions of two teachers; NaN where one of them is zero."""
    inner, left, right = (
        sum(float(gram.between[:, :, a, b].sum()) for gram in grams)
        for a, b in ((first, second), (first, first), (second, second))
    )
    return inner / np.sqrt(left * right) if left > 0 and right > 0 else float("nan")


def withheld_because(grams: Sequence[UpdateGram], teacher: int, classes: Sequence[float] = ALL_CLASSES) -> str:
    """Why no figure of an update exists, such as :data:`EQUAL_REWARDS`; empty if one does.

    Args:
        grams: One for each measurement.
        teacher: Index of the teacher.
        classes: ``C`` weights of the classes in the direction.
    """
    usable = [gram for gram in grams if gram.groups > 1]
    if not usable:
        return ONE_QUESTION
    success = sum(float(np.trace(gram.success)) for gram in usable)
    if success == 0:
        return EQUAL_REWARDS
    squares = sum(float(np.einsum("ffcc->", gram.directions[:, :, teacher])) for gram in usable)
    if squares <= ROUNDING**2 * success:
        return EQUAL_TEACHER
    tokens = [gram.tokens * (np.asarray(classes) != 0) for gram in usable]
    if not any((of_gram.sum(axis=1) > 0).sum() > 1 for of_gram in tokens):
        return FEW_ROLLOUTS
    return ""


def _estimator(
    grams: Sequence[UpdateGram],
    teacher: int,
    classes: Sequence[float],
    statistics: Sequence[Statistic],
    bounds: tuple[float, float] | None = None,
    *,
    pooled: bool = False,
) -> Estimator:
    groups = sum(gram.groups for gram in grams)
    tokens = [gram.tokens * (np.asarray(classes) != 0) for gram in grams]
    return Estimator(
        statistics[0] if pooled else _pooled(grams, statistics),
        np.ones(groups, bool),
        int(sum(of_gram.sum() for of_gram in tokens)),
        withheld=withheld_because(grams, teacher, classes),
        bounds=bounds,
        pairs=True,
        informative=_informative(grams, classes),
    )


def _informative(grams: Sequence[UpdateGram], classes: Sequence[float]) -> int:
    """How many groups tell something: the fewer of those with a success gradient and those with rollouts."""
    chosen = np.asarray(classes) != 0
    with_gradient = sum(int((np.diag(gram.success) > 0).sum()) for gram in grams)
    with_rollouts = sum(int((gram.tokens[:, chosen].sum(axis=1) > 0).sum()) for gram in grams)
    return min(with_gradient, with_rollouts)


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
    return _share_statistic(gram, teacher, np.einsum("fhc,c->fh", gram.cross[:, :, teacher], classes))


def _share_statistic(gram: UpdateGram, teacher: int, cross: Floats) -> Statistic:
    """Mean success gradients times parts of directions, ``(F, F)``, over the norm of the whole direction."""
    folds = np.arange(gram.groups) if gram.folds is None else gram.folds
    same_fold = folds[:, None] == folds
    cross = np.where(same_fold, 0.0, cross)
    products = gram.directions[:, :, teacher].sum(axis=(2, 3))

    def statistic(chosen: Floats) -> Floats:
        counted = chosen * gram.questions
        other_questions = counted.sum(axis=-1, keepdims=True) - counted @ same_fold
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
