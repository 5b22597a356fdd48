"""Pictures of rollouts, with tokens coloured by their alignment.

Purple means that the teacher helps and orange that it harms; colour-blind readers can distinguish the two.
"""

import re
from functools import cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import RolloutRecord
from odp_callbacks.text import display_width, displayable
from odp_callbacks.visualization.rollout_layout import Line, break_into_lines, excerpt
from odp_callbacks.visualization.wording import level

COLOURS = "PuOr"
FRAME_COLOURS = LinearSegmentedColormap.from_list("frames", ["#b35806", "#8c8c8c", "#542788"])
"""For frames of tokens whose alignment is not significant: the ends of :data:`COLOURS`, with a middle that is visible
on white."""
MINIMUM_COLUMNS = 46
"""Width of a picture at least, so that the key fits."""
MAXIMUM_LINES, MINIMUM_LINES = 40, 4
"""Lines of a picture, which its teachers share, and lines that each teacher has at least."""
KEY = (
    "filled: the {level} interval excludes 0 · coloured frame: it includes 0\n"
    "dashed: undetermined, too few continuations · dotted: no alignment exists"
)
"""Explains how tokens are drawn."""

FONTS_OF_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip
"""By preference."""
TEMPLATE_MARK = re.compile(r"<[^<>\s]{1,40}>")
ROLES = {"assistant", "user", "system", "model"}


def most_informative_rollout(analysis: Analysis, correct: bool) -> int | None:
    """Find the rollout of a class with the most significant tokens, and among those with the most defined ones.

    Args:
        analysis: Analysis of a report.
        correct: Whether to search among the correct or the incorrect rollouts.

    Returns:
        Its index, or None if the class is empty.
    """
    report = analysis.report
    token_counts = {index: (0, 0) for index, rollout in enumerate(report.rollouts) if rollout.correct == correct}
    significant = analysis.significant_tokens().sum(axis=1)
    defined = (analysis.status == DEFINED).sum(axis=1)
    for node_index, node in enumerate(report.nodes):
        if node.rollout in token_counts:
            significant_count, defined_count = token_counts[node.rollout]
            token_counts[node.rollout] = (
                significant_count + int(significant[node_index]),
                defined_count + int(defined[node_index]),
            )
    return max(token_counts, key=lambda index: token_counts[index]) if token_counts else None


def plot_rollout(analysis: Analysis, rollout_index: int) -> Figure:
    """Plot one rollout, once for each teacher, each token coloured by its alignment with that teacher.

    A token is filled where the interval of its alignment excludes 0, and has only a coloured frame where the interval
    includes 0. A token without an alignment has a dashed frame if the continuations are too few to tell, and a dotted
    one if no alignment exists. Tokens that were not measured are plain. Of a long response, only lines with measured
    tokens are drawn.

    Args:
        analysis: Analysis of a report.
        rollout_index: Index of the rollout.
    """
    report = analysis.report
    rollout, teachers = report.rollouts[rollout_index], report.teachers
    node_indices = {node.depth: index for index, node in enumerate(report.nodes) if node.rollout == rollout_index}
    maximum_lines = max(MINIMUM_LINES, MAXIMUM_LINES // len(teachers))
    lines, hidden_tokens = excerpt(break_into_lines(rollout.pieces), set(node_indices), maximum_lines)
    title = _title(rollout)
    row_count = (len(lines) + 1) * len(teachers)
    # As wide as the text: TensorBoard scales a picture down to its card, and empty space would shrink the text.
    column_count = max([MINIMUM_COLUMNS, display_width(title), *(token.end for line in lines for token in line)])
    rollout_plot = Figure(
        figsize=(1.2 + 0.085 * column_count, 1.2 + 0.3 * row_count), facecolor="white", layout="constrained"
    )
    axes = rollout_plot.add_subplot()
    axes.set_xlim(0, column_count)
    axes.set_ylim(row_count + 0.7, -0.2)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=9, parse_math=False, family=font_families("DejaVu Sans"))
    for teacher_index in range(len(teachers)):
        _draw_response(axes, analysis, teacher_index, lines, node_indices)
    key_text = KEY.format(level=level(analysis.confidence))
    omission_note = f"\n{hidden_tokens} more measured tokens are not shown" if hidden_tokens else ""
    axes.text(0, row_count + 0.3, key_text + omission_note, fontsize=7, color="#555555", va="center", parse_math=False)
    colour_scale = ScalarMappable(Normalize(-1, 1), COLOURS)
    colour_bar = rollout_plot.colorbar(colour_scale, ax=axes, fraction=0.025, pad=0.01, ticks=np.linspace(-1, 1, 5))
    colour_bar.set_label("alignment", fontsize=8)
    colour_bar.ax.tick_params(labelsize=7)
    return rollout_plot


