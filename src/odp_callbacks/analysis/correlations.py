r"""Rank correlations of what a probe measures at a token with its cheap predictors.

All are Spearman's over the tokens of all responses together: a node counts as many times as it stands for tokens.
arXiv:2605.10889 averages correlations within a path; those are in
:mod:`~odp_callbacks.analysis.paper.predictor_correlations`.

Noise in what is measured pulls a correlation towards 0, more so in a short probe. The intervals are jackknives.
Alignment and gain of a node come from its own continuations, so each question is left out in turn. Influences of all
tokens share a few success gradients, so a fold of questions is left out of both: of the tokens and of the gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import ALIGNMENT_BOUNDS, undefined_figure
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.analysis.node_estimates import DEFINED, statuses
from odp_callbacks.analysis.predictors import NODE_PREDICTORS, TOKEN_PREDICTORS, node_predictor, token_predictors
from odp_callbacks.analysis.rank_correlation import RankedColumn, rank_correlation
from odp_callbacks.analysis.update_gain import withheld_because
from odp_callbacks.records import Floats, ProbeReport

TARGETS = ("alignment", "predicted_gain", "influence")
"""What is predicted: of a node its alignment or predicted gain with a teacher, of a token its influence."""
MINIMUM_TOKENS = 10
"""Tokens that must differ from the most frequent value in both columns. The ranks of fewer hardly change when some are
left out, so that an interval would be too short. Many nodes have a gain of exactly 0."""
FEW_TOKENS = "few tokens"
NO_DIFFERENCE = "no difference"
"""Why there is no correlation: too few tokens, or one of the two is the same everywhere."""
Correlations = dict[tuple[str, str], Estimate]
"""By teacher and predictor."""


def correlations(report: ProbeReport, confidence: float = 0.95, target: str = "alignment") -> Correlations:
    """Spearman correlation of a target with each predictor.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1); they are clustered by question.
        target: ``"alignment"`` or ``"predicted_gain"`` of nodes, or ``"influence"`` of tokens.

    Returns:
        Correlations by (teacher, predictor), for the predictors that any token has; empty if the target was not
        measured. NaN where fewer than :data:`MINIMUM_TOKENS` tokens differ from the others.

    Raises:
        ValueError: If ``target`` is none of these or ``confidence`` is not in (0, 1).
    """
    if target not in TARGETS:
        raise ValueError(f"`target` must be one of {TARGETS}, but {target!r} was given.")
    check_confidence(confidence)
    if target == "influence":
        return _with_influence(report, confidence)
    return _of_nodes(report, confidence, target)


def measured_targets(report: ProbeReport) -> tuple[str, ...]:
    """Those of :data:`TARGETS` that a report has."""
    has_influence = any(update.influence is not None for update in report.updates)
    return (*(TARGETS[:2] if report.nodes else ()), *(TARGETS[2:] if has_influence else ()))


def _of_nodes(report: ProbeReport, confidence: float, target: str) -> Correlations:
    evidence = gather(report.nodes, teachers=len(report.teachers))
    values, weight = _node_target(evidence, target)
    estimates = {}
    for name in NODE_PREDICTORS:
        predictor = node_predictor(report, name)
        if report.nodes and np.isnan(predictor).all():
            continue
        for index, teacher in enumerate(report.teachers):
            columns = predictor[:, index], values[:, index]
            usable = (weight[:, index] > 0) & np.isfinite(columns[0]) & np.isfinite(columns[1])
            estimator = _over_questions(*columns, weight[:, index], evidence.question, usable)
            estimates[teacher, name] = jackknife(estimator, confidence)
    return estimates


def _node_target(evidence: Evidence, target: str) -> tuple[Floats, Floats]:
    """What is predicted at nodes, and how many tokens each stands for, ``(N, K)`` each."""
    stands_for = (evidence.token_weight * evidence.gradient_weight)[:, None]
    if target == "alignment":
        return evidence.cosine, np.where(statuses(evidence) == DEFINED, stands_for, 0.0)
    # Where the outcomes agree nothing is gained: that is known without gradients.
    differs = evidence.differs[:, None]
    weight = np.where(differs, stands_for, evidence.token_weight[:, None])
    return np.where(differs, evidence.gain, 0.0), np.broadcast_to(weight, evidence.gain.shape)


def _over_questions(
    first: Floats, second: Floats, weight: Floats, question: NDArray[np.int64], usable: NDArray[np.bool_]
) -> Estimator:
    """The correlation of two columns ``(N,)`` over the usable nodes, as a function of the questions that count."""
    question_count, nodes = int(question.max(initial=-1)) + 1, int(usable.sum())
    first, second, weight, question = first[usable], second[usable], weight[usable], question[usable]
    present = np.bincount(question, minlength=question_count) > 0
    if withheld := _withheld_because(first, second):
        return Estimator(undefined_figure, present, nodes, withheld=withheld if nodes else "")
    ranked = RankedColumn(first), RankedColumn(second)
    statistic = _row_by_row(lambda counts: rank_correlation(*ranked, weight * counts[question]))
    return Estimator(statistic, present, nodes, bounds=ALIGNMENT_BOUNDS)


def _with_influence(report: ProbeReport, confidence: float) -> Correlations:
    measured = [(update.gram, update.influence) for update in report.updates if update.influence is not None]
    if not measured:
        return {}
    folds = _FoldInfluences(report)
    questions = sum(int(gram.questions.sum()) for gram, _ in measured)
    predictors = token_predictors(report)
    estimates = {}
    for index, teacher in enumerate(report.teachers):
        withheld = withheld_because([gram for gram, _ in measured], index)
        for name in TOKEN_PREDICTORS:
            column = predictors[name][folds.places, index]
            if np.isnan(predictors[name]).all():
                continue
            estimator = folds.estimator(column, index, withheld)
            estimates[teacher, name] = replace(jackknife(estimator, confidence), questions=questions)
    return estimates


class _FoldInfluences:
    """Influences of ``N`` tokens as a function of the ``S`` folds of questions that count, of all measurements.

    Attributes:
        places: ``(N,)``, index of each token among all response tokens of the report.
    """

    def __init__(self, report: ProbeReport) -> None:
        influences = [update.influence for update in report.updates if update.influence is not None]
        starts = np.concatenate([[0], np.cumsum([len(rollout.pieces) for rollout in report.rollouts])]).astype(np.int64)
        self.places = np.concatenate([starts[one.rollout] + one.depth for one in influences])
        self._fold_count = sum(len(one.fold_questions) for one in influences)
        tokens, teachers = len(self.places), len(report.teachers)
        # A token has products with the folds of its own measurement, but for the fold that holds its question.
        self._products = np.full((self._fold_count, tokens, teachers), np.nan, np.float32)
        self._own_fold = np.zeros(tokens, np.int64)
        self._questions = np.concatenate([one.fold_questions for one in influences])
        self._order: dict[tuple[int, bytes], tuple[RankedColumn, NDArray[np.bool_]]] = {}
        first_fold = first_token = 0
        for one in influences:
            folds, its_tokens = one.by_fold.shape[:2]
            norm = np.where(one.direction_norm > 0, one.direction_norm, np.nan)
            of_folds, of_tokens = slice(first_fold, first_fold + folds), slice(first_token, first_token + its_tokens)
            self._products[of_folds, of_tokens] = one.by_fold / norm
            self._own_fold[of_tokens] = first_fold + np.isnan(one.by_fold).all(axis=2).argmax(axis=0)
            first_fold, first_token = first_fold + folds, first_token + its_tokens

    def estimator(self, predictor: Floats, teacher: int, withheld: str) -> Estimator:
        """The correlation of a teacher's influences with a predictor ``(N,)``."""
        known = np.isfinite(predictor)
        folds, tokens = np.ones(self._fold_count, bool), int(known.sum())
        withheld = withheld or _withheld_because(predictor[known])
        column = RankedColumn(np.where(known, predictor, 0.0))

        def correlation(counts: Floats) -> float:
            influence, is_finite = self._ranked(counts, teacher)
            return rank_correlation(column, influence, known * is_finite * counts[self._own_fold])

        return Estimator(_row_by_row(correlation), folds, tokens, withheld=withheld, bounds=ALIGNMENT_BOUNDS)

    def _ranked(self, counts: Floats, teacher: int) -> tuple[RankedColumn, NDArray[np.bool_]]:
        """The influences in their order, and which of them exist: the same for every predictor."""
        key = teacher, counts.tobytes()
        if key not in self._order:
            influence = self._mean(counts, teacher)
            self._order[key] = RankedColumn(np.nan_to_num(influence)), np.isfinite(influence)
        return self._order[key]

    def _mean(self, counts: Floats, teacher: int) -> Floats:
        """Mean of the products with the folds that count, ``(N,)``; NaN where none is left."""
        products = self._products[:, :, teacher].astype(float)
        weight = np.where(np.isnan(products), 0.0, (counts * self._questions)[:, None])
        total = weight.sum(axis=0)
        mean: Floats = (weight * np.nan_to_num(products)).sum(axis=0) / np.where(total > 0, total, np.nan)
        return mean


def _withheld_because(*columns: Floats) -> str:
    """Why columns ``(N,)`` have no correlation; empty if they may have one."""
    differing = [len(column) - int(np.unique(column, return_counts=True)[1].max(initial=0)) for column in columns]
    if len(columns[0]) >= MINIMUM_TOKENS and min(differing) == 0:
        return NO_DIFFERENCE
    return FEW_TOKENS if min(differing) < MINIMUM_TOKENS else ""


def _row_by_row(statistic: Callable[[Floats], float]) -> Callable[[Floats], Floats]:
    """A function of one row of weights ``(m,)``, as a function of any number of rows ``(..., m)``."""

    def of_rows(weights: Floats) -> Floats:
        rows: Sequence[Floats] = list(weights.reshape(-1, weights.shape[-1]))
        return np.array([statistic(row) for row in rows]).reshape(weights.shape[:-1])

    return of_rows
