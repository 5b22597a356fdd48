"""Pictures of rollouts, with every token coloured by its influence, or measured tokens by their alignment.

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

from odp_callbacks.analysis.contributions import ReportInfluence
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import RolloutRecord
from odp_callbacks.text import display_width, displayable
from odp_callbacks.visualization.rollout_layout import Line, break_into_lines, excerpt, most_important_lines
from odp_callbacks.visualization.wording import level

COLOURS = "PuOr"
FRAME_COLOURS = LinearSegmentedColormap.from_list("frames", ["#b35806", "#8c8c8c", "#542788"])
"""For frames of tokens whose alignment is not significant: the ends of :data:`COLOURS`, with a middle that is visible
on white."""
MINIMUM_COLUMNS = 40
"""Width of a picture at least, so that the key fits."""
MAXIMUM_LINES, MINIMUM_LINES = 40, 4
"""Lines of a picture, which its teachers share, and lines that each teacher has at least."""
KEY = (
    "filled: the {level} interval excludes 0\n"
    "coloured frame: it includes 0\n"
    "dashed: undetermined, too few continuations\n"
    "dotted: no alignment exists"
)
"""Explains how tokens are drawn that are coloured by their alignment."""
INFLUENCE_KEY = (
    "influence: what distilling on a token adds\n"
    "to the success of other questions\n"
    "filled: the {level} interval excludes 0\n"
    "coloured frame: it includes 0"
)
"""Explains how tokens are drawn that are coloured by their influence."""

FONTS_OF_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip
"""By preference."""
TEMPLATE_MARK = re.compile(r"<[^<>\s]{1,40}>")
ROLES = {"assistant", "user", "system", "model"}


FRAME = {"pad": 1.6, "facecolor": "white"}
Style = tuple[str, dict[str, Any] | None]
"""Colour of a token's text, and its frame."""


def most_informative_rollout(analysis: Analysis, correct: bool) -> int | None:
    """Find the rollout of a class with the most significant tokens.

    Among those, it is the one with the largest influence, or where no influence was measured, the one with the most
    defined tokens.

    Args:
        analysis: Analysis of a report.
        correct: Whether to search among the correct or the incorrect rollouts.

    Returns:
        Its index, or None if the class is empty.
    """
    rollouts = [index for index, rollout in enumerate(analysis.report.rollouts) if rollout.correct == correct]
    ranks = _influence_ranks(analysis, rollouts) or _alignment_ranks(analysis)
    return max(rollouts, key=lambda index: ranks.get(index, (0, 0.0))) if rollouts else None


def _influence_ranks(analysis: Analysis, rollouts: list[int]) -> dict[int, tuple[int, float]]:
    """Significant tokens and sum of absolute influences of each rollout; empty without influences."""
    influence = analysis.influence
    if influence is None:
        return {}
    significant, sizes = influence.significant.sum(axis=1), np.nan_to_num(np.abs(influence.value)).sum(axis=1)
    places = {index: influence.tokens_of(index) for index in rollouts}
    return {index: (int(significant[place].sum()), float(sizes[place].sum())) for index, place in places.items()}


def _alignment_ranks(analysis: Analysis) -> dict[int, tuple[int, float]]:
    """Number of significant and of defined tokens of each rollout that has nodes."""
    ranks: dict[int, tuple[int, float]] = {}
    significant = analysis.significant_tokens().sum(axis=1)
    defined = (analysis.status == DEFINED).sum(axis=1)
    for node_index, node in enumerate(analysis.report.nodes):
        significant_count, defined_count = ranks.get(node.rollout, (0, 0.0))
        ranks[node.rollout] = (
            significant_count + int(significant[node_index]),
            defined_count + float(defined[node_index]),
        )
    return ranks


