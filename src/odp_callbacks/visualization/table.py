"""Tables for the terminal: a report's summary, and the scores of rules."""

import math
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAVY
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from odp_callbacks.analysis.advice import advise
from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.jackknife import FEW_INFORMATIVE, Estimate
from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, Analysis, ClassSummary
from odp_callbacks.analysis.update_gain import EQUAL_TEACHER, FEW_ROLLOUTS
from odp_callbacks.gates.scoring import RuleScore
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import MAXIMUM_LENGTH, displayable, printable
from odp_callbacks.visualization.wording import gain_figure, level

HEADINGS = {
    "update_gain": "update\ngain",
    "update_contribution": "contri-\nbution",
    "update_alignment": "update\nalignment",
    "predicted_gain": "predicted\ngain",
    "gain_weighted_alignment": "gain-weighted\nalignment",
    "alignment": "alignment\n(token mean)",
}
"""Figures of the summary table, with the headings of their columns, in the order of preference."""
MAXIMUM_FIGURES = 3
"""Columns of figures that fit into a terminal of 80 columns."""
CAPTION_WIDTH = 76
"""Columns that the lines of a caption need; a narrower table would break them."""
OF_BOTH = ("update_gain", "predicted_gain", "gain_weighted_alignment")
"""Figures of the table of a report with nodes whose update was measured too."""
SHORT_NOTES = {EQUAL_TEACHER: "as the student", FEW_ROLLOUTS: "few rollouts", FEW_INFORMATIVE: "rewards alike"}
"""Notes that are too long for a column, and what stands there."""