def _title(rollout: RolloutRecord) -> str:
    outcome = "correct" if rollout.correct else "incorrect"
    question = displayable(extract_question(rollout.prompt)[-50:], 50)
    return f"{outcome}, question {displayable(rollout.question, 16)}: {question}"


def _draw_response(
    axes: Axes, analysis: Analysis, teacher_index: int, lines: list[Line], node_indices: dict[int, int]
) -> None:
    """Draw the teacher's name and, below it, the response's lines; ``node_indices`` are those of the depths."""
    first_row = teacher_index * (len(lines) + 1)
    axes.text(
        0, first_row + 0.35, displayable(analysis.report.teachers[teacher_index], 40), fontsize=9, fontweight="bold",
        va="center", parse_math=False, family=font_families("DejaVu Sans"),
    )  # fmt: skip
    alignment = analysis.token_alignment()[:, teacher_index]
    significant = analysis.significant_tokens()[:, teacher_index]
    for line_index, line in enumerate(lines):
        for token in line:
            node_index = node_indices.get(token.depth)
            if node_index is None:
                text_colour, frame_style = "#888888", None
            else:
                status = str(analysis.status[node_index, teacher_index])
                text_colour, frame_style = _token_style(
                    status, float(alignment[node_index]), bool(significant[node_index])
                )
            axes.text(
                token.column, first_row + line_index + 1.1, token.text, fontsize=8.5, color=text_colour,
                bbox=frame_style, va="center", family=font_families("DejaVu Sans Mono"), parse_math=False,
            )  # fmt: skip


def _token_style(status: str, alignment: float, significant: bool) -> tuple[str, dict[str, Any]]:
    """Choose the colour of a measured token's text, and its frame."""
    text_colour = "black"
    frame_style: dict[str, Any] = {"pad": 1.6, "facecolor": "white"}
    if status == DEFINED and significant:
        text_colour = "white" if abs(alignment) > 0.6 else "black"
        frame_style |= {"facecolor": colormaps[COLOURS]((alignment + 1) / 2), "edgecolor": "#222222", "linewidth": 1.0}
    elif status == DEFINED:
        frame_style |= {"edgecolor": FRAME_COLOURS((alignment + 1) / 2), "linewidth": 1.6}
    else:
        frame_style |= {"edgecolor": "#666666", "linewidth": 0.8, "linestyle": ":" if status == UNDEFINED else "--"}
    return text_colour, frame_style


@cache
def font_families(first: str) -> list[str]:
    """List a font, and the installed fonts for scripts that it lacks."""
    installed = {installed_font.name for installed_font in fontManager.ttflist}
    return [first, *(font_name for font_name in FONTS_OF_OTHER_SCRIPTS if font_name in installed)]


def extract_question(prompt: str) -> str:
    r"""Find the last line of a prompt that is more than a chat template's mark.

    Examples:
        >>> extract_question("<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
        'What is 1 + 1?'
    """
    lines = [line.strip() for line in TEMPLATE_MARK.sub("", prompt).splitlines()]
    meaningful_lines = [line for line in lines if line and line not in ROLES]
    return meaningful_lines[-1] if meaningful_lines else ""
