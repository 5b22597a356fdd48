"""A report as a table for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAVY
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import GAP, Analysis, ClassSummary, success_rate
from odp_callbacks.gates.scoring import RuleScore
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import LONGEST, shown

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
            *_cells(f"[bold]{escape(shown(summary.teacher))}[/bold]\n{'gap' if gap else summary.split}", summary),
            f"{summary.nodes}\n{summary.figures['predicted_gain'].questions}",
            "" if gap else f"{_share(summary.undefined, summary.nodes)}\n{_share(summary.undetermined, summary.nodes)}",
            end_section=gap,
        )
    contrasts = [c for c in analysis.contrasts() if c.split == "all"]
    if not contrasts:
        return Group(table)
    versus = _table("Teacher against teacher, on the same nodes", "first - second")
    for contrast in contrasts:
        versus.add_row(
            *_cells(f"[bold]{escape(shown(contrast.teacher, 2 * LONGEST))}[/bold]\n{verdict(contrast)}", contrast)
        )
    return Group(table, "", versus)


def rules_table(scores: Sequence[RuleScore]) -> Table:
    """Rules for where to distil, teacher by teacher, the best by predicted gain first.

    Args:
        scores: Of :func:`~odp_callbacks.gates.scoring.score_rules`.
    """
    table = Table(box=SIMPLE_HEAVY, show_edge=False, pad_edge=False, title="Where to distil?")
    table.caption = "\n".join(
        (
            "Predicted gain: per weight spent; against no rule on the same nodes, with",
            "intervals clustered by question. Help kept, harm removed: of what the",
            "teacher does good and harm. Ideal: share of the gain there is that lies at",
            "the tokens let through, and tokens: their share.",
        )
    )
    for column in ("teacher\nrule", "predicted\ngain", "against\nno rule"):
        table.add_column(column, justify="left" if column.startswith("teacher") else "right", no_wrap=True)
    for column in ("help\nkept", "harm\nremoved", "ideal\ntokens"):
        table.add_column(column, justify="right", no_wrap=True)
    by_teacher: dict[str, list[RuleScore]] = {}
    for score in scores:
        by_teacher.setdefault(score.teacher, []).append(score)
    for teacher, of_teacher in by_teacher.items():
        ranked = sorted(of_teacher, key=lambda s: np.nan_to_num(s.predicted_gain.value, nan=-np.inf), reverse=True)
        for place, score in enumerate(ranked):
            table.add_row(
                f"[bold]{escape(shown(teacher))}[/bold]\n{escape(score.rule)}",
                show(score.predicted_gain),
                "" if score.gained.low == score.gained.high == 0 else show(score.gained),
                _percent(score.help_kept.value),
                _percent(score.harm_removed.value),
                f"{_percent(score.ideal_gain_kept.value)}\n{_percent(score.token_share)}",
                end_section=place == len(ranked) - 1,
            )
    return table


def verdict(contrast: ClassSummary) -> str:
    """What a difference in predicted gain says, in words."""
    figure = contrast.figures["predicted_gain"]
    if not (figure.low > 0 or figure.high < 0):
        return "cannot tell which"
    return "first helps more" if figure.low > 0 else "second helps more"


def show(figure: Estimate) -> str:
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


def _percent(share: float) -> str:
    return "unclear" if math.isnan(share) else f"{share:.0%}"
