"""A report as a table for the terminal."""

import math

from rich.box import SIMPLE_HEAVY
from rich.markup import escape
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
        box=SIMPLE_HEAVY,
        show_edge=False,
        pad_edge=False,
        title="Does the teacher pull where success lies?",
        caption="\n".join(
            (
                f"{len(report.rollouts)} rollouts, success rate {success_rate(report):.0%}; "
                f"{report.continuations} continuations, {truncated:.0%} cut at the limit.",
                f"{confidence:.0%} intervals, clustered by question.",
                "Alignment: mean cosine with the ideal gradient; few continuations",
                "pull it towards 0. Predicted gain: success gained per unit step along",
                "the teacher's gradient; unbiased. Undef.: no alignment exists.",
                "Unclear: the continuations cannot tell.",
            )
        ),
    )
    table.add_column("teacher\nrollouts", no_wrap=True)
    for column in ("alignment", "predicted gain", "teacher\nadvantage"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("nodes\nquest.", "undef.\nunclear"):
        table.add_column(column, justify="right", no_wrap=True)
    for summary in summarise(report, confidence):
        figures = summary.figures
        table.add_row(
            f"[bold]{escape(summary.teacher)}[/bold]\n{summary.split}",
            *(show(figures[name]) for name in ("alignment", "predicted_gain", "teacher_advantage")),
            f"{summary.nodes}\n{figures['predicted_gain'].questions}",
            f"{_share(summary.undefined, summary.nodes)}\n{_share(summary.undetermined, summary.nodes)}",
            end_section=summary.split == "incorrect",
        )
    return table


def show(figure: Figure) -> str:
    """A figure above its interval, or why there is none."""
    if math.isnan(figure.value):
        return "unclear\nno difference" if figure.nodes else "undefined\nno node"
    if math.isnan(figure.low):
        return f"{figure.value:+.3f}\none question"
    return f"{figure.value:+.3f}\n{figure.low:.2f} to {figure.high:.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
