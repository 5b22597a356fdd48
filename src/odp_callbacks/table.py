"""A report as a table for the terminal."""

import math

from rich.table import Table

from odp_callbacks.records import ProbeReport
from odp_callbacks.summaries import Figure, success_rate, summarise


def summary_table(report: ProbeReport, confidence: float = 0.95) -> Table:
    """Teacher by correct and incorrect rollouts; every figure with its interval.

    Args:
        report: A probe's report.
        confidence: Level of the intervals.
    """
    truncated = report.truncated / max(1, len(report.rollouts) + report.continuations)
    table = Table(
        title="Does the teacher pull where success lies?",
        caption=(
            f"{len(report.rollouts)} rollouts, success rate {success_rate(report):.0%}; "
            f"{report.continuations} continuations, {truncated:.0%} cut by the length limit. "
            f"{confidence:.0%} intervals over questions. Alignment: mean cosine, pulled towards 0 by few continuations; "
            "predicted gain: success gained per unit step, unbiased."
        ),
    )
    for column in ("teacher", "rollouts"):
        table.add_column(column)
    for column in (
        "alignment",
        "predicted gain",
        "teacher advantage",
        "nodes",
        "questions",
        "undefined",
        "undetermined",
    ):
        table.add_column(column, justify="right")
    for summary in summarise(report, confidence):
        figures = summary.figures
        table.add_row(
            summary.teacher if summary.split == "all" else "",
            summary.split,
            *(show(figures[name]) for name in ("alignment", "predicted_gain", "teacher_advantage")),
            str(summary.nodes),
            str(figures["predicted_gain"].questions),
            _share(summary.undefined, summary.nodes),
            _share(summary.undetermined, summary.nodes),
            end_section=summary.split == "incorrect",
        )
    return table


def show(figure: Figure) -> str:
    """A figure with its interval, or why there is none."""
    if math.isnan(figure.value):
        return "undefined"
    if math.isnan(figure.low):
        return f"{figure.value:+.3f} (1 question: no interval)"
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
