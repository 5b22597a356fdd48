"""Pictures of a probe, as matplotlib figures. Purple helps, orange hurts: told apart by colour-blind eyes too."""

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from odp_callbacks.estimates import DEFINED, UNDEFINED, statuses
from odp_callbacks.evidence import gather
from odp_callbacks.records import ProbeReport

COLOURS = "PuOr"
LINE, MIN_LINE = 88, 36  # characters: the longest a line gets, and the shortest a picture is wide


def telling_rollout(report: ProbeReport, correct: bool) -> int | None:
    """The rollout of this class with the most nodes that have an alignment; None if the class is empty."""
    counts = {i: 0 for i, rollout in enumerate(report.rollouts) if rollout.correct == correct}
    defined = (statuses(gather(report.nodes, teachers=len(report.teachers))) == DEFINED).sum(axis=1)
    for node, count in zip(report.nodes, defined, strict=True):
        if node.rollout in counts:
            counts[node.rollout] += int(count)
    return max(counts, key=lambda i: counts[i]) if counts else None


def rollout_figure(report: ProbeReport, index: int) -> Figure:
    """One rollout, once for each teacher, each token coloured by its alignment with that teacher.

    Tokens that were not measured are plain; measured ones without an alignment have a dashed frame if undetermined, a
    dotted one if undefined.

    Args:
        report: A probe's report.
        index: Which of its rollouts.
    """
    rollout = report.rollouts[index]
    here = [n for n in report.nodes if n.rollout == index]
    evidence = gather(here, teachers=len(report.teachers))
    cosine, status = evidence.cosine, statuses(evidence)
    place = {node.depth: n for n, node in enumerate(here)}
    lines = _lines(rollout.pieces)
    height = 0.9 + 0.3 * (len(lines) + 1) * len(report.teachers)
    # As wide as the text: TensorBoard shrinks a picture to its card, and empty space would shrink the words.
    columns = max([MIN_LINE, *(x + len(piece) + 1 for line in lines for x, _, piece in line)])
    figure = Figure(figsize=(1.2 + 0.1 * columns, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, columns)
    axes.set_ylim((len(lines) + 1) * len(report.teachers), -0.2)
    axes.axis("off")
    said = "correct" if rollout.correct else "incorrect"
    question = rollout.prompt.strip().splitlines()[-1] if rollout.prompt.strip() else rollout.prompt
    # A dollar sign would start matplotlib's mathematics.
    axes.set_title(f"{said}, question {rollout.question}: {question[-70:]}".replace("$", r"\$"), loc="left", fontsize=9)
    for k, teacher in enumerate(report.teachers):
        top = k * (len(lines) + 1)
        axes.text(0, top + 0.35, teacher, fontsize=9, fontweight="bold", va="center", parse_math=False)
        for row, line in enumerate(lines):
            for x, depth, piece in line:
                n = place.get(depth)
                box = None
                colour = "#888888"
                if n is not None:
                    value, known = float(cosine[n, k]), str(status[n, k])
                    style = {DEFINED: "-", UNDEFINED: ":"}.get(known, "--")
                    face = colormaps[COLOURS]((value + 1) / 2) if known == DEFINED else "white"
                    box = {"facecolor": face, "edgecolor": "#666666", "linestyle": style, "pad": 1.6, "linewidth": 0.7}
                    colour = "white" if known == DEFINED and abs(value) > 0.6 else "black"
                axes.text(
                    x,
                    top + row + 1.1,
                    piece,
                    fontsize=8.5,
                    family="monospace",
                    color=colour,
                    bbox=box,
                    va="center",
                    parse_math=False,
                )
    scale = ScalarMappable(Normalize(-1, 1), COLOURS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.01, ticks=np.linspace(-1, 1, 5))
    bar.set_label("alignment", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _lines(pieces: tuple[str, ...]) -> list[list[tuple[int, int, str]]]:
    """Lay pieces out on lines: ``(column, depth, shown)``; white space is shown by its sign."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for depth, piece in enumerate(pieces):
        shown = piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"
        shown = "".join(c if c.isprintable() else "�" for c in shown)[:40]
        if column + len(shown) > LINE - 2 and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, depth, shown))
        column += len(shown) + 1
    return lines
