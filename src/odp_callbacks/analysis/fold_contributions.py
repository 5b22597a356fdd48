r"""What some tokens contribute to an update, with an interval from the folds of questions.

A token's influence is measured along the success gradients of a few folds of questions. Summed over the tokens of each
fold, influences make a matrix of folds of gradients by folds of tokens. The contribution is a sum over its entries off
the diagonal; the jackknife leaves a fold out of both, the gradients and the tokens. Of four folds it has three degrees
of freedom, so the interval is about twice as wide as one from single questions would be.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.update_gain import withheld_because
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.update_records import TokenInfluence


def contribution_of_tokens(
    report: ProbeReport, starts: NDArray[np.int64], chosen: NDArray[np.bool_], confidence: float = 0.95
) -> tuple[Estimate, ...]:
    """Contribution of some tokens to the update of each teacher.

    Args:
        report: A probe's report.
        starts: ``(R + 1,)``, index of the first token of each rollout among all tokens of the report.
        chosen: ``(T,)``, which of the report's tokens are meant.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        One estimate for each teacher. Its interval is NaN with fewer than three folds.
    """
    measured = [(update.gram, update.influence) for update in report.updates if update.influence is not None]
    grams, influences = [gram for gram, _ in measured], [influence for _, influence in measured]
    weights = [chosen[starts[influence.rollout] + influence.depth].astype(float) for influence in influences]
    tokens = sum(int(of_update.sum()) for of_update in weights)
    questions = sum(int(gram.questions.sum()) for gram in grams)
    folds = np.ones(sum(len(influence.fold_questions) for influence in influences), bool)
    estimates = []
    for teacher in range(len(report.teachers)):
        statistic = contribution_statistic(influences, weights, teacher)
        estimator = Estimator(statistic, folds, tokens, withheld=withheld_because(grams, teacher))
        estimates.append(replace(jackknife(estimator, confidence), questions=questions))
    return tuple(estimates)


def contribution_statistic(
    influences: Sequence[TokenInfluence], weights: Sequence[Floats], teacher: int
) -> Callable[[Floats], Floats]:
    r"""What weighted tokens contribute to the update of a teacher, as a function of the folds that count.

    .. math:: C_w = \frac{1}{\|D\|} \sum_t w_t \langle \bar g_{-t}, J_t^\top d_t \rangle

    with :math:`\bar g_{-t}` the mean success gradient of the folds that do not hold the token's question. The norm
    stays that of all folds, so what is left without a fold is scaled up to as many questions.

    Args:
        influences: One for each measurement, whose contributions are averaged by their questions.
        weights: For each measurement ``(N,)``, one for each of its tokens.
        teacher: Index of the teacher.

    Returns:
        Maps fold weights ``(..., S)``, those of one measurement after the other, to contributions ``(...)``.
    """
    sums = [_fold_sums(*one, teacher) for one in zip(influences, weights, strict=True)]
    edges = np.cumsum([len(of_measurement) for of_measurement in sums])[:-1]

    def statistic(chosen: Floats) -> Floats:
        total, weight = np.zeros(chosen.shape[:-1]), np.zeros(chosen.shape[:-1])
        for influence, products, part in zip(influences, sums, np.split(chosen, edges, axis=-1), strict=True):
            questions, norm = influence.fold_questions, float(influence.direction_norm[teacher])
            counted = (part @ questions)[..., None]  # (..., 1)
            others = counted - part * questions
            means = (part @ products) / np.where(others > 0, others, np.nan)
            value = np.where(part > 0, part * means, 0.0).sum(axis=-1)
            value = value * questions.sum() / counted[..., 0] / (norm if norm > 0 else np.nan)
            usable = np.isfinite(value)
            total = total + np.where(usable, value * questions.sum(), 0.0)
            weight = weight + np.where(usable, questions.sum(), 0.0)
        mean: Floats = total / np.where(weight > 0, weight, np.nan)
        return mean

    return statistic


def _fold_sums(influence: TokenInfluence, weights: Floats, teacher: int) -> Floats:
    """Each fold's summed success gradient times the weighted tokens of each fold, ``(S, S)``; 0 on the diagonal."""
    folds = len(influence.fold_questions)
    by_fold = influence.by_fold[:, :, teacher].astype(float)  # (S, N)
    own_fold = np.isnan(by_fold).argmax(axis=0)
    sums = np.zeros((folds, folds))
    np.add.at(sums.T, own_fold, (np.nan_to_num(by_fold) * weights).T)
    return sums * influence.fold_questions[:, None]
