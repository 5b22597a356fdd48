"""The table of how well each teacher answers by itself, beside what distilling from it gains."""

import math

from rich.box import SIMPLE_HEAVY
from rich.markup import escape
from rich.table import Table

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.ranking import rank
from odp_callbacks.analysis.teacher_accuracy import student_accuracy, teacher_accuracies
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import displayable
from odp_callbacks.visualization.table import CAPTION_WIDTH, format_estimate
from odp_callbacks.visualization.wording import level

CAPTION = """Own accuracy: share of correct responses that the teacher samples by
itself, under its context. Student: its rollouts, without context.
A teacher that answers well need not help, and the other way round."""


def accuracy_table(report: ProbeReport, confidence: float = 0.95) -> Table | None:
    """Tabulate the teachers' own accuracy beside their gain, in the order of the ranking.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        A table that ``rich.print`` shows; None if the teachers' responses were not sampled.
    """
    accuracies = {one.teacher: one for one in teacher_accuracies(report, confidence)}
    if not accuracies:
        return None
    table = Table(
        box=SIMPLE_HEAVY, show_edge=False, pad_edge=False, title="How well does the teacher answer by itself?"
    )
    table.caption = f"{CAPTION}\n{level(confidence)} intervals, clustered by question."
    table.min_width = CAPTION_WIDTH
    for heading in ("teacher", "own\naccuracy", "minus\nstudent", "gain", "cut"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "teacher" else "right")
    student = student_accuracy(report, confidence)
    table.add_row("[bold]student[/bold]", percentage_estimate(student), "", "", "", end_section=True)
    gains = {ranked.teacher: ranked.gain for ranked in rank(report, confidence).classes.get("all", [])}
    for name in sorted(accuracies, key=lambda teacher: list(gains).index(teacher) if teacher in gains else len(gains)):
        accuracy = accuracies[name]
        table.add_row(
            f"[bold]{escape(displayable(name))}[/bold]",
            percentage_estimate(accuracy.accuracy),
            percentage_estimate(accuracy.above_student, signed=True),
            format_estimate(gains[name]) if name in gains else "",
            f"{accuracy.truncated / accuracy.responses:.0%}",
        )
    return table


def percentage_estimate(estimate: Estimate, *, signed: bool = False) -> str:
    r"""Write an estimate in percent above its interval, or above the reason why there is none.

    Examples:
        >>> percentage_estimate(Estimate(0.785, 0.7, 0.9, 10, 40))
        '78.5%\n70 to 90'
    """
    if math.isnan(estimate.value):
        return f"no estimate\n{estimate.note}"
    value = f"{100 * estimate.value:{'+' if signed else ''}.1f}%"
    if math.isnan(estimate.low):
        return f"{value}\n{estimate.note}"
    return f"{value}\n{100 * estimate.low:.0f} to {100 * estimate.high:.0f}"
