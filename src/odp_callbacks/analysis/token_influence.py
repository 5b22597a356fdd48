r"""Influence of single tokens on the success of other questions, with an interval for each token.

The influence of a token is the inner product of its part of a distillation gradient with the success gradient of the
questions in other folds, over the norm of the whole direction. So the influences of all tokens add up to the
contribution of the update (:mod:`~odp_callbacks.analysis.update_gain`).

The success gradient is measured in a few folds of questions. The spread over folds tells how uncertain an influence
is, but of four or five folds alone the spread itself is uncertain. It is therefore moderated: the variances of all
tokens, relative to the squared size of their directions on the logits, share a scaled inverse chi-square prior
(Smyth, "Linear models and empirical Bayes methods", 2004), and each token's variance is shrunk towards it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats
from odp_callbacks.update_records import TokenInfluence


class InfluenceIntervals(NamedTuple):
    """Influences with their intervals, ``(N, K)`` each.

    Ends are NaN where fewer than two other folds have a success gradient: a fold in which all rewards of every question
    are equal tells nothing.
    """

    value: Floats
    low: Floats
    high: Floats


def influence_intervals(influence: TokenInfluence, confidence: float = 0.95) -> InfluenceIntervals:
    """Influence of every token with its interval.

    Args:
        influence: What was measured.
        confidence: Level of the intervals, in (0, 1).

    Examples:
        >>> by_fold = np.array([[[0.1]], [[0.2]], [[np.nan]]], dtype=np.float32)
        >>> one = np.array([0])
        >>> measured = TokenInfluence(one, one, by_fold, np.ones(3), np.array([2.0]), np.ones((1, 1), np.float32))
        >>> round(float(influence_intervals(measured).value[0, 0]), 4)
        0.075
    """
    from scipy import stats  # imported here: it is slow, and not needed to read records

    present = ~np.isnan(influence.by_fold)
    weights = np.where(present, influence.fold_questions[:, None, None], 0.0)  # (S, N, K)
    total = weights.sum(axis=0)
    values = np.nan_to_num(influence.by_fold.astype(float))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weights * values).sum(axis=0) / total
        freedom = present.sum(axis=0) - 1
        squares = (weights * (values - mean) ** 2).sum(axis=0)
        variance = squares / np.where(freedom > 0, freedom, np.nan) / total
        scale = np.square(influence.logit_norm, dtype=float)
        moderated, degrees = _moderate(variance, freedom, scale)
        tells = (values != 0).any(axis=(1, 2))[:, None, None] & present
        moderated = np.where(tells.sum(axis=0) > 1, moderated, np.nan)
        half = stats.t.ppf((1 + confidence) / 2, degrees) * np.sqrt(moderated)
        norm = np.where(influence.direction_norm > 0, influence.direction_norm, np.nan)
        return InfluenceIntervals(mean / norm, (mean - half) / norm, (mean + half) / norm)


def _moderate(variance: Floats, freedom: NDArray[np.int64], scale: Floats) -> tuple[Floats, Floats]:
    """Shrink each teacher's variances towards their common prior.

    Args:
        variance: ``(N, K)``, NaN where there is none.
        freedom: ``(N, K)``, their degrees of freedom.
        scale: ``(N, K)``, what they are proportional to, a priori.

    Returns:
        ``(N, K)`` each: moderated variances and their degrees of freedom.
    """
    moderated, degrees = variance.copy(), freedom.astype(float)
    for teacher in range(variance.shape[1]):
        usable = (variance[:, teacher] > 0) & (scale[:, teacher] > 0)
        if usable.sum() < 10:
            continue
        own_freedom = float(np.median(freedom[usable, teacher]))
        ratio = variance[usable, teacher] / scale[usable, teacher]
        prior_freedom, prior = _fit_prior(ratio, own_freedom)
        shrunk = scale[:, teacher] * prior
        if np.isinf(prior_freedom):
            moderated[usable, teacher] = shrunk[usable]
            degrees[usable, teacher] = 1e6
            continue
        both = prior_freedom * shrunk + freedom[:, teacher] * variance[:, teacher]
        moderated[usable, teacher] = (both / (prior_freedom + freedom[:, teacher]))[usable]
        degrees[usable, teacher] = (prior_freedom + freedom[:, teacher])[usable]
    return moderated, degrees


def _fit_prior(variance: Floats, freedom: float) -> tuple[float, float]:
    """Degrees of freedom and value of the prior, by the moments of log variances (Smyth 2004, section 6.2)."""
    from scipy import optimize, special

    logs = np.log(variance)
    centred = logs - special.digamma(freedom / 2) + np.log(freedom / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, freedom / 2))
    if excess <= 0:
        return np.inf, float(np.exp(centred.mean()))
    half = optimize.brentq(lambda x: special.polygamma(1, np.exp(x)) - excess, -20.0, 20.0)
    prior_freedom = 2 * float(np.exp(half))
    prior = np.exp(centred.mean() + special.digamma(prior_freedom / 2) - np.log(prior_freedom / 2))
    return prior_freedom, float(prior)
