"""The paper's aggregates: means along a path, over the paths of a question, and over questions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes
from odp_callbacks.records import Floats

FIGURES = ("cosine", "positive", "weighted_cosine", "advantage")
"""Mean cosine, fraction of positive cosines, cosine weighted by the success-rate range, and teacher advantage."""
CLASSES = ("all", "correct", "incorrect")
BOUNDS = {"cosine": (-1.0, 1.0), "positive": (0.0, 1.0), "weighted_cosine": (-1.0, 1.0), "advantage": (-1.0, 1.0)}
"""The smallest and the largest value of each figure."""


@dataclass(frozen=True)
class TeacherFigures:
    """The figures of one teacher on one class of paths.

    Attributes:
        teacher: Its name.
        paths: ``"all"``, ``"correct"`` or ``"incorrect"``.
        cosine: Mean cosine, the paper's score.
        positive: Fraction of the cosines that are positive.
        weighted_cosine: Cosine weighted by the range of the success rates over S_u.
        advantage: The paper's teacher advantage.
    """

    teacher: str
    paths: str
    cosine: Estimate
    positive: Estimate
    weighted_cosine: Estimate
    advantage: Estimate


@dataclass(frozen=True)
class ClassDifference:
    """Incorrect minus correct paths, the paper's headline, in one figure averaged over teachers.

    Attributes:
        difference: With its interval, over the questions that have both classes.
        p_value: Two-sided, of Student's t of the questions' differences; NaN with fewer than two questions.
    """

    difference: Estimate
    p_value: float


def path_means(nodes: ScoredNodes, figure: str) -> tuple[NDArray[np.int64], Floats]:
    """The mean of a figure along each path.

    Args:
        nodes: Scored nodes.
        figure: One of :data:`FIGURES`.

    Returns:
        For each of ``P`` paths with a scored node the index of its first row in ``nodes``, and the means ``(P, K)``;
        NaN where the figure is undefined at every node.
    """
    values = nodes.advantage if figure == "advantage" else nodes.cosine
    defined = np.isfinite(nodes.cosine) if figure != "advantage" else np.ones_like(values, dtype=bool)
    if figure == "positive":
        values = (values > 0).astype(float)
    weights = (
        nodes.success_range[:, None] * np.ones_like(values) if figure == "weighted_cosine" else np.ones_like(values)
    )
    weights = np.where(defined, weights, 0.0)
    _, rows, path = np.unique(nodes.path, return_index=True, return_inverse=True)
    return rows, _grouped_means(np.where(defined, values, 0.0), weights, path, len(rows))


def question_means(nodes: ScoredNodes, figure: str) -> tuple[NDArray[np.int64], Floats]:
    """The mean of :func:`path_means` over the paths of each question.

    Returns:
        The questions, ``(Q,)``, and their means ``(Q, K)``.
    """
    rows, means = path_means(nodes, figure)
    questions, question = np.unique(nodes.question[rows], return_inverse=True)
    defined = np.isfinite(means)
    return questions, _grouped_means(np.where(defined, means, 0.0), defined.astype(float), question, len(questions))


def of_class(nodes: ScoredNodes, paths: str) -> ScoredNodes:
    """The nodes on all, on correct or on incorrect paths."""
    if paths not in CLASSES:
        raise ValueError(f"`paths` must be one of {list(CLASSES)}, but {paths!r} was given.")
    return nodes if paths == "all" else nodes.select(nodes.correct == (paths == "correct"))


def teacher_figures(nodes: ScoredNodes, confidence: float = 0.95) -> list[TeacherFigures]:
    """The figures of every teacher on all, correct and incorrect paths.

    Each is a mean over questions of the mean over a question's paths of the mean along a path. Intervals are Student's
    t over questions; the paper gives 95 % intervals over questions and does not say how they are computed.

    Args:
        nodes: Scored nodes.
        confidence: Level of the intervals, in (0, 1).
    """
    figures = []
    for teacher_index, teacher in enumerate(nodes.teachers):
        for paths in CLASSES:
            chosen = of_class(nodes, paths)
            estimates = {
                figure: mean_over_questions(
                    question_means(chosen, figure)[1][:, teacher_index], len(chosen), confidence, BOUNDS[figure]
                )
                for figure in FIGURES
            }
            figures.append(TeacherFigures(teacher, paths, **estimates))
    return figures


def class_gaps(nodes: ScoredNodes, figure: str = "cosine") -> dict[int, float]:
    """Incorrect minus correct paths of each question that has both, averaged over teachers.

    Args:
        nodes: Scored nodes.
        figure: One of :data:`FIGURES`.

    Returns:
        The differences by the index of the question.
    """
    of_question: list[dict[int, float]] = []
    for paths in ("incorrect", "correct"):
        questions, means = question_means(of_class(nodes, paths), figure)
        counts = np.isfinite(means).sum(axis=1)
        sums = np.nansum(means, axis=1)
        of_question.append({int(q): s / n for q, s, n in zip(questions, sums, counts, strict=True) if n})
    incorrect, correct = of_question
    return {question: incorrect[question] - correct[question] for question in sorted(incorrect.keys() & correct.keys())}


def class_difference(nodes: ScoredNodes, figure: str = "cosine", confidence: float = 0.95) -> ClassDifference:
    """Incorrect minus correct paths in a figure, averaged over teachers, with the p-value of a paired t-test.

    Args:
        nodes: Scored nodes.
        figure: One of :data:`FIGURES`.
        confidence: Level of the interval, in (0, 1).
    """
    differences = np.array(list(class_gaps(nodes, figure).values()))
    return ClassDifference(mean_over_questions(differences, len(nodes), confidence), _t_test(differences))


def class_difference_change(
    nodes: ScoredNodes, without: ScoredNodes, figure: str = "cosine", confidence: float = 0.95
) -> Estimate:
    """What a way of counting adds to "incorrect minus correct", paired by question.

    Args:
        nodes: Scored nodes under it.
        without: Scored nodes of the same record without it; they need not be the same nodes.
        figure: One of :data:`FIGURES`.
        confidence: Level of the interval, in (0, 1).
    """
    gaps, others = class_gaps(nodes, figure), class_gaps(without, figure)
    changes = [gaps[question] - others[question] for question in gaps if question in others]
    return mean_over_questions(np.array(changes, dtype=float), len(nodes), confidence)


def mean_over_questions(
    values: Floats, nodes: int, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> Estimate:
    """The mean over questions with the interval of Student's t, which is what the jackknife gives for a mean.

    Args:
        values: ``(Q,)``, one number for each question; NaN where it is undefined.
        nodes: Number of nodes behind them.
        confidence: Level of the interval, in (0, 1).
        bounds: The smallest and the largest possible value, to which the interval is cut.

    Examples:
        >>> estimate = mean_over_questions(np.array([0.0, 1.0, 2.0, np.nan]), nodes=9)
        >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2), estimate.questions
        (1.0, -1.48, 3.48, 3)
    """
    finite = values[np.isfinite(values)]
    estimator = Estimator(
        lambda weights: np.asarray(weights @ finite / weights.sum(axis=-1)),
        np.ones(len(finite), dtype=bool),
        nodes,
        bounds=bounds,
    )
    return jackknife(estimator, confidence)


def _grouped_means(values: Floats, weights: Floats, group: NDArray[np.int64], count: int) -> Floats:
    """Weighted means of the rows of each group, ``(count, K)``; NaN where all weights are 0."""
    totals, sums = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(totals, group.reshape(-1), weights)
    np.add.at(sums, group.reshape(-1), weights * values)
    with np.errstate(invalid="ignore"):
        means: Floats = sums / totals
    return means


def _t_test(differences: Floats) -> float:
    """The two-sided p-value of the mean of differences."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return float("nan")
    from scipy import stats  # importing it takes most of a second

    count = len(differences)
    statistic = abs(differences.mean()) / (differences.std(ddof=1) / np.sqrt(count))
    return float(2 * stats.t.sf(statistic, count - 1))
