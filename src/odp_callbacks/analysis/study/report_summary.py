"""The summaries of our own measurements: update gain, figures at nodes, and the teachers' own accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.analysis.study.figures import (
    ALL_TEACHERS,
    GAP,
    CellSummary,
    FigureKey,
    StudyFigure,
    combination,
    figures_without_each,
    is_control,
    mean_figure,
)
from odp_callbacks.analysis.summaries import SPLITS, UPDATE_CLASSES, summarise
from odp_callbacks.analysis.update_gain import update_gain
from odp_callbacks.records import ProbeReport
from odp_callbacks.update_records import UpdateGram

NODE_FIGURES = ("predicted_gain", "alignment", "logit_alignment", "teacher_advantage")
NODE_PREDICTORS = ("depth", "reverse_kl", "js", "cosine")
"""Those of the paper that nodes have; ``reverse_kl`` is KL(student‖teacher)."""
STUDENT = "student"


def update_summary(report: ProbeReport, student: str, task: str, names: Sequence[str]) -> CellSummary:
    """Summarise update gain: of each teacher, from all, correct and incorrect rollouts, and incorrect minus correct.

    Args:
        report: A report with an update; the ids of its questions are places in ``names``.
        student: Name of the student.
        task: Name of the task.
        names: The questions' names, by their place in the dataset.
    """
    figures: dict[FigureKey, StudyFigure] = {}
    for update in report.updates:
        groups = _group_names(report, update.gram, task, names)
        for index, teacher in enumerate(report.teachers):
            for split, classes in UPDATE_CLASSES.items():
                estimator = update_gain([update.gram], index, classes)
                figures[FigureKey("update_gain", teacher, split)] = _figure_of(estimator, groups, task)
    figures.update(_with_gaps(figures, report.teachers))
    rewards = [rollout.reward for rollout in report.rollouts]
    return CellSummary(
        student,
        task,
        "update",
        report.teachers,
        len({rollout.question for rollout in report.rollouts}),
        {key: figure for key, figure in figures.items() if np.isfinite(figure.value)},
        {
            "rollouts": len(report.rollouts),
            "success": float(np.mean([rollout.correct for rollout in report.rollouts])) if rewards else None,
            "tokens": sum(len(rollout.pieces) for rollout in report.rollouts),
            "seconds": float(sum(report.stage_seconds.values())),
        },
    )


def node_summary(report: ProbeReport, student: str, task: str, names: Sequence[str]) -> CellSummary:
    """Summarise the figures at nodes, by class, with their correlations to predictors of the teacher's use.

    Args:
        report: A report with nodes.
        student: Name of the student.
        task: Name of the task.
        names: The questions' names, by their place in the dataset.
    """
    report = replace(report, updates=())
    questions = {node.question: f"{task}/{names[int(node.question)]}" for node in report.nodes}

    def compute(left_out: str | None) -> Mapping[FigureKey, float]:
        kept = replace(report, nodes=tuple(node for node in report.nodes if node.question != left_out))
        values = {
            FigureKey(figure, summary.teacher, summary.split): summary.figures[figure].value
            for summary in summarise(kept)
            if summary.split in SPLITS
            for figure in NODE_FIGURES
        }
        for target, figure in (("alignment", "correlation"), ("predicted_gain", "gain correlation")):
            for (teacher, predictor), estimate in correlations(kept, target=target).items():
                if predictor in NODE_PREDICTORS:
                    values[FigureKey(f"{figure} {predictor}", teacher)] = estimate.value
        return values

    figures = figures_without_each(questions, compute) if report.nodes else {}
    figures.update(_with_gaps(figures, report.teachers))
    return CellSummary(
        student,
        task,
        "nodes",
        report.teachers,
        len(questions),
        {key: figure for key, figure in figures.items() if np.isfinite(figure.value)},
        {
            "nodes": len(report.nodes),
            "continuations": int(sum(node.count.sum() for node in report.nodes)),
            "seconds": float(sum(report.stage_seconds.values())),
        },
    )


def accuracy_summary(report: ProbeReport, student: str, task: str, names: Sequence[str]) -> CellSummary:
    """Summarise how often the student and each teacher answer correctly, and how much more often than the student.

    Args:
        report: A report with the teachers' responses.
        student: Name of the student.
        task: Name of the task.
        names: The questions' names, by their place in the dataset.
    """
    outcomes: dict[str, dict[str, list[bool]]] = {STUDENT: {}, **{teacher: {} for teacher in report.teachers}}
    for rollout in report.rollouts:
        outcomes[STUDENT].setdefault(rollout.question, []).append(rollout.correct)
    for response in report.teacher_responses:
        outcomes[response.teacher].setdefault(response.question, []).append(response.correct)
    questions = {question: f"{task}/{names[int(question)]}" for question in outcomes[STUDENT]}

    def compute(left_out: str | None) -> Mapping[FigureKey, float]:
        values = {}
        for who, by_question in outcomes.items():
            correct = [one for question, of_one in by_question.items() if question != left_out for one in of_one]
            if correct:
                values[FigureKey("accuracy", who)] = float(np.mean(correct))
        return values

    figures = figures_without_each(questions, compute)
    asked = [
        figures[key] for t in report.teachers if not is_control(t) and (key := FigureKey("accuracy", t)) in figures
    ]
    if (mean := mean_figure(asked)) is not None:
        figures[FigureKey("accuracy")] = mean
    facts = {"responses": len(report.teacher_responses)}
    return CellSummary(student, task, "accuracy", report.teachers, len(questions), figures, facts)


def _with_gaps(figures: Mapping[FigureKey, StudyFigure], teachers: Sequence[str]) -> dict[FigureKey, StudyFigure]:
    """Means over the teachers that are no controls, and differences between incorrect and correct rollouts."""
    with_gaps = dict(figures)
    real = [teacher for teacher in teachers if not is_control(teacher)]
    for figure, paths in dict.fromkeys((key.figure, key.paths) for key in figures):
        of_teachers = [figures[key] for teacher in real if (key := FigureKey(figure, teacher, paths)) in figures]
        if (mean := mean_figure(of_teachers)) is not None:
            with_gaps[FigureKey(figure, ALL_TEACHERS, paths)] = mean
    for key in list(with_gaps):
        if key.paths == "incorrect" and (other := key._replace(paths="correct")) in with_gaps:
            with_gaps[key._replace(paths=GAP)] = combination([(1.0, with_gaps[key]), (-1.0, with_gaps[other])])
    return with_gaps


def _figure_of(estimator: Estimator, groups: Sequence[str], task: str) -> StudyFigure:
    """The figure of an estimator over groups of questions; NaN if it is withheld."""
    if estimator.withheld:
        return StudyFigure(float("nan"), {})
    without_each = estimator.statistic(1 - np.eye(len(groups)))
    informative = {} if estimator.informative is None else {task: estimator.informative}
    return StudyFigure(estimator.value, dict(zip(groups, without_each.tolist(), strict=True)), informative)


def _group_names(report: ProbeReport, gram: UpdateGram, task: str, names: Sequence[str]) -> list[str]:
    """The name of the question that each group is; of the group where it holds several, or cannot be told."""
    lengths: dict[str, list[int]] = {}
    for rollout in report.rollouts:
        lengths.setdefault(rollout.question, [0, 0])[int(not rollout.correct)] += len(rollout.pieces)
    ids = list(lengths)
    if len(ids) == gram.groups and np.array_equal(gram.tokens, np.array([lengths[name] for name in ids], dtype=float)):
        return [f"{task}/{names[int(name)]}" for name in ids]
    return [f"{task}/group {index}" for index in range(gram.groups)]
