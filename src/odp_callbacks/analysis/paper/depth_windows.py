"""Depth windows, and the positions that rank highest in each of them."""

import numpy as np

from odp_callbacks.records import Floats


def depth_windows(length: int, first_window: int = 50) -> list[range]:
    """Windows of depth, each twice as wide as the one before: tokens 1 to 50, 51 to 150, 151 to 350, and so on.

    Source: arXiv:2605.10889.

    Args:
        length: Number of tokens of a path.
        first_window: Width of the first window.

    Returns:
        Ranges of depths that cover the path. Depths start at 0, so that the paper's token 1 has depth 0.

    Examples:
        >>> depth_windows(400)
        [range(0, 50), range(50, 150), range(150, 350), range(350, 400)]
    """
    windows, start, width = [], 0, first_window
    while start < length:
        windows.append(range(start, min(start + width, length)))
        start, width = start + width, 2 * width
    return windows


def ranked_depths(
    gradient_size: Floats, policy_difference: Floats, by_gradient: int, by_difference: int, first_window: int = 50
) -> tuple[int, ...]:
    """The depths of a path that rank highest in each window.

    In each window, the paper takes k tokens by the size of the GKD gradient on the logits and r by
    ``|P_te - P_theta|``. They are ranked, not drawn: there are no inclusion probabilities, and a mean over these
    tokens is no mean over the path's tokens. The paper publishes neither k nor r.

    Args:
        gradient_size: ``(T,)``, norm of the GKD gradient at each depth.
        policy_difference: ``(T,)``, size of the difference of the two policies at each depth.
        by_gradient: k, the number of depths in each window with the largest gradients.
        by_difference: r, the number of depths in each window with the largest differences.
        first_window: Width of the first window.

    Returns:
        Depths in ascending order, without repetition. Of equal depths in the ranking the earlier comes first. A depth
        at which the figure is 0 is not taken, because the teacher agrees with the student there.

    Examples:
        >>> ranked_depths(np.array([0.1, 0.3, 0.2]), np.array([0.5, 0.0, 0.0]), by_gradient=1, by_difference=1)
        (0, 1)
    """
    chosen: set[int] = set()
    for window in depth_windows(len(gradient_size), first_window):
        for values, count in ((gradient_size, by_gradient), (policy_difference, by_difference)):
            in_window = values[window.start : window.stop]
            ranking = np.argsort(-in_window, kind="stable")[:count]
            chosen.update(window.start + int(place) for place in ranking if in_window[place] > 0)
    return tuple(sorted(chosen))
