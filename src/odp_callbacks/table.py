"""A report as a table for the terminal."""

import math

from rich.box import SIMPLE_HEAVY
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from odp_callbacks.inference import Figure
from odp_callbacks.records import ProbeReport
from odp_callbacks.summaries import GAP, Analysis, ClassSummary, success_rate

COLUMNS = ("predicted_gain", "gain_weighted_alignment", "alignment")
HEADS = ("predicted\ngain", "gain-weighted\nalignment", "alignment\n(token mean)")


def summary_table(report: ProbeReport, confidence: float = 0.95) -> Group:
    """Teacher by correct and incorrect rollouts, the gap between them, and teacher against teacher.

    Every figure stands above its interval.

    Args:
        report: A probe's report.
        confidence: Level of the intervals.
    """
    analysis = Analysis(report, confidence)
    rate = success_rate(report, confidence)
    truncated = report.truncated / max(1, len(report.rollouts) + report.continuations)
    table = _table("Does the teacher pull where success lies?", "teacher\nrollouts")
    table.caption = "\n".join(
        (
            f"{len(report.rollouts)} rollouts, success rate {rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%}); "
            f"{report.continuations} continuations, {truncated:.0%} cut at the limit.",
            f"{confidence:.0%} intervals, clustered by question.",
            "Predicted gain: success gained per unit step along the teacher's gradient;",
            "unbiased: it ranks teachers. Gain-weighted alignment: the share of the",
            "possible gain that the teacher delivers. Alignment: mean cosine with the",
            "ideal gradient, corrected for noise. Undef.: no alignment exists.",
            "Unclear: the continuations (cont.) cannot tell, or are too few.",
        )
    )
    for column in ("nodes\nquest.", "undef.\nunclear"):
        table.add_column(column, justify="right", no_wrap=True)
    for summary in analysis.summaries():
        gap = summary.split == GAP
        table.add_row(
            *_cells(f"[bold]{escape(summary.teacher)}[/bold]\n{'gap' if gap else summary.split}", summary),
            f"{summary.nodes}\n{summary.figures['predicted_gain'].questions}",
            "" if gap else f"{_share(summary.undefined, summary.nodes)}\n{_share(summary.undetermined, summary.nodes)}",
            end_section=gap,
        )
    contrasts = [c for c in analysis.contrasts() if c.split == "all"]
    if not contrasts:
        return Group(table)
    versus = _table("Teacher against teacher, on the same nodes", "first - second")
    for contrast in contrasts:
        versus.add_row(*_cells(f"[bold]{escape(contrast.teacher)}[/bold]\n{verdict(contrast)}", contrast))
    return Group(table, "", versus)


def verdict(contrast: ClassSummary) -> str:
    """What a difference in predicted gain says, in words."""
    figure = contrast.figures["predicted_gain"]
    if not (figure.low > 0 or figure.high < 0):
        return "cannot tell which"
    return "first helps more" if figure.low > 0 else "second helps more"


def show(figure: Figure) -> str:
    """A figure above its interval, or why there is none."""
    if math.isnan(figure.value):
        return f"unclear\n{figure.note.replace('continuations', 'cont.')}"
    if math.isnan(figure.low):
        return f"{figure.value:+.3f}\n{figure.note}"
    return f"{figure.value:+.3f}\n{figure.low:.2f} to {figure.high:.2f}"


def _table(title: str, first: str) -> Table:
    table = Table(box=SIMPLE_HEAVY, show_edge=False, pad_edge=False, title=title)
    table.add_column(first, no_wrap=True)
    for column in HEADS:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(name: str, summary: ClassSummary) -> tuple[str, ...]:
    return (name, *(show(summary.figures[column]) for column in COLUMNS))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