def summary_table(report: ProbeReport, confidence: float = 0.95) -> Group:
    """Tabulate the figures of each teacher on correct and incorrect rollouts, and the differences between teachers.

    Each estimate stands above its interval. The last line says what to do next.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        Tables that ``rich.print`` shows.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    return tabulate(Analysis(report, confidence))


def tabulate(analysis: Analysis) -> Group:
    """Tabulate an analysis as :func:`summary_table` does."""
    summaries = analysis.summaries()
    figures, gain, has_nodes = _figures(summaries), gain_figure(summaries), bool(analysis.report.nodes)
    table = _figure_table("Does the teacher push towards success?", "teacher\nrollouts", figures)
    table.caption, table.min_width = _summary_caption(analysis, figures), CAPTION_WIDTH
    table.add_column("tokens\nquest.", justify="right", no_wrap=True)
    if has_nodes:
        table.add_column("undef.\nundet.", justify="right", no_wrap=True)
    for summary in summaries:
        is_difference = summary.split == INCORRECT_MINUS_CORRECT
        status_shares = f"{_share(summary.undefined, summary.nodes)}\n{_share(summary.undetermined, summary.nodes)}"
        tokens = summary.nodes if has_nodes else summary.figures[gain].nodes
        table.add_row(
            f"[bold]{escape(displayable(summary.teacher))}[/bold]\n{'gap' if is_difference else summary.split}",
            *_figure_cells(summary, figures),
            f"{tokens}\n{summary.figures[gain].questions}",
            *([] if not has_nodes else [""] if is_difference else [status_shares]),
            end_section=is_difference,
        )
    contrasts = [contrast for contrast in analysis.contrasts() if contrast.split == "all"]
    tables = (table, "", _contrast_table(contrasts, figures)) if contrasts else (table,)
    advice = advise(analysis)
    certainty = [f"[bold]How sure:[/bold] {escape(printable(advice.certainty))}"] if advice.certainty else []
    return Group(*tables, "", f"[bold]Next:[/bold] {escape(printable(advice.sentence))}", *certainty)


def _figures(summaries: Sequence[ClassSummary]) -> tuple[str, ...]:
    """The figures that the table has columns of."""
    present = [figure for figure in HEADINGS if any(figure in summary.figures for summary in summaries)]
    return OF_BOTH if set(OF_BOTH) <= set(present) else tuple(present[:MAXIMUM_FIGURES])


def _summary_caption(analysis: Analysis, figures: Sequence[str]) -> str:
    """Explain the summary table, in lines that fit into 80 columns."""
    report = analysis.report
    success = success_rate(report, analysis.confidence)
    truncated = report.truncated / max(1, len(report.rollouts) + report.continuations)
    interval = "" if math.isnan(success.low) else f" ({success.low:.0%} to {success.high:.0%})"
    lines = [
        f"{len(report.rollouts)} rollouts, success rate {success.value:.0%}{interval}",
        f"{report.continuations} continuations; {truncated:.0%} of all responses cut at the length limit",
        f"{level(analysis.confidence)} intervals, clustered by question. Gap: incorrect minus correct.",
    ]
    if "update_gain" in figures:
        lines += [
            "Update gain: success gained per unit step along the update",
            "of all tokens; unbiased, so it ranks the teachers.",
            "Rewards alike: too few questions have rewards that differ.",
        ]
    if "update_alignment" in figures:
        lines += [
            "Contribution: a class's part of the gain of the whole update.",
            "Update alignment: cosine of update and success gradient.",
        ]
    if "predicted_gain" in figures:
        lines += [
            "Predicted gain: success gained per unit step along the teacher's gradient"
            + (";" if figures[0] == "predicted_gain" else ""),
            "unbiased, so it ranks the teachers." if figures[0] == "predicted_gain" else "at single tokens.",
            "Gain-weighted alignment: the share of the possible gain that the teacher",
            "delivers. Alignment: mean cosine with the ideal gradient, corrected for",
            "noise. Undef.: tokens without an alignment. Undet.: tokens with too few",
            "continuations (cont.) to tell.",
        ]
    return "\n".join(lines)


def _contrast_table(contrasts: Sequence[ClassSummary], figures: Sequence[str]) -> Table:
    title = "Difference between teachers on the same " + ("rollouts" if figures[0] == "update_gain" else "tokens")
    table = _figure_table(title, "first - second", figures)
    for contrast in contrasts:
        contrast_name = displayable(contrast.teacher, 2 * MAXIMUM_LENGTH)
        table.add_row(f"[bold]{escape(contrast_name)}[/bold]\n{verdict(contrast)}", *_figure_cells(contrast, figures))
    return table


def rules_table(scores: Sequence[RuleScore]) -> Table:
    """Tabulate rules for where to distil: for each teacher, the one with the highest gain first.

    The gain is the update gain where it was measured, and the predicted gain of single tokens elsewhere.

    Args:
        scores: Scores from :func:`~odp_callbacks.gates.scoring.score_rules`.

    Returns:
        A table that ``rich.print`` shows.
    """
    of_update = any(not math.isnan(score.update_gain.value) for score in scores)
    table = Table(box=SIMPLE_HEAVY, show_edge=False, pad_edge=False, title="Where to distil?")
    table.caption, table.min_width = _rules_caption(of_update), CAPTION_WIDTH
    table.add_column("teacher\nrule", no_wrap=True)
    headings = ["update\ngain" if of_update else "predicted\ngain", "against\nno rule"]
    headings += ["contri-\nbution"] if of_update else ["help\nkept", "harm\nremoved"]
    for heading in (*headings, "share\ntokens" if of_update else "ideal\ntokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    scores_by_teacher: dict[str, list[RuleScore]] = {}
    for score in scores:
        scores_by_teacher.setdefault(score.teacher, []).append(score)
    for teacher_scores in scores_by_teacher.values():
        ranked_scores = sorted(
            teacher_scores,
            key=lambda s: np.nan_to_num((s.update_gain if of_update else s.predicted_gain).value, nan=-np.inf),
            reverse=True,
        )
        for score in ranked_scores:
            table.add_row(*_rule_cells(score, of_update), end_section=score is ranked_scores[-1])
    return table


def _rules_caption(of_update: bool) -> str:
    lines = ["Against no rule: the difference from distilling on every token. Intervals", "are clustered by question."]
    if of_update:
        lines += [
            "Update gain: per unit step along the rule's update; of rules that are not",
            "of correctness alone, measure it with `rules=`. Contribution: of the rule's",
            "tokens to the update of all tokens; share: relative to all of it.",
        ]
    else:
        lines += [
            "Predicted gain: per unit of weight. Help kept, harm removed: shares of the",
            "teacher's help and harm. Ideal: share of the possible gain at the tokens",
            "that the rule keeps.",
        ]
    return "\n".join([*lines, "Tokens: share of tokens that it keeps."])


def _rule_cells(score: RuleScore, of_update: bool) -> tuple[str, ...]:
    gain, gained = (score.update_gain, score.update_gained) if of_update else (score.predicted_gain, score.gained)
    without_effect, repeated = gained.low == gained.high == 0, math.isnan(gained.value) and gained.note == gain.note
    cells = [
        f"[bold]{escape(displayable(score.teacher))}[/bold]\n{escape(score.rule)}",
        format_estimate(gain),
        "" if without_effect or repeated else format_estimate(gained),
    ]
    if of_update:
        cells.append(format_estimate(score.contribution))
    else:
        cells += [_percentage(score.help_kept.value), _percentage(score.harm_removed.value)]
    share = score.contribution_share if of_update else score.ideal_gain_kept
    return (*cells, f"{_percentage(share.value)}\n{_percentage(score.token_share)}")


def verdict(contrast: ClassSummary) -> str:
    """Say in words which of two teachers has the higher gain."""
    difference = contrast.figures[gain_figure([contrast])]
    if not (difference.low > 0 or difference.high < 0):
        return "no significant difference"
    return "first helps more" if difference.low > 0 else "second helps more"


def format_estimate(estimate: Estimate) -> str:
    """Write an estimate above its interval, or above the reason why there is none."""
    if math.isnan(estimate.value):
        return f"no estimate\n{_short(estimate.note)}"
    if math.isnan(estimate.low):
        return f"{estimate.value:+.3f}\n{_short(estimate.note)}"
    return f"{estimate.value:+.3f}\n{estimate.low:.2f} to {estimate.high:.2f}"


def _figure_table(title: str, first_heading: str, figures: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAVY, show_edge=False, pad_edge=False, title=title)
    table.add_column(first_heading, no_wrap=True)
    for figure in figures:
        table.add_column(HEADINGS[figure], justify="right", no_wrap=True)
    return table


def _figure_cells(summary: ClassSummary, figures: Sequence[str]) -> tuple[str, ...]:
    return tuple(format_estimate(summary.figures[figure]) for figure in figures)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _percentage(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{share:.0%}"


def _short(note: str) -> str:
    """A note in the width of a column."""
    return SHORT_NOTES.get(note, note.replace("continuations", "cont."))
