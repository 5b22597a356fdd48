"""All pictures of a report, with the names under which loggers file them."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.card_size import fit_card


def pictures(analysis: Analysis) -> Iterator[tuple[str, Any]]:
    """Draw the pictures of a report, one by one, at the size of TensorBoard's cards.

    A picture that cannot be drawn is skipped with a warning. Without matplotlib there are none.

    Args:
        analysis: Analysis of a report, at the confidence level that the pictures are to show.

    Yields:
        The picture's name, such as ``"summary/gain"``, and a ``matplotlib.figure.Figure``.
    """
    for picture_name, draw_picture in _drawing_functions(analysis).items():
        with warnings.catch_warnings():
            # Characters that matplotlib's font lacks appear as boxes, which the training log need not mention.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            try:
                plot = draw_picture()
                plot = None if plot is None else fit_card(plot)
            except Exception as error:
                message = f"odp-callbacks: the picture {picture_name} was skipped: {type(error).__name__}: {error}"
                warnings.warn(message, stacklevel=2)
                continue
            # Within the filter, because glyphs are looked up when the picture is written.
            if plot is not None:
                yield picture_name, plot


def _drawing_functions(analysis: Analysis) -> dict[str, Callable[[], Any]]:
    """The pictures by name; loggers sort them by name, so that those of the update come first."""
    try:
        from odp_callbacks.visualization import contribution_plots, module_maps, plots
        from odp_callbacks.visualization.rollout_pictures import most_informative_rollout, plot_rollout
    except ImportError:  # matplotlib belongs to the extra `tensorboard`
        return {}
    report = analysis.report
    drawing_functions: dict[str, Callable[[], Any]] = {}
    if report.updates:
        drawing_functions["gain/all_teachers"] = partial(plots.plot_gains, analysis.summaries(), report.teachers)
        drawing_functions["gain/by_class_and_depth"] = partial(contribution_plots.plot_contributions, analysis)
        drawing_functions["gain/by_layer"] = partial(contribution_plots.plot_module_contributions, analysis)
        drawing_functions["gain/by_module"] = partial(module_maps.plot_contribution_maps, analysis)
    for split, correct in (("correct", True), ("incorrect", False)):
        rollout_index = most_informative_rollout(analysis, correct)
        if rollout_index is not None:
            drawing_functions[f"rollout/{split}"] = partial(plot_rollout, analysis, rollout_index)
    if report.updates and not report.nodes:
        return drawing_functions
    drawing_functions["summary/gain"] = partial(
        plots.plot_gains, analysis.summaries(), report.teachers, "predicted_gain"
    )
    for picture_name, figure in (("alignment", "gain_weighted_alignment"), ("gain", "predicted_gain")):
        drawing_functions[f"summary/{picture_name}_over_depth"] = partial(plots.plot_over_depth, analysis, figure)
        drawing_functions[f"summary/{picture_name}_by_module"] = partial(module_maps.plot_module_maps, analysis, figure)
    drawing_functions["summary/alignment_against_divergence"] = partial(
        plots.plot_alignment_against_divergence, analysis
    )
    return drawing_functions
