"""A report as plain text, for loggers that show text."""

import io
import math
from collections.abc import Sequence

from odp_callbacks.analysis.summaries import Analysis, ClassSummary
from odp_callbacks.text import printable
from odp_callbacks.visualization.wording import class_title, figure_title, level, shared_gain_figure


def table_text(analysis: Analysis) -> str:
    """Render the summary table as plain text; an empty string if rich is not installed."""
    try:
        from rich.console import Console

        from odp_callbacks.visualization.table import tabulate
    except ImportError:  # rich belongs to the extras
        return ""
    text_buffer = io.StringIO()
    # In a notebook rich would show the table instead of writing it.
    Console(file=text_buffer, width=110, color_system=None, force_jupyter=False).print(tabulate(analysis))
    return text_buffer.getvalue()


def changes_text(previous: Sequence[ClassSummary], current: Sequence[ClassSummary], confidence: float = 0.95) -> str:
    """Describe the change in gain between two probes: in update gain if both measured it, else in predicted gain.

    The probes are treated as independent, since they ask different questions.

    Args:
        previous: Summaries of the earlier probe.
        current: Summaries of the later probe, of the same teachers.
        confidence: Confidence level of the summaries' intervals, in (0, 1).
    """
    figure = shared_gain_figure(previous, current)
    if not figure:
        return "The previous probe measured another figure, so there is no change to tell."
    previous_gains = {(summary.teacher, summary.split): summary.figures[figure] for summary in previous}
    lines = [f"Change in {figure_title(figure)} since the previous probe, with {level(confidence)} intervals", ""]
    for summary in current:
        previous_gain, current_gain = previous_gains[summary.teacher, summary.split], summary.figures[figure]
        change = current_gain.minus_independent(previous_gain)
        if math.isnan(change.value):
            outcome = "not comparable, because an estimate is missing"
        elif math.isnan(change.low):
            outcome = f"change {change.value:+.3f}, without an interval"
        else:
            verdict = "rose" if change.low > 0 else "fell" if change.high < 0 else "no significant change"
            outcome = f"change {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f}): {verdict}"
        class_name = class_title(summary.split)
        lines.append(
            f"{summary.teacher}, {class_name}: {previous_gain.value:+.3f} to {current_gain.value:+.3f}, {outcome}"
        )
    return "\n".join(lines)


def as_code(text: str) -> str:
    r"""Indent text as a Markdown code block, since TensorBoard renders Markdown.

    Examples:
        >>> as_code("a\n<b>")
        '    a\n    <b>'
    """
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))
