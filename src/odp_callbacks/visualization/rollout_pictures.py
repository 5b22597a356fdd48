"""A rollout as a picture, its tokens coloured by alignment. Purple helps and orange hurts, for any eyes."""

import re
from functools import cache

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.text import shown, wide

COLOURS = "PuOr"
FRAMES = LinearSegmentedColormap.from_list("frames", ["#b35806", "#8c8c8c", "#542788"])
"""Of the frames around tokens whose side is not sure: the same ends, and a middle that is seen on white."""
LINE, LEAST_LINE = 88, 40
"""Columns: the longest that a line gets, and the shortest that a picture is wide."""
MOST_LINES, LEAST_LINES = 40, 4
"""Lines of a picture, shared by its teachers, and how many each has at least."""
KEY = "filled: {sure:g} % sure of the side · coloured frame: not sure\ndashed: cannot tell · dotted: no alignment here"

OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of other scripts, by preference."""
MARK = re.compile(r"<[^<>\s]{1,40}>")
ROLES = {"assistant", "user", "system", "model"}

Line = list[tuple[int, int, str]]


def telling_rollout(analysis: Analysis, correct: bool) -> int | None:
    """The rollout of this class with the most tokens whose side is sure, then that have an alignment; None if none."""
    report = analysis.report
    counts = {i: (0, 0) for i, rollout in enumerate(report.rollouts) if rollout.correct == correct}
    sure, defined = analysis.sure().sum(axis=1), (analysis.status == DEFINED).sum(axis=1)
    for n, node in enumerate(report.nodes):
        if node.rollout in counts:
            before = counts[node.rollout]
            counts[node.rollout] = before[0] + int(sure[n]), before[1] + int(defined[n])
    return max(counts, key=lambda i: counts[i]) if counts else None


def rollout_figure(analysis: Analysis, index: int) -> Figure:
    """One rollout, once for each teacher, each token coloured by its alignment with that teacher.

    A token is filled with its colour where its interval excludes 0, and only framed in it where not. One without an
    alignment has a dashed frame if the continuations cannot tell, a dotted one if no alignment exists. Tokens that were
    not measured are plain; of a long response only lines with measured tokens are shown.

    Args:
        analysis: Of a probe's report.
        index: Which of its rollouts.
    """
    report = analysis.report
    rollout, teachers = report.rollouts[index], report.teachers
    place = {node.depth: n for n, node in enumerate(report.nodes) if node.rollout == index}
    alignment, status, sure = analysis.token_alignment(), analysis.status, analysis.sure()
    lines, hidden = _excerpt(_lines(rollout.pieces), set(place), max(LEAST_LINES, MOST_LINES // len(teachers)))
    rows = len(lines) + 1
    # As wide as the text: TensorBoard shrinks a picture to its card, and empty space would shrink the words.
    said = "correct" if rollout.correct else "incorrect"
    asked = shown(question_of(rollout.prompt)[-50:], 50)
    title = f"{said}, question {shown(rollout.question, 16)}: {asked}"
    columns = max([LEAST_LINE, wide(title), *(x + wide(piece) + 1 for line in lines for x, _, piece in line)])
    figure = Figure(figsize=(1.2 + 0.085 * columns, 1.2 + 0.3 * rows * len(teachers)), facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, columns)
    axes.set_ylim(rows * len(teachers) + 0.7, -0.2)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=9, parse_math=False, family=fonts("DejaVu Sans"))
    for k, teacher in enumerate(teachers):
        top = k * rows
        axes.text(
            0,
            top + 0.35,
            shown(teacher, 40),
            fontsize=9,
            fontweight="bold",
            va="center",
            parse_math=False,
            family=fonts("DejaVu Sans"),
        )
        for row, line in enumerate(lines):
            for x, depth, piece in line:
                n = place.get(depth)
                known = "" if n is None else str(status[n, k])
                value = 0.0 if n is None else float(alignment[n, k])
                _token(axes, x, top + row + 1.1, piece, known, value, n is not None and bool(sure[n, k]))
    key = KEY.format(sure=100 * analysis.confidence)
    more = f"; {hidden} more measured tokens are not shown" if hidden else ""
    axes.text(0, rows * len(teachers) + 0.3, key + more, fontsize=7, color="#555555", va="center", parse_math=False)
    scale = ScalarMappable(Normalize(-1, 1), COLOURS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.01, ticks=np.linspace(-1, 1, 5))
    bar.set_label("alignment", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


@cache
def fonts(first: str) -> list[str]:
    """A font, and what is installed for scripts that it lacks."""
    there = {font.name for font in fontManager.ttflist}
    return [first, *(name for name in OTHERS if name in there)]


def question_of(prompt: str) -> str:
    r"""The last line of a prompt that is not only a chat template's mark.

    Examples:
        >>> question_of("<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
        'What is 1 + 1?'
    """
    lines = [line.strip() for line in MARK.sub("", prompt).splitlines()]
    said = [line for line in lines if line and line not in ROLES]
    return said[-1] if said else ""


def _token(axes: Axes, x: float, y: float, piece: str, known: str, value: float, sure: bool) -> None:
    box, colour = None, "black" if known else "#888888"
    if known == DEFINED and sure:
        box = {"facecolor": colormaps[COLOURS]((value + 1) / 2), "edgecolor": "#222222", "linewidth": 1.0}
        colour = "white" if abs(value) > 0.6 else "black"
    elif known == DEFINED:
        box = {"facecolor": "white", "edgecolor": FRAMES((value + 1) / 2), "linewidth": 1.6}
    elif known:
        box = {"facecolor": "white", "edgecolor": "#666666", "linewidth": 0.8}
        box["linestyle"] = ":" if known == UNDEFINED else "--"
    box = box and {**box, "pad": 1.6}
    family = fonts("DejaVu Sans Mono")
    axes.text(x, y, piece, fontsize=8.5, family=family, color=colour, bbox=box, va="center", parse_math=False)


def _lines(pieces: tuple[str, ...]) -> list[Line]:
    """Lay pieces out on lines: ``(column, depth, shown)``; white space is shown by its sign."""
    lines: list[Line] = [[]]
    column = 0
    for depth, piece in enumerate(pieces):
        text = shown(piece, 40).replace(" ", "·").replace("␣", "·") or "∅"
        if column + wide(text) > LINE - 2 and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, depth, text))
        column += wide(text) + 1
    return lines


def _excerpt(lines: list[Line], measured: set[int], most: int) -> tuple[list[Line], int]:
    """The lines with measured tokens, an ellipsis for each gap, and how many measured tokens did not fit."""
    found: list[Line] = []
    skipped, hidden = False, 0
    for line in lines:
        here = sum(depth in measured for _, depth, _ in line)
        if here and len(found) + skipped < most:
            found += [[(0, -1, "…")]] * skipped + [line]
            skipped = False
        else:
            skipped = True
            hidden += here
    return found + [[(0, -1, "…")]] * skipped, hidden
