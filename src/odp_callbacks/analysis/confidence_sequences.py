r"""Intervals that stay valid although somebody looks after every measurement.

A figure is measured again and again while its true value drifts. Pooled over looks ``t = 1 ... T`` with decay
:math:`\lambda`, the estimate is :math:`\sum_t \lambda^{T-t} x_t / \sum_t \lambda^{T-t}`, and what it estimates is the
same mean of the looks' true values. The errors :math:`\sum_t \lambda^{-t} (x_t - \theta_t)` form a martingale. With
``V`` its variance, Robbins' normal mixture bounds it at all looks together:

.. math:: P\left(\exists T: |M_T| \ge \sqrt{(V_T + \rho) \log \frac{V_T + \rho}{\rho \alpha^2}}\right) \le \alpha

(Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", 2021). With
estimated variances it holds asymptotically (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central
limit theory and asymptotic confidence sequences", 2024). Here a look rests on few questions. So the bound, in standard
errors, is exchanged for the quantile of Student's t that is exceeded as rarely, with the degrees of freedom of the
pooled variance by Welch and Satterthwaite.

With forgetting the variance grows without end, and a single mixture would become wide. Looks are then cut into epochs,
each as long as the memory. Each has a mixture of its own, and epoch k may err with probability
:math:`\alpha / (k (k + 1))`, so that all together err with :math:`\alpha`.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

from odp_callbacks.analysis.jackknife import check_confidence

TIGHTEST_LOOK = 20
"""The look of an epoch up to which its mixture is tightest."""
PRIOR_SHARE = 0.1
"""Variance of the mixture, relative to that of the errors at the tightest look."""


@dataclass
class ConfidenceSequence:
    """A figure pooled over looks.

    Attributes:
        decay: Share of the earlier looks' weight that is kept at each look, in (0, 1]; 1 forgets nothing.
        looks: How many there were.
        weight: Sum of the weights.
        total: Weighted sum of the values.
        variance: Of the weighted sum.
        spread: What the degrees of freedom are computed from: weighted sum of squared variances over their degrees.
        informative: Weights of the looks with a variance, squared and summed.

    Raises:
        ValueError: If ``decay`` is out of range.

    Examples:
        >>> sequence = ConfidenceSequence(decay=0.9)
        >>> for value in (0.3, 0.5, 0.4):
        ...     sequence.add(value, variance=0.01, degrees_of_freedom=7)
        >>> [round(number, 2) for number in sequence.interval()]
        [0.4, 0.17, 0.63]
    """

    decay: float = 1.0
    looks: int = 0
    weight: float = 0.0
    total: float = 0.0
    variance: float = 0.0
    spread: float = 0.0
    informative: float = 0.0

    def __post_init__(self) -> None:
        """Check the decay."""
        check_decay("decay", self.decay)

    def add(self, value: float, variance: float, degrees_of_freedom: float) -> None:
        """Take another measurement; one without a value or without a variance is left out.

        Args:
            value: The estimate of this look.
            variance: Of the estimate; 0 if the look tells nothing. Such a look counts as well: those that happen to
                tell something would be a selection, whose mean is biased. It is taken for as uncertain as the others
                are on average, so that an interval does not shrink where nothing is learned.
            degrees_of_freedom: Of the variance.
        """
        if not (math.isfinite(value) and math.isfinite(variance)):
            return
        self.looks += 1
        self.weight = self.decay * self.weight + 1
        self.total = self.decay * self.total + value
        self.variance = self.decay**2 * self.variance + variance
        self.spread *= self.decay**4
        self.informative *= self.decay**2
        if variance > 0:
            self.spread += variance**2 / degrees_of_freedom
            self.informative += 1

    def interval(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """The pooled value, and the ends of its interval at this look; NaN before a look has told something.

        Args:
            confidence: Probability that the intervals of all looks together hold what they estimate, in (0, 1).
        """
        if not self.variance > 0:
            return math.nan, math.nan, math.nan
        value = self.total / self.weight
        from scipy import stats  # importing it takes most of a second

        bound = mixture_bound(self.looks, self.decay, confidence)
        # The tail of the normal distribution is below the smallest float from 38 standard errors on.
        tail = max(NormalDist().cdf(-bound), 1e-300)
        quantile = float(stats.t.isf(tail, self.variance**2 / self.spread))
        variance = self.variance * _variance(self.looks, self.decay) / self.informative
        half_width = quantile * math.sqrt(variance) / self.weight
        return value, value - half_width, value + half_width

    def state(self) -> dict[str, float]:
        """The attributes, to be kept in a checkpoint."""
        return asdict(self)


def mixture_bound(look: int, decay: float, confidence: float = 0.95) -> float:
    """How many standard errors a pooled figure may be off at a look, if every look has the same variance.

    Args:
        look: Number of the look, from 1.
        decay: As in :class:`ConfidenceSequence`.
        confidence: Probability that no look exceeds its bound, in (0, 1).

    Returns:
        The bound in standard errors of the pooled figure.

    Examples:
        >>> [round(mixture_bound(look, 1.0), 2) for look in (1, 20, 200)]
        [4.38, 3.04, 3.27]
        >>> [round(mixture_bound(look, 0.9), 2) for look in (1, 20, 200)]
        [4.09, 3.64, 4.91]
    """
    error = 1 - check_confidence(confidence)
    start, tightest = 1, TIGHTEST_LOOK
    if decay < 1:
        length = math.ceil(1 / (1 - decay))
        epoch = (look - 1) // length + 1
        start, error = 1 + (epoch - 1) * length, error / (epoch * (epoch + 1))
        tightest = start + min(length // 2, TIGHTEST_LOOK)
    # Variances of the pooled sums at this look and at the tightest one, in units of the latest look's weight.
    prior = PRIOR_SHARE * _variance(tightest, decay) * decay ** (2 * (look - tightest))
    ratio = prior / _variance(look, decay)
    return math.sqrt((1 + ratio) * (math.log1p(1 / ratio) - 2 * math.log(error)))


def check_decay(name: str, decay: float) -> float:
    """Return a decay if it is valid.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1], where 1 forgets nothing, but {decay!r} was given.")
    return decay


def _variance(look: int, decay: float) -> float:
    """Variance of the decayed sum of this many looks with variance 1."""
    return float(look) if decay == 1 else (1 - decay ** (2 * look)) / (1 - decay**2)
