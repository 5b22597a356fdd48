"""Cells of a study with figures that are means of given values over questions."""

from collections.abc import Mapping

import numpy as np

from odp_callbacks.analysis.study.figures import CellSummary, FigureKey, StudyFigure

TEACHERS = ("Self-1C", "Self-1C1W", "control")


def mean_of(values: np.ndarray, task: str = "sums") -> StudyFigure:
    """The mean of values, one a question."""
    total, count = values.sum(), len(values)
    left_out = {f"{task}/{i}": float((total - value) / (count - 1)) for i, value in enumerate(values)}
    return StudyFigure(float(values.mean()), left_out)


def normal_mean(mean: float, deviation: float = 0.1, questions: int = 20, seed: int = 0, task: str = "sums"):
    """The mean of normal values, whose sample mean and deviation are exactly the given ones."""
    values = np.random.default_rng(seed).normal(size=questions)
    values = (values - values.mean()) / values.std(ddof=1)
    return mean_of(mean + deviation * values, task)


def cell_of(
    figures: Mapping[FigureKey, StudyFigure], measurement: str = "paper", student: str = "small", task: str = "sums"
) -> CellSummary:
    facts = {"rollouts": 80, "tokens": 1000, "left_out": {}, "scored_nodes": 9, "seconds": 1.0, "deviations": ["G = 8"]}
    return CellSummary(student, task, measurement, TEACHERS, 20, figures, facts)
