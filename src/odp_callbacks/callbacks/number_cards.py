"""Keeps figures that have never had a number out of TensorBoard, which would show each as an empty card."""

from collections.abc import Mapping
from math import isfinite


class NumberCards:
    """The figures of a training that have had a number.

    Once a figure has had one, NaN is logged as well: then it says that this probe has no number.

    Examples:
        >>> cards = NumberCards()
        >>> cards.shown({"odp/update_gain/base/all": 0.5, "odp/update_gain/base/correct": float("nan")})
        {'odp/update_gain/base/all': 0.5}
        >>> cards.shown({"odp/update_gain/base/all": float("nan")})
        {'odp/update_gain/base/all': nan}
    """

    def __init__(self) -> None:
        self._with_number: set[str] = set()

    def shown(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics without those that have never had a number.

        Args:
            metrics: What a probe logs, by name.
        """
        self._with_number |= {name for name, value in metrics.items() if isfinite(value)}
        return {name: value for name, value in metrics.items() if name in self._with_number}
