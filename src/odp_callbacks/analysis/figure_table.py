"""All figures of a report as rows of a table."""

from collections.abc import Iterator
from typing import Any

from odp_callbacks.analysis.correlations import correlations, measured_targets
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.success_by_depth import success_by_depth
from odp_callbacks.analysis.summaries import GEOMETRY_DEPENDENT, Analysis
from odp_callbacks.records import ProbeReport

COLUMNS = (
    "teacher", "split", "figure", "value", "low", "high", "uncorrected", "questions", "nodes", "note", "geometry",
)  # fmt: skip
"""Names of the columns, in their order."""
STUDENT = "student"
"""Teacher of the rows on what the student does by itself."""
CONTRIBUTION = "contribution"
"""Figure of the rows on what depths, layers and modules contribute to the update."""


def figure_rows(report: ProbeReport, confidence: float = 0.95) -> list[dict[str, Any]]:
    """One row for each teacher or pair of teachers, class and figure, with the columns :data:`COLUMNS`.

    Figures that depend on the geometry have a row for each geometry that was measured.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    rows = [_row(*key, estimate, report) for key, estimate in _estimates(report, confidence)]
    other = report.preconditioned
    if other is not None:
        rows += [
            _row(teacher, split, figure, estimate, other)
            for (teacher, split, figure), estimate in _estimates(other, confidence)
            if figure in (*GEOMETRY_DEPENDENT, CONTRIBUTION)
        ]
    return rows


def _estimates(report: ProbeReport, confidence: float) -> Iterator[tuple[tuple[str, str, str], Estimate]]:
    analysis = Analysis(report, confidence)
    for summary in [*analysis.summaries(), *analysis.contrasts()]:
        for figure, estimate in summary.figures.items():
            yield (summary.teacher, summary.split, figure), estimate
    for split, estimates in analysis.contributions():
        for teacher, estimate in zip(report.teachers, estimates, strict=True):
            yield (teacher, split, CONTRIBUTION), estimate
    for target in measured_targets(report):
        for (teacher, predictor), estimate in correlations(report, confidence, target).items():
            yield (teacher, "all", f"correlation_{predictor}_with_{target}"), estimate
    for split, window, estimate in success_by_depth(report, confidence):
        yield (STUDENT, f"{split} depth {window}", "success"), estimate


def _row(teacher: str, split: str, figure: str, estimate: Estimate, report: ProbeReport) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "split": split,
        "figure": figure,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "uncorrected": estimate.uncorrected,
        "questions": estimate.questions,
        "nodes": estimate.nodes,
        "note": estimate.note,
        "geometry": report.settings.get("geometry", "euclidean"),
    }
