"""Where the next continuations narrow the wanted interval most. Arithmetic only: no model is asked."""

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel
from odp_callbacks.records import Floats

TARGETS = ("predicted_gain", "gain_weighted_alignment", "alignment")


def sensitivities(evidence: Evidence, model: SuccessModel, target: str) -> Floats:
    r"""How much a figure's sum over tokens moves with the success of each branch, ``(N, K, A)``.

    The delta method on the Gram matrix. For predicted gain the derivative is :math:`b`, known before any continuation,
    so that the allocation does not depend on what it measures. For the others it is taken at the posterior mean of the
    success, which never vanishes because two continuations happened to agree.

    Args:
        evidence: ``N`` nodes.
        model: Fitted to them.
        target: One of :data:`TARGETS`.
    """
    weight = evidence.token_weight
    gain: Floats = np.nan_to_num(evidence.gain_form)
    if target == "predicted_gain":
        return _weighted(weight, gain)
    mean = model.mean(evidence)
    drawn = model.draw(evidence, 16)
    length = norm(evidence.norm_form, drawn - drawn[:, :, :1]).mean(axis=1)  # (N,)
    pull = np.einsum("nab,nb->na", evidence.norm_form, mean)
    unit = np.divide(pull, length[:, None], out=np.zeros_like(pull), where=length[:, None] > 0)
    inner = np.einsum("nka,na->nk", gain, mean)
    if target == "gain_weighted_alignment":
        total = (evidence.token_weight * length).sum()
        share = evidence.token_weight @ inner / total if total > 0 else np.zeros(inner.shape[1])
        return _weighted(weight, gain - share[:, None] * unit[:, None])
    if target == "alignment":
        there = length[:, None] > 0
        cosine = np.divide(inner, length[:, None], out=np.zeros_like(inner), where=there).clip(-1, 1)
        slope = gain - cosine[:, :, None] * unit[:, None]
        return _weighted(
            weight, np.divide(slope, length[:, None, None], out=np.zeros_like(slope), where=there[..., None])
        )
    raise ValueError(f"`target` must be one of {list(TARGETS)}, but {target!r} was given.")


def _weighted(weight: Floats, slope: Floats) -> Floats:
    found: Floats = weight[:, None, None] * slope
    return found


def allocate(
    score: Floats, cost: Floats, have: Floats, tokens: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    r"""How many continuations to add to each branch: Neyman's allocation, :math:`n \propto s / \sqrt{c}`.

    Minimises :math:`\sum s^2 / n` at the given cost, counting what is there already.

    Args:
        score: ``(N, A)``, sensitivity times standard deviation of a reward; 0 for a branch that needs none.
        cost: ``(N, A)``, tokens that a continuation is expected to take, positive.
        have: ``(N, A)``, continuations there are.
        tokens: To spend, in expectation.
        generator: Rounds: the expected numbers are met, so that small needs are not always rounded away.

    Examples:
        >>> allocate(np.array([[3.0, 1.0]]), np.ones((1, 2)), np.ones((1, 2)), 6, np.random.default_rng(0))
        array([[5, 1]])
    """
    want = score / np.sqrt(cost)
    if not tokens > 0 or not (want > 0).any():
        return np.zeros(score.shape, dtype=np.int64)
    # The scale at which each branch starts to need more, from the neediest on.
    start = np.divide(have, want, out=np.full(want.shape, np.inf), where=want > 0)
    order = np.argsort(start, axis=None)
    ahead = np.cumsum((cost * want).ravel()[order])
    spent = np.cumsum((cost * have).ravel()[order])
    scale = (tokens + spent) / ahead
    reached = int((scale >= start.ravel()[order]).nonzero()[0][-1])
    more = (scale[reached] * want - have).clip(min=0)
    more[want <= 0] = 0
    # Systematic rounding in a random order: the total is met to within one.
    shuffled = generator.permutation(more.size)
    edges = np.cumsum(more.ravel()[shuffled]) - generator.random()
    rounded = np.diff(np.ceil(edges), prepend=0.0)
    found = np.zeros(more.size, dtype=np.int64)
    found[shuffled] = rounded.astype(np.int64)
    return found.reshape(score.shape)
