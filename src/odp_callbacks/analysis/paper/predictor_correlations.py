"""Spearman correlations of the score with depth and with figures of the two policies, within a path."""

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.paper.prefix_tree import Integers
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes
from odp_callbacks.records import Floats

MINIMUM_NODES = 3
"""A path with fewer scored nodes has no correlation."""


def path_correlations(nodes: ScoredNodes, confidence: float = 0.95) -> dict[tuple[str, str], Estimate]:
    """Spearman correlation of the score with each predictor within a path, averaged over paths.

    Predictors are the depth and, over the whole vocabulary, ``kl`` (KL(student‖teacher), the paper's "forward KL" and
    everybody else's reverse KL), ``js``, ``l2`` and ``policy_cosine``, the cosine of the two policies.
    Source: arXiv:2605.10889; its correlations are averaged over paths and carry no interval. The interval is ours, a
    jackknife over questions.

    Args:
        nodes: Scored nodes.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        Estimates by (teacher, predictor), and by ``("all", predictor)`` for the mean over the teachers' paths. A path
        counts if at least three of its nodes have a score and neither column is constant.
    """
    predictors = {"depth": np.repeat(nodes.depth[:, None].astype(float), len(nodes.teachers), axis=1)}
    predictors.update(nodes.predictors)
    _, rows, path = np.unique(nodes.path, return_index=True, return_inverse=True)
    members = [np.flatnonzero(path.reshape(-1) == number) for number in range(len(rows))]
    estimates = {}
    for name, column in predictors.items():
        table = np.full((len(rows), len(nodes.teachers)), np.nan)  # (P, K)
        for path_index, of_path in enumerate(members):
            for teacher_index in range(len(nodes.teachers)):
                table[path_index, teacher_index] = spearman(
                    nodes.cosine[of_path, teacher_index], column[of_path, teacher_index]
                )
        for teacher_index, teacher in enumerate(nodes.teachers):
            chosen = table[:, teacher_index : teacher_index + 1]
            estimates[teacher, name] = _mean_over_paths(chosen, nodes.question[rows], len(nodes), confidence)
        estimates["all", name] = _mean_over_paths(table, nodes.question[rows], len(nodes), confidence)
    return estimates


def spearman(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation, with mean ranks for equal values.

    Args:
        first: ``(N,)``; pairs with a NaN do not count.
        second: ``(N,)``.

    Returns:
        In [-1, 1]; NaN with fewer than :data:`MINIMUM_NODES` pairs, or where one of the two does not vary.

    Examples:
        >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0])), 6)
        1.0
    """
    defined = np.isfinite(first) & np.isfinite(second)
    if defined.sum() < MINIMUM_NODES:
        return float("nan")
    ranks = [_mean_ranks(values[defined]) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    spread = float(np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1])))
    return float(centred[0] @ centred[1] / spread) if spread > 0 else float("nan")


def _mean_ranks(values: Floats) -> Floats:
    """Ranks from 1 on; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    ranks: Floats = (last - (count - 1) / 2)[place.reshape(-1)]
    return ranks


def _mean_over_paths(table: Floats, question: Integers, nodes: int, confidence: float) -> Estimate:
    """The mean of correlations ``(P, K)``, where every one counts once, with an interval over questions."""
    defined = np.isfinite(table)
    questions, place = np.unique(question, return_inverse=True)
    sums, counts = np.zeros(len(questions)), np.zeros(len(questions))
    np.add.at(sums, place.reshape(-1), np.where(defined, table, 0.0).sum(axis=1))
    np.add.at(counts, place.reshape(-1), defined.sum(axis=1).astype(float))
    present = counts > 0
    estimator = Estimator(
        lambda weights: np.asarray((weights @ sums) / (weights @ counts)),
        present,
        nodes if present.any() else 0,
        bounds=(-1.0, 1.0),
    )
    return jackknife(estimator, confidence)
