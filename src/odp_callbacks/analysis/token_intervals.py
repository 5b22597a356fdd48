r"""How sure the alignment of one token is: an interval of the true cosine, given what few continuations gave.

The cosine of a token is that of an *estimated* ideal gradient. Draws of the branches' true successes from
:mod:`~odp_callbacks.analysis.success_model` give draws of the true ideal gradient, and so of the true cosine: an empirical Bayes
credible interval. Where it holds 0, the token does not even tell whether the teacher pulls towards success or away.

The model is the symmetric one: that the student's likeliest token leads elsewhere in the probe makes no token sure
whose own rewards do not differ. How much a difference is worth is learned from all nodes: where every branch always
came out the same, two continuations against two may suffice, and where branches hardly differ, thirty may not.
"""

import numpy as np

from odp_callbacks.analysis.evidence import NOISE, Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel, fit_success_model
from odp_callbacks.records import Floats

CHUNK = 2048
"""Nodes that are drawn at a time: the draws of a whole probe need not fit memory together."""


def alignment_intervals(evidence: Evidence, confidence: float = 0.95, draws: int = 256) -> tuple[Floats, Floats]:
    """Equal-tailed credible interval of the true alignment of each node with each teacher.

    A draw without a direction (all successes equal) counts as 0: it is for neither side. One token's interval is about
    one token, and holds the truth with this probability on average over tokens like those of the probe: of many that
    exclude 0 a few are wrong about the side, most of them where tokens hardly differ.

    Args:
        evidence: ``N`` nodes, ``K`` teachers.
        confidence: In (0, 1).
        draws: Of each node's successes; the same evidence gives the same ones.

    Returns:
        Lower and upper ends, each ``(N, K)`` in [-1, 1]; NaN where the teacher's gradient is zero or infinite.

    Examples:
        >>> from odp_callbacks.analysis.evidence import gather
        >>> alignment_intervals(gather([]))[0].shape
        (0, 0)
    """
    model = fit_success_model(evidence, symmetric=True)
    nodes, teachers = evidence.teacher_norm.shape
    ends = np.full((2, nodes, teachers), np.nan)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for chunk, start in enumerate(range(0, nodes, CHUNK)):
        here = np.arange(start, min(start + CHUNK, nodes))
        part = evidence.take(here)
        some = SuccessModel(model.prior, model.log_likelihood[here], model.wins[here], model.losses[here])
        drawn = some.draw(part, draws, seed=chunk)  # (N, S, A)
        offset = drawn - drawn[:, :, :1]
        offset = np.where(part.real[:, None] & (np.abs(offset) > NOISE), offset, 0)
        length = norm(part.norm_form, offset)[:, None]  # (N, 1, S)
        gain = np.einsum("nka,nsa->nks", part.gain_form, offset, optimize=True)
        cosine = np.divide(gain, length, out=np.zeros_like(gain), where=length > 0).clip(-1, 1)
        heard = (part.teacher_norm > 0) & np.isfinite(part.gain_form).all(axis=-1)
        ends[:, here] = np.where(heard, np.quantile(cosine, tails, axis=-1), np.nan)
    return ends[0], ends[1]
