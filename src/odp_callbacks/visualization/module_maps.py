"""Maps of a figure over the LoRA modules: layers from left to right, kinds of module from top to bottom."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.module_names import module_positions
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import Floats
from odp_callbacks.text import displayable
from odp_callbacks.visualization.plot_style import GREY, STYLE, WIDTH, uncorrected_where_withheld
from odp_callbacks.visualization.wording import figure_title

MAXIMUM_KINDS = 12
"""Kinds of module that a map has rows for; if there are more, the strongest are drawn."""
MAXIMUM_LABELS = 12
"""Labels on the axis of layers."""
MAXIMUM_OUTLINED_LAYERS = 40
"""Layers up to which cells are wide enough to be outlined."""


@dataclass(frozen=True)
class ModuleGrid:
    """A figure of ``K`` teachers on a grid of ``R`` kinds of module and ``L`` layers.

    Attributes:
        layers: The layers' numbers, ascending; -1 for modules outside of the layers.
        kinds: The kinds of module, such as ``"self_attn.q_proj"``.
        values: ``(K, R, L)`` float64; NaN where there is no such module, or no estimate.
        significant: ``(K, R, L)`` bool, whether the interval excludes 0.
        uncorrected: ``(K, R, L)`` bool, whether the value is shown without its noise correction.
    """

    layers: list[int]
    kinds: list[str]
    values: Floats
    significant: NDArray[np.bool_]
    uncorrected: NDArray[np.bool_]


def plot_module_maps(analysis: Analysis, figure: str = "gain_weighted_alignment") -> Figure | None:
    """Plot a figure on the parameters of each LoRA module alone, as one map for each teacher.

    A dot marks a cell whose interval excludes 0. A striped cell shows the uncorrected figure where it is withheld.

    Args:
        analysis: Analysis of a report.
        figure: Name of the figure.

    Returns:
        The plot, or None if the gradients were not measured by module.
    """
    if len(analysis.report.modules) < 2:
        return None
    return _plot_maps(analysis, arrange_modules(analysis, figure), figure, is_cosine=figure != "predicted_gain")


def plot_contribution_maps(analysis: Analysis) -> Figure | None:
    """Plot what the parameters of each LoRA module contribute to the update, as one map for each teacher.

    The cells of a map add up to the contribution of the whole update.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None if contributions were not measured by module, have no numbers, or are of a single module.
    """
    contributions = analysis.module_contributions
    if contributions is None or len(contributions.modules) < 2 or not contributions.have_numbers:
        return None
    estimates = {
        (teacher, part.split): estimate
        for part in contributions.modules
        for teacher, estimate in zip(analysis.report.teachers, part.estimates, strict=True)
    }
    modules = tuple(part.split for part in contributions.modules)
    grid = _arrange(analysis.report.teachers, modules, estimates)
    return _plot_maps(analysis, grid, "contribution", is_cosine=False)


def _plot_maps(analysis: Analysis, grid: ModuleGrid, figure: str, *, is_cosine: bool) -> Figure:
    """Draw the maps of all teachers on one scale of colours, which for a cosine ends at 1."""
    teachers = analysis.report.teachers
    largest_value = 1.0
    if not is_cosine:
        largest_value = float(np.abs(grid.values[np.isfinite(grid.values)]).max(initial=0)) or 1.0
    with rc_context(STYLE):
        minimum_height = 1.05 + (0.32 + 0.22 * len(grid.kinds)) * len(teachers)
        module_plot = Figure(figsize=(WIDTH, max(2.4, minimum_height)), layout="constrained")
        map_axes = module_plot.subplots(len(teachers), sharex=True, squeeze=False)[:, 0]
        for teacher_index, axes in enumerate(map_axes):
            colour_mesh = _draw_map(axes, grid, teacher_index, largest_value)
            axes.set_title(displayable(teachers[teacher_index], 40), fontsize=9, loc="left", pad=3)
        label_interval = -(-len(grid.layers) // MAXIMUM_LABELS)
        layer_labels = ["none" if layer < 0 else str(layer) for layer in grid.layers]
        map_axes[-1].set_xticks(
            np.arange(0, len(grid.layers), label_interval) + 0.5, layer_labels[::label_interval], fontsize=8
        )
        stripes_key = "\nstriped: not corrected for noise" if grid.uncorrected.any() else ""
        map_axes[-1].set_xlabel(f"layer\ndot: interval excludes 0{stripes_key}", fontsize=9)
        module_plot.colorbar(colour_mesh, ax=list(map_axes), label=figure_title(figure))
        return module_plot


def _draw_map(axes: Axes, grid: ModuleGrid, teacher_index: int, largest_value: float) -> QuadMesh:
    """Draw the map of one teacher on a colour scale from ``-largest_value`` to ``largest_value``."""
    values, layer_count = grid.values[teacher_index], len(grid.layers)
    # Narrow cells have no room for outlines, and only for small dots.
    outlined = layer_count <= MAXIMUM_OUTLINED_LAYERS
    dot_area = 8.0 if outlined else 8.0 * MAXIMUM_OUTLINED_LAYERS / layer_count
    colour_mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap="PuOr", vmin=-largest_value, vmax=largest_value,
        edgecolor=GREY if outlined else "face", lw=0.3,
    )  # fmt: skip
    for cell_row, cell_column in zip(*np.nonzero(grid.uncorrected[teacher_index]), strict=True):
        axes.add_patch(
            Rectangle((cell_column, cell_row), 1, 1, hatch="////", fill=False, edgecolor=GREY, lw=0, alpha=0.7)
        )
    dot_rows, dot_columns = np.nonzero(grid.significant[teacher_index])
    dot_colours = np.where(np.abs(values[dot_rows, dot_columns]) > 0.6 * largest_value, "white", "black")
    axes.scatter(dot_columns + 0.5, dot_rows + 0.5, s=dot_area, c=dot_colours.tolist())
    axes.set_yticks(np.arange(len(grid.kinds)) + 0.5, [displayable(kind, 24) for kind in grid.kinds], fontsize=8)
    axes.invert_yaxis()
    return colour_mesh


def arrange_modules(analysis: Analysis, figure: str) -> ModuleGrid:
    """Arrange a figure of each module on a grid of layers and kinds of module."""
    report = analysis.report
    summaries = analysis.summaries("module")
    corrected = {(summary.teacher, summary.split): summary.figures[figure] for summary in summaries}
    return _arrange(report.teachers, report.modules, corrected)


def _arrange(
    teachers: tuple[str, ...], modules: tuple[str, ...], corrected: Mapping[tuple[str, str], Estimate]
) -> ModuleGrid:
    """Arrange estimates, by teacher and module, on the grid."""
    estimates = {key: uncorrected_where_withheld(estimate) for key, estimate in corrected.items()}
    positions = module_positions(modules)
    layers = sorted({layer for layer, _ in positions.values()})
    strength = dict.fromkeys((kind for _, kind in positions.values()), 0.0)
    for (_, module), estimate in estimates.items():
        strength[positions[module][1]] += abs(estimate.value) if np.isfinite(estimate.value) else 0.0
    strongest = sorted(strength, key=lambda kind: -strength[kind])[:MAXIMUM_KINDS]
    kinds = [kind for kind in strength if kind in strongest]
    shape = len(teachers), len(kinds), len(layers)
    grid = ModuleGrid(layers, kinds, np.full(shape, np.nan), np.zeros(shape, bool), np.zeros(shape, bool))
    for teacher_index, teacher in enumerate(teachers):
        for module, (layer, kind) in positions.items():
            if kind not in kinds:
                continue
            estimate, is_withheld = estimates[teacher, module], np.isnan(corrected[teacher, module].value)
            cell = teacher_index, kinds.index(kind), layers.index(layer)
            grid.values[cell] = estimate.value
            grid.significant[cell] = estimate.low > 0 or estimate.high < 0
            grid.uncorrected[cell] = is_withheld and np.isfinite(estimate.value)
    return grid