def plot_rollout(analysis: Analysis, rollout_index: int) -> Figure:
    """Plot one rollout, once for each teacher, each token coloured by its influence, or else by its alignment.

    A token is filled where the interval of its figure excludes 0, and has only a coloured frame where the interval
    includes 0. Where influences were measured, every token has one, and of a long response the lines of the largest
    influence are drawn. Otherwise tokens that were not measured are plain, and of a long response only lines with
    measured tokens are drawn. A measured token without an alignment has a dashed frame if the continuations are too few
    to tell, and a dotted one if no alignment exists.

    Args:
        analysis: Analysis of a report.
        rollout_index: Index of the rollout.
    """
    rollout, influence = analysis.report.rollouts[rollout_index], analysis.influence
    maximum_lines = max(MINIMUM_LINES, MAXIMUM_LINES // len(analysis.report.teachers))
    lines = break_into_lines(rollout.pieces)
    key_level = level(analysis.confidence)
    if influence is not None and np.isfinite(influence.value[influence.tokens_of(rollout_index)]).any():
        sizes = np.nan_to_num(np.abs(influence.value[influence.tokens_of(rollout_index)])).max(axis=1)
        lines, hidden = most_important_lines(lines, sizes.tolist(), maximum_lines)
        styles = _influence_styles(influence, rollout_index)
        note = f"\n{hidden} more tokens, of smaller influence, are not shown" if hidden else ""
        return _draw(analysis, rollout, lines, styles, INFLUENCE_KEY.format(level=key_level) + note, influence.scale)
    styles = _alignment_styles(analysis, rollout_index)
    lines, hidden = excerpt(lines, set(styles[0]), maximum_lines)
    note = f"\n{hidden} more measured tokens are not shown" if hidden else ""
    return _draw(analysis, rollout, lines, styles, KEY.format(level=key_level) + note, None)


def _influence_styles(influence: ReportInfluence, rollout_index: int) -> list[dict[int, Style]]:
    """Styles of a rollout's tokens by depth, for each teacher."""
    place = influence.tokens_of(rollout_index)
    shares = (influence.value[place] / influence.scale).clip(-1, 1)
    significant = influence.significant[place]
    return [
        {
            depth: _defined_style(float(shares[depth, teacher_index]), bool(significant[depth, teacher_index]), 1.0)
            for depth in np.flatnonzero(np.isfinite(shares[:, teacher_index])).tolist()
        }
        for teacher_index in range(shares.shape[1])
    ]


def _alignment_styles(analysis: Analysis, rollout_index: int) -> list[dict[int, Style]]:
    """Styles of a rollout's measured tokens by depth, for each teacher."""
    nodes = [(index, node.depth) for index, node in enumerate(analysis.report.nodes) if node.rollout == rollout_index]
    alignment, significant = analysis.token_alignment(), analysis.significant_tokens()
    return [
        {
            depth: _token_style(
                str(analysis.status[index, teacher_index]),
                float(alignment[index, teacher_index]),
                bool(significant[index, teacher_index]),
            )
            for index, depth in nodes
        }
        for teacher_index in range(len(analysis.report.teachers))
    ]


def _draw(
    analysis: Analysis,
    rollout: RolloutRecord,
    lines: list[Line],
    styles: list[dict[int, Style]],
    key: str,
    influence_scale: float | None,
) -> Figure:
    """Draw the response once for each teacher; ``influence_scale`` is None for colours that stand for alignments."""
    teachers = analysis.report.teachers
    title = _title(rollout)
    row_count = (len(lines) + 1) * len(teachers)
    # As wide as the text: TensorBoard scales a picture down to its card, and empty space would shrink the text.
    widths = [display_width(row) for row in title.splitlines()]
    column_count = max([MINIMUM_COLUMNS, *widths, *(token.end for line in lines for token in line)])
    key_rows = 0.6 * (1 + key.count("\n"))
    rollout_plot = Figure(
        figsize=(0.2 + 0.085 * column_count, 1.3 + 0.3 * (row_count + key_rows)),
        facecolor="white",
        layout="constrained",
    )
    axes = rollout_plot.add_subplot()
    axes.set_xlim(0, column_count)
    axes.set_ylim(row_count + key_rows, -0.2)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=9, parse_math=False, family=font_families("DejaVu Sans"))
    for teacher_index, teacher in enumerate(teachers):
        _draw_response(axes, teacher, teacher_index * (len(lines) + 1), lines, styles[teacher_index])
    axes.text(0, row_count, key, fontsize=8, color="#555555", va="top", parse_math=False)
    colour_scale = ScalarMappable(Normalize(-1, 1), COLOURS)
    places = np.linspace(-1, 1, 3)
    colour_bar = rollout_plot.colorbar(colour_scale, ax=axes, location="bottom", aspect=30, pad=0.01, ticks=places)
    if influence_scale is not None:
        ends = [f"{share * influence_scale:+.1e}" if share else "0" for share in places]
        colour_bar.set_ticks(places.tolist(), labels=[f"≤{ends[0]}", *ends[1:-1], f"≥{ends[-1]}"])
    colour_bar.set_label("alignment" if influence_scale is None else "influence", fontsize=8)
    colour_bar.ax.tick_params(labelsize=8)
    return rollout_plot


def _title(rollout: RolloutRecord) -> str:
    outcome = "correct" if rollout.correct else "incorrect"
    question = displayable(extract_question(rollout.prompt)[-_characters_in(rollout.prompt, 44) :], 44)
    name = displayable(rollout.question, _characters_in(rollout.question, 16))
    return f"{outcome}, question {name}:\n{question}"


def _characters_in(text: str, columns: int) -> int:
    """How many characters of a text may be drawn in these columns: half as many if they are wide."""
    return columns // 2 if display_width(text) > len(text) else columns


def _draw_response(axes: Axes, teacher: str, first_row: int, lines: list[Line], styles: dict[int, Style]) -> None:
    """Draw the teacher's name and, below it, the response's lines; ``styles`` are those of the tokens by depth."""
    axes.text(
        0, first_row + 0.35, displayable(teacher, _characters_in(teacher, 40)), fontsize=9, fontweight="bold",
        va="center", parse_math=False, family=font_families("DejaVu Sans"),
    )  # fmt: skip
    for line_index, line in enumerate(lines):
        for token in line:
            text_colour, frame_style = styles.get(token.depth, ("#888888", None))
            axes.text(
                token.column, first_row + line_index + 1.1, token.text, fontsize=8.5, color=text_colour,
                bbox=frame_style, va="center", family=font_families("DejaVu Sans Mono"), parse_math=False,
            )  # fmt: skip


def _token_style(status: str, alignment: float, significant: bool) -> Style:
    """Choose the colour of a measured token's text, and its frame."""
    if status == DEFINED:
        return _defined_style(alignment, significant, 1.6)
    linestyle = ":" if status == UNDEFINED else "--"
    return "black", {**FRAME, "edgecolor": "#666666", "linewidth": 0.8, "linestyle": linestyle}


def _defined_style(share: float, significant: bool, frame_width: float) -> Style:
    """Style of a token with a figure, given as a share of the largest colour, from -1 to 1."""
    if significant:
        text_colour = "white" if abs(share) > 0.6 else "black"
        return text_colour, {
            **FRAME, "facecolor": colormaps[COLOURS]((share + 1) / 2), "edgecolor": "#222222", "linewidth": 1.0,
        }  # fmt: skip
    return "black", {**FRAME, "edgecolor": FRAME_COLOURS((share + 1) / 2), "linewidth": frame_width}


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
