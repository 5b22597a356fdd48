"""Interval of an estimate whose distribution is skewed."""

import numpy as np


def skewed_interval(
    value: float, standard_error: float, skewness: float, count: int, quantile: float
) -> tuple[float, float]:
    r"""Interval that allows for the skewness of what was averaged.

    Few questions carry much of an update's gain. A sample without them then gives a small value and a small standard
    error at once, and a symmetric interval lies below the truth too often. With :math:`T` the error of the estimate
    over its standard error and :math:`\gamma` the skewness of ``n`` terms,

    .. math:: T + \frac{\gamma}{\sqrt n} \left( \frac{T^2}{3} + \frac16 \right) + \frac{\gamma^2}{27 n} T^3

    is distributed symmetrically up to terms of order ``1 / n`` (P. Hall, "On the removal of skewness by
    transformation", 1992). The interval holds the errors at which it lies between plus and minus the quantile.

    Args:
        value: The estimate.
        standard_error: Its standard error.
        skewness: Of the terms.
        count: Number of terms, ``n``.
        quantile: Of Student's t.

    Returns:
        The lower and the upper end.

    Examples:
        >>> skewed_interval(1.0, 0.5, 0.0, 9, 2.0)
        (0.0, 2.0)
        >>> low, high = skewed_interval(1.0, 0.5, 0.6, 9, 2.0)
        >>> round(low, 2), round(high, 2)
        (0.12, 2.2)
    """

    def error(transformed: float) -> float:
        scaled = skewness / np.sqrt(count)
        if abs(scaled) < 1e-6:  # its limit
            return transformed
        return float((np.cbrt(1 + scaled * (transformed - scaled / 6)) - 1) * 3 / scaled)

    return value - standard_error * error(quantile), value - standard_error * error(-quantile)
