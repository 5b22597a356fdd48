"""Pictures at the size of TensorBoard's cards, in which they are read without a click."""

import warnings
from typing import Any

CARD_WIDTH = 3.6
"""Inches. A card is 350 to 400 pixels wide, so text of 8 points in a picture of this width is 11 pixels high there."""
DOTS_PER_INCH = 150
"""More than a card shows, for screens with small pixels and for the enlarged picture."""
MARGIN = 0.1
"""Inches beside what sticks out."""


def fit_card(plot: Any) -> Any:
    """Make a plot as wide as a card, or as little wider as its text needs, and return it.

    Args:
        plot: A ``matplotlib.figure.Figure`` whose layout is constrained. Its height stays.
    """
    own_width = plot.get_figwidth()
    plot.set_dpi(DOTS_PER_INCH)
    plot.set_figwidth(min(CARD_WIDTH, own_width))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout not applied")
        try:
            plot.get_layout_engine().execute(plot)
        except UserWarning:  # the text leaves no room for the axes
            plot.set_figwidth(own_width)
    plot.set_figwidth(max(plot.get_figwidth(), plot.get_tightbbox().width + MARGIN))
    return plot
