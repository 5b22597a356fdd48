"""The pictures of a study's page."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odp_callbacks.analysis.paper.difficulty import DIFFICULTIES
from odp_callbacks.analysis.study.figures import GAP, CellSummary, FigureKey, study_estimate
from odp_callbacks.visualization.plot_style import GREY, STYLE, draw_estimate, draw_legend, to_svg

PANEL = (4.2, 2.4)
"""Inches of one panel."""


def gap_picture(cells: Sequence[CellSummary], confidence: float) -> str:
    """Incorrect minus correct of every teacher in every cell: in the paper's protocol, and by update gain.

    Returns:
        SVG.
    """
    rows = {"paper": "cosine", "update": "update_gain"}
    titles = {"paper": "mean cosine", "update": "update gain"}
    present = [name for name in rows if any(cell.measurement == name for cell in cells)]
    with rc_context(STYLE):
        plot = Figure(figsize=(2 * PANEL[0], PANEL[1] * max(1, len(present))), layout="constrained")
        grid = plot.subplots(max(1, len(present)), 1, squeeze=False)[:, 0]
        teachers: list[str] = []
        for axes, measurement in zip(grid, present, strict=False):
            chosen = [cell for cell in cells if cell.measurement == measurement]
            teachers = list(dict.fromkeys([*teachers, *(teacher for cell in chosen for teacher in cell.teachers)]))
            for place, cell in enumerate(chosen):
                for index, teacher in enumerate(teachers):
                    key = FigureKey(rows[measurement], teacher, GAP)
                    if key in cell.figures:
                        shift = (index - (len(teachers) - 1) / 2) * 0.7 / len(teachers)
                        estimate = study_estimate(cell.figures[key], confidence)
                        draw_estimate(axes, estimate, place + shift, index, horizontal=False)
            _finish(axes, [f"{cell.student}\n{cell.task}" for cell in chosen])
            axes.set_ylabel(f"incorrect - correct\n{titles[measurement]}")
        draw_legend(plot, teachers)
        return to_svg(plot)


def where_picture(cells: Sequence[CellSummary], confidence: float) -> str:
    """Mean cosine by difficulty of the question and by depth of the token, mean of the teachers.

    Returns:
        SVG.
    """
    chosen = [cell for cell in cells if cell.measurement == "paper"]
    depths = list(dict.fromkeys(k.paths for cell in chosen for k in cell.figures if k.paths.startswith("depth ")))
    depths.sort(key=lambda window: int(window.removeprefix("depth ").split("-")[0].rstrip("+")))
    with rc_context(STYLE):
        plot = Figure(figsize=(2 * PANEL[0], PANEL[1] * 1.2), layout="constrained")
        for axes, groups in zip(plot.subplots(1, 2, sharey=True), (DIFFICULTIES, depths), strict=True):
            for index, cell in enumerate(chosen):
                for place, group in enumerate(groups):
                    key = FigureKey("cosine", paths=group)
                    if key in cell.figures:
                        shift = (index - (len(chosen) - 1) / 2) * 0.6 / max(1, len(chosen))
                        draw_estimate(
                            axes, study_estimate(cell.figures[key], confidence), place + shift, index, horizontal=False
                        )
            _finish(axes, [group.removeprefix("depth ") for group in groups])
        axes = plot.axes[0]
        axes.set_ylabel("mean cosine")
        axes.set_xlabel("difficulty of the question")
        plot.axes[1].set_xlabel("depth of the token")
        draw_legend(plot, [f"{cell.student} {cell.task}" for cell in chosen])
        return to_svg(plot)


def _finish(axes: Axes, labels: Sequence[str]) -> None:
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_xlim(-0.5, max(0.5, len(labels) - 0.5))
