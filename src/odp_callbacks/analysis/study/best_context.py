"""Whether one context is best for all students and tasks."""

from collections.abc import Sequence

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.study.figures import (
    ALL_TEACHERS,
    NOT_MEASURED,
    CellSummary,
    FigureKey,
    StudyFigure,
    combination,
    is_control,
    study_estimate,
)
from odp_callbacks.analysis.study.findings import BELOW_0, Finding, figure

SCORES = {"paper": "cosine", "update": "update_gain", "nodes": "predicted_gain"}
NO_BEST_CONTEXT = Finding(
    "no-best-context",
    "No context is best for every student and task.",
    "teachers",
    "another in each of its four",
    BELOW_0,
    {measurement: figure(score) for measurement, score in SCORES.items()},
)
"""Its contrast is the lead of the best context: the smallest difference, over cells and other contexts, by which the
context with the largest such difference is ahead. It is negative if every context is behind another somewhere."""


def best_context_lead(cells: Sequence[CellSummary], measurement: str, confidence: float = 0.95) -> Estimate:
    r"""The lead :math:`\max_c \min_{cell, other} (score_c - score_{other})`, with its interval.

    The lead never falls when a difference rises. So if all differences lie in their intervals, the lead lies between
    that of the lower ends and that of the upper ends. The intervals are made to hold together (Bonferroni).

    Args:
        cells: Summaries of cells; contexts that a cell lacks are left out of all.
        measurement: A key of :data:`SCORES`.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The lead; NaN with fewer than two cells or two contexts.
    """
    measured = [cell for cell in cells if cell.measurement == measurement]
    score = SCORES[measurement]
    tables = [_scores(cell, score) for cell in measured]
    contexts = [name for name in (tables[0] if tables else ()) if all(name in table for table in tables)]
    if len(measured) < 2 or len(contexts) < 2:
        return NOT_MEASURED
    comparisons = len(measured) * len(contexts) * (len(contexts) - 1) // 2
    level = 1 - (1 - confidence) / comparisons
    ends = np.full((3, len(contexts), len(contexts), len(measured)), np.inf)
    questions = 0
    for place, table in enumerate(tables):
        for first, name in enumerate(contexts):
            for second, other in enumerate(contexts):
                if first != second:
                    one = study_estimate(combination([(1.0, table[name]), (-1.0, table[other])]), level)
                    ends[:, first, second, place] = one.low, one.value, one.high
                    questions = max(questions, one.questions)
    low, value, high = (float(end.min(axis=(1, 2)).max()) for end in ends)
    return Estimate(value, low, high, questions, 0)


def _scores(cell: CellSummary, score: str) -> dict[str, StudyFigure]:
    return {
        teacher: cell.figures[key]
        for teacher in cell.teachers
        if not is_control(teacher) and teacher != ALL_TEACHERS and (key := FigureKey(score, teacher)) in cell.figures
    }
