"""Figures of a study, which know what they are without each question, so that differences and means have intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from odp_callbacks.analysis.jackknife import MINIMUM_QUESTIONS, Estimate, check_confidence

ALL_TEACHERS = "all"
"""Stands for the mean over the teachers that are no controls."""
GAP = "incorrect-correct"
"""The class of the difference between incorrect and correct paths, or rollouts."""
NOT_MEASURED = Estimate(np.nan, np.nan, np.nan, 0, 0, note="not measured")
"""A figure that no cell has."""
UNBIASED = "cosine without both biases"
"""The mean cosine where neither the path's own ending nor forced tokens at ancestors count as visits."""
CONTROL_PREFIX = "control"
"""How the name of a teacher begins that knows nothing of the answer; means over teachers leave it out."""


class FigureKey(NamedTuple):
    """What a figure is of.

    Attributes:
        figure: Its name, such as ``"cosine"``.
        teacher: Name of the teacher, or :data:`ALL_TEACHERS`.
        paths: Class of the paths or rollouts, such as ``"incorrect"``.
    """

    figure: str
    teacher: str = ALL_TEACHERS
    paths: str = "all"


@dataclass(frozen=True)
class StudyFigure:
    """A figure of a cell, or a combination of figures.

    Attributes:
        value: The figure; NaN where it is undefined.
        left_out: By question, as ``"task/question"``, the figure without it. Questions that have no part in the figure
            are absent.
        informative: By task, how many questions tell something, where that is fewer than ``left_out`` has: an update
            gain changes with every question, but only those with unequal rewards have a success gradient.
    """

    value: float
    left_out: Mapping[str, float]
    informative: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CellSummary:
    """What is kept of one measurement of one student on one task.

    Attributes:
        student: Name of the student.
        task: Name of the task.
        measurement: ``"paper"``, ``"update"``, ``"accuracy"`` or ``"nodes"``.
        teachers: Names of the teachers.
        questions: Number of questions that were measured.
        figures: The figures.
        facts: What else a reader wants to know, such as deviations, costs and settings; JSON values.
    """

    student: str
    task: str
    measurement: str
    teachers: tuple[str, ...]
    questions: int
    figures: Mapping[FigureKey, StudyFigure]
    facts: Mapping[str, Any] = field(default_factory=dict)


def is_control(teacher: str) -> bool:
    """Whether a teacher is a control, by its name.

    Examples:
        >>> is_control("control: a wrong response"), is_control("Self-1C")
        (True, False)
    """
    return teacher.lower().startswith(CONTROL_PREFIX)


def figures_without_each(
    questions: Mapping[Any, str], compute: Callable[[Any], Mapping[FigureKey, float]]
) -> dict[FigureKey, StudyFigure]:
    """Compute figures with all questions and without each of them.

    Args:
        questions: The questions' names, by what ``compute`` calls them.
        compute: From a question to leave out, or None, to the figures.

    Examples:
        >>> values = {"a": 1.0, "b": 3.0}
        >>> def mean(left_out):
        ...     kept = [value for question, value in values.items() if question != left_out]
        ...     return {FigureKey("mean"): sum(kept) / len(kept)}
        >>> figures_without_each({"a": "task/a", "b": "task/b"}, mean)[FigureKey("mean")]
        StudyFigure(value=2.0, left_out={'task/a': 3.0, 'task/b': 1.0}, informative={})
    """
    with_all = compute(None)
    left_out: dict[FigureKey, dict[str, float]] = {key: {} for key in with_all}
    for question, name in questions.items():
        without = compute(question)
        for key, value in with_all.items():
            changed = without.get(key, float("nan"))
            # A figure that does not change to the last bit does not depend on the question.
            if changed != value and not (np.isnan(changed) and np.isnan(value)):
                left_out[key][name] = float(changed)
    return {key: StudyFigure(float(value), left_out[key]) for key, value in with_all.items()}


def combination(terms: Iterable[tuple[float, StudyFigure]]) -> StudyFigure:
    """A sum of figures with weights; a question that is left out is left out of all of them.

    Args:
        terms: Weights and figures.

    Examples:
        >>> first, second = StudyFigure(1.0, {"t/a": 2.0}), StudyFigure(0.5, {"t/a": 0.0, "t/b": 1.0})
        >>> combination([(1.0, first), (-1.0, second)])
        StudyFigure(value=0.5, left_out={'t/a': 2.0, 't/b': 0.0}, informative={})
    """
    parts = list(terms)
    questions = dict.fromkeys(question for _, figure in parts for question in figure.left_out)
    informative: dict[str, int] = {}
    for _, figure in parts:
        for task, count in figure.informative.items():
            informative[task] = min(count, informative.get(task, count))
    return StudyFigure(
        sum(weight * figure.value for weight, figure in parts),
        {q: sum(weight * figure.left_out.get(q, figure.value) for weight, figure in parts) for q in questions},
        informative,
    )


def mean_figure(figures: Sequence[StudyFigure]) -> StudyFigure | None:
    """The mean of the figures that exist; None if none does."""
    present = [figure for figure in figures if np.isfinite(figure.value)]
    return combination((1 / len(present), figure) for figure in present) if present else None


def study_estimate(figure: StudyFigure, confidence: float = 0.95) -> Estimate:
    """A figure with its jackknife interval, clustered by question and stratified by task.

    The tasks are given, and the questions of each are a sample. So the variances of the tasks add up, and the interval
    is Student's t with the degrees of freedom of Welch and Satterthwaite. Two students' figures on one question move
    together, because leaving the question out leaves it out of both.

    Args:
        figure: The figure.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The estimate. Its interval is NaN if a task has fewer than three questions that tell something, or if all are
        alike.

    Examples:
        >>> estimate = study_estimate(StudyFigure(1.0, {"t/a": 1.5, "t/b": 1.0, "t/c": 0.5}))
        >>> round(estimate.low, 2), round(estimate.high, 2)
        (-1.48, 3.48)
    """
    check_confidence(confidence)
    by_task: dict[str, list[float]] = {}
    for question, value in figure.left_out.items():
        by_task.setdefault(question.partition("/")[0], []).append(value)
    counts = [len(values) for values in by_task.values()]
    telling = [min(len(values), figure.informative.get(task, len(values))) for task, values in by_task.items()]
    blank = Estimate(figure.value, np.nan, np.nan, sum(counts), 0)
    if not np.isfinite(figure.value) or min(telling, default=0) < MINIMUM_QUESTIONS:
        return blank
    variances = [
        (len(values) - 1) / len(values) * float(((np.array(values) - np.mean(values)) ** 2).sum())
        for values in by_task.values()
    ]
    variance = sum(variances)
    if not np.isfinite(variance) or variance == 0:
        return blank
    from scipy import stats  # importing it takes most of a second

    of_tasks = [min(count - 1, told) for count, told in zip(counts, telling, strict=True)]
    degrees = variance**2 / sum(part**2 / of_task for part, of_task in zip(variances, of_tasks, strict=True))
    half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * variance**0.5
    return Estimate(figure.value, figure.value - half_width, figure.value + half_width, sum(counts), 0)
