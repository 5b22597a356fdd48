"""Where the next continuations narrow the interval of the target figure most; arithmetic on arrays, without a model."""

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel
from odp_callbacks.records import Floats

TARGETS = ("predicted_gain", "gain_weighted_alignment", "alignment")
"""Figures whose interval a budget can narrow."""
SUCCESS_DRAWS = 16
"""Number of draws of the success for the expected norm of the ideal gradient."""


def sensitivities(evidence: Evidence, model: SuccessModel, target: str) -> Floats:
    r"""Compute the derivative of a figure's sum over tokens with respect to the success of each branch.

    This is the delta method on the Gram matrix. For predicted gain, the derivative is :math:`b`. It is known before any
    continuation is sampled, so the allocation does not depend on what it measures. For the other figures, the
    derivative is taken at the posterior mean of the success; that never vanishes just because two continuations
    happened to agree.

    Args:
        evidence: ``N`` nodes.
        model: The success model fitted to them.
        target: One of :data:`TARGETS`.

    Returns:
        ``(N, K, A)``, for each node, teacher and branch.

    Raises:
        ValueError: If ``target`` is unknown.
    """
    weight = evidence.token_weight[:, None, None]
    gain_slopes: Floats = np.nan_to_num(evidence.gain_form)  # (N, K, A)
    if target == "predicted_gain":
        return weight * gain_slopes
    mean = model.mean(evidence)  # (N, A)
    draws = model.draw(evidence, SUCCESS_DRAWS)
    ideal_norm = norm(evidence.norm_form, draws - draws[:, :, :1]).mean(axis=1)  # (N,)
    square_slopes = np.einsum("nab,nb->na", evidence.norm_form, mean)
    norm_slopes = _divide(square_slopes, ideal_norm[:, None])[:, None]  # (N, 1, A)
    gains = np.einsum("nka,na->nk", gain_slopes, mean)
    if target == "gain_weighted_alignment":
        total = (evidence.token_weight * ideal_norm).sum()
        ratios = evidence.token_weight @ gains / total if total > 0 else np.zeros(gains.shape[1])
        return weight * (gain_slopes - ratios[:, None] * norm_slopes)
    if target == "alignment":
        cosines = _divide(gains, ideal_norm[:, None]).clip(-1, 1)
        slopes = _divide(gain_slopes - cosines[:, :, None] * norm_slopes, ideal_norm[:, None, None])
        return weight * slopes
    raise ValueError(f"`target` must be one of {list(TARGETS)}, but {target!r} was given.")


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide where the denominator is positive; 0 elsewhere."""
    quotient: Floats = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return quotient


def allocate(
    score: Floats, cost: Floats, have: Floats, tokens: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    r"""Decide how many continuations to add to each branch by Neyman's allocation, :math:`n \propto s / \sqrt{c}`.

    It minimises :math:`\sum s^2 / n` at the given cost, where :math:`n` includes the continuations that exist already.
    Source: Neyman, "On the two different aspects of the representative method" (1934).

    Args:
        score: ``(G, A)``, sensitivity times standard deviation of a reward; 0 for a branch that needs no more.
        cost: ``(G, A)``, expected number of tokens of a continuation, positive.
        have: ``(G, A)``, number of continuations that exist already.
        tokens: Number of tokens to spend in expectation.
        generator: Random numbers for rounding. Rounding is unbiased, so that small needs are not always rounded to 0.

    Returns:
        ``(G, A)``, the number of continuations to add.

    Examples:
        >>> allocate(np.array([[3.0, 1.0]]), np.ones((1, 2)), np.ones((1, 2)), 6, np.random.default_rng(0))
        array([[5, 1]])
    """
    proportion = score / np.sqrt(cost)
    if not tokens > 0 or not (proportion > 0).any():
        return np.zeros(score.shape, dtype=np.int64)
    # The optimum is n = max(have, scale * proportion). Each branch starts to need more above its own scale; the common
    # scale is found among the branches sorted by it.
    thresholds = np.divide(have, proportion, out=np.full(proportion.shape, np.inf), where=proportion > 0)
    order = np.argsort(thresholds, axis=None)
    tokens_per_scale = np.cumsum((cost * proportion).ravel()[order])
    tokens_so_far = np.cumsum((cost * have).ravel()[order])
    scales = (tokens + tokens_so_far) / tokens_per_scale
    last_served = int((scales >= thresholds.ravel()[order]).nonzero()[0][-1])
    expected = (scales[last_served] * proportion - have).clip(min=0)
    expected[proportion <= 0] = 0
    return _round_systematically(expected, generator)


def _round_systematically(expected: Floats, generator: np.random.Generator) -> NDArray[np.int64]:
    """Round to integers with these expectations, in a random order; the total is met to within one."""
    order = generator.permutation(expected.size)
    edges = np.cumsum(expected.ravel()[order]) - generator.random()
    rounded = np.zeros(expected.size, dtype=np.int64)
    rounded[order] = np.diff(np.ceil(edges), prepend=0.0).astype(np.int64)
    return rounded.reshape(expected.shape)
