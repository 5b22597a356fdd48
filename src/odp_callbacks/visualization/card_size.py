"""Pictures at the size of TensorBoard's cards, in which they are read without a click."""

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
    plot.set_dpi(DOTS_PER_INCH)
    plot.set_figwidth(min(CARD_WIDTH, plot.get_figwidth()))
    plot.get_layout_engine().execute(plot)
    plot.set_figwidth(max(plot.get_figwidth(), plot.get_tightbbox().width + MARGIN))
    return plot
