"""The summary of a measurement by the paper's protocol: its tables' figures, with and without each question."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.paper.aggregates import FIGURES, class_gaps, of_class, question_means
from odp_callbacks.analysis.paper.difficulty import DIFFICULTIES, difficulty
from odp_callbacks.analysis.paper.oracle_filter import oracle_filter
from odp_callbacks.analysis.paper.predictor_correlations import spearman
from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes, score_nodes
from odp_callbacks.analysis.study.figures import (
    ALL_TEACHERS,
    GAP,
    UNBIASED,
    CellSummary,
    FigureKey,
    figures_without_each,
    is_control,
)
from odp_callbacks.records import Floats

CLASSES = ("all", "correct", "incorrect")
DEPTHS = ((0, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 1 << 30))
"""First and last depth of the windows by which the mean cosine is shown."""


def paper_summary(record: PaperRecord, student: str, task: str, names: Sequence[str]) -> CellSummary:
    """Summarise a measurement by the paper's protocol.

    Args:
        record: The measurement; the ids of its questions are places in ``names``.
        student: Name of the student.
        task: Name of the task.
        names: The question's names, by their place in the dataset.
    """
    scored = {"": score_nodes(record)}
    scored[UNBIASED] = score_nodes(record, own_path="left out", ancestors="own policy only")
    questions = {index: f"{task}/{names[int(question.id)]}" for index, question in enumerate(record.questions)}

    def compute(left_out: int | None) -> Mapping[FigureKey, float]:
        kept = {name: nodes.select(nodes.question != left_out) for name, nodes in scored.items()}
        figures = paper_figures(kept[""])
        figures.update(_gaps(kept[UNBIASED], "cosine", UNBIASED))
        return figures

    tokens = dict(record.generated_tokens)
    return CellSummary(
        student,
        task,
        "paper",
        record.teachers,
        len(record.questions),
        figures_without_each(questions, compute),
        {
            "deviations": list(record.deviations),
            "unpublished": list(record.unpublished),
            "left_out": dict(record.left_out),
            "pass_rates": [question.pass_rate for question in record.questions],
            "scored_nodes": len(scored[""]),
            "rollouts": int(record.settings["rollouts_per_question"]) * len(record.questions),
            "targeted_rollouts": record.targeted_rollouts,
            "tokens": int(sum(tokens.values())),
            "seconds": float(sum(record.stage_seconds.values())),
        },
    )


def paper_figures(nodes: ScoredNodes) -> dict[FigureKey, float]:
    """All figures of the paper's tables, of each teacher and of the mean over the teachers that are no controls.

    Args:
        nodes: Scored nodes.
    """
    figures: dict[FigureKey, float] = {}
    for figure in FIGURES:
        for paths in CLASSES:
            figures.update(_means(of_class(nodes, paths), figure, paths))
        figures.update(_gaps(nodes, figure, figure))
    for name in DIFFICULTIES:
        chosen = np.array([difficulty(rate) == name for rate in nodes.pass_rate.tolist()], dtype=bool)
        figures.update(_means(nodes.select(chosen), "cosine", name))
    for first, last in DEPTHS:
        inside = nodes.select((nodes.depth >= first) & (nodes.depth <= last))
        figures.update(_means(inside, "cosine", f"depth {first}" + (f"-{last}" if last < 1 << 30 else "+")))
    figures.update(_correlations(nodes))
    without_controls = _of_teachers(nodes, _real(nodes))
    for part in oracle_filter(nodes) + [one for one in oracle_filter(without_controls) if one.teacher == "all"]:
        for name in ("kept", "before", "after"):
            figures[FigureKey(f"filter {name}", part.teacher)] = getattr(part, name)
    cosine = without_controls.cosine[np.isfinite(without_controls.cosine)]
    figures[FigureKey("cosine spread")] = float(cosine.std(ddof=1)) if len(cosine) > 1 else float("nan")
    mean, positive = figures[FigureKey("cosine")], figures[FigureKey("positive")]
    figures[FigureKey("cosine beyond its sign")] = mean - (2 * positive - 1)
    return {key: value for key, value in figures.items() if np.isfinite(value)}


def _means(nodes: ScoredNodes, figure: str, paths: str) -> dict[FigureKey, float]:
    """A figure of each teacher, and of the mean over teachers of each question."""
    _, means = question_means(nodes, figure)
    figures = {FigureKey(figure, t, paths): _mean(means[:, i]) for i, t in enumerate(nodes.teachers)}
    figures[FigureKey(figure, ALL_TEACHERS, paths)] = _mean(_row_means(means[:, _real(nodes)]))
    return figures


def _gaps(nodes: ScoredNodes, figure: str, name: str) -> dict[FigureKey, float]:
    """Incorrect minus correct paths, paired by question, of each teacher and of the mean over teachers."""
    columns = {teacher: np.array([index]) for index, teacher in enumerate(nodes.teachers)}
    columns[ALL_TEACHERS] = _real(nodes)
    return {
        FigureKey(name, teacher, GAP): _mean(np.array([*class_gaps(_of_teachers(nodes, column), figure).values()]))
        for teacher, column in columns.items()
    }


def _correlations(nodes: ScoredNodes) -> dict[FigureKey, float]:
    """Mean Spearman correlations within a path, over the paths of each teacher and of all that are no controls."""
    predictors = {"depth": np.repeat(nodes.depth[:, None].astype(float), len(nodes.teachers), axis=1)}
    predictors.update(nodes.predictors)
    paths = [np.flatnonzero(nodes.path == path) for path in np.unique(nodes.path)]
    figures = {}
    for name, column in predictors.items():
        table = np.array(
            [[spearman(nodes.cosine[p, k], column[p, k]) for k in range(len(nodes.teachers))] for p in paths]
        ).reshape(len(paths), len(nodes.teachers))
        for index, teacher in enumerate(nodes.teachers):
            figures[FigureKey(f"correlation {name}", teacher)] = _mean(table[:, index])
        figures[FigureKey(f"correlation {name}")] = _mean(table[:, _real(nodes)].reshape(-1))
    return figures


def _of_teachers(nodes: ScoredNodes, columns: NDArray[np.int64]) -> ScoredNodes:
    """The same nodes with some of the teachers."""
    return replace(
        nodes,
        teachers=tuple(nodes.teachers[index] for index in columns),
        cosine=nodes.cosine[:, columns],
        advantage=nodes.advantage[:, columns],
        predictors={name: column[:, columns] for name, column in nodes.predictors.items()},
    )


def _real(nodes: ScoredNodes) -> NDArray[np.int64]:
    """The teachers that are no controls."""
    return np.array([i for i, teacher in enumerate(nodes.teachers) if not is_control(teacher)], dtype=np.int64)


def _row_means(table: Floats) -> Floats:
    """Mean of the finite values of each row, ``(N,)``; NaN where there is none."""
    finite = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(finite, table, 0.0).sum(axis=1) / finite.sum(axis=1)
    return means


def _mean(values: Floats) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
