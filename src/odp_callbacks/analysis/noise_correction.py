r"""How much of an estimated ideal gradient is signal, and what that does to a cosine.

Noise turns the estimated ideal gradient away from the true one, and so pulls a cosine with anything towards 0. How far
it turns, :math:`\cos(\hat g, g)`, does not depend on the teacher: it is computed from draws of the true success from
:mod:`~odp_callbacks.analysis.success_model`. With :math:`c(g)` the alignment of a node whose ideal gradient is :math:`g`,

.. math:: E[\cos(\hat g, d) \mid \text{rewards}] = E[c(g) \cos(\hat g, g) \mid \text{rewards}]

as long as noise turns :math:`g` to every side alike. With :math:`c(g) = \beta_0 + \beta_1 \phi(\|g\|)` the left hand
side is a regression on known features, and :math:`\hat\beta` gives the mean of :math:`c` over all nodes, those where
the continuations happened to agree among them. The slope matters: nodes with long ideal gradients are the ones that are
measured well, and a teacher may be right just there.
"""

from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.evidence import Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel, fit_success_model
from odp_callbacks.records import Floats

LEAST_RELIABILITY = 0.5
"""Mean cosine of estimated and true ideal gradient below which corrected figures are withheld."""
LEAST_CONTINUATIONS = 4.0
"""Effective continuations a branch below which they are."""


@dataclass(frozen=True)
class NoiseCorrection:
    """Features of ``N`` nodes.

    Attributes:
        reliability: ``(N,)``, expected cosine of estimated and true ideal gradient; 0 where the estimate is zero.
        tilted: ``(N,)``, expectation of that cosine times :attr:`size`.
        size: ``(N,)``, expected size of the true ideal gradient: tanh of its standardised logarithm.
        norm: ``(N,)``, expected norm of the true ideal gradient.
        effective: ``(N,)``, continuations a branch, each branch counted by how much noise it adds.
    """

    reliability: Floats
    tilted: Floats
    size: Floats
    norm: Floats
    effective: Floats


def correct_for_noise(evidence: Evidence, model: SuccessModel | None = None, draws: int = 64) -> NoiseCorrection:
    """Compute the features from draws of the true success.

    Args:
        evidence: ``N`` nodes.
        model: Fitted to them; None fits it here.
        draws: Of the success at each node.
    """
    model = model or fit_success_model(evidence)
    drawn = model.draw(evidence, draws)  # (N, S, A)
    drawn = drawn - drawn[:, :, :1]
    true_norm = norm(evidence.norm_form, drawn)  # (N, S)
    product = true_norm * evidence.ideal_norm[:, None]
    inner = np.einsum("nsa,nab,nb->ns", drawn, evidence.norm_form, evidence.offset, optimize=True)
    cosine = np.divide(inner, product, out=np.zeros_like(product), where=product > 0).clip(-1, 1)
    positive = true_norm > 0
    logs = np.log(true_norm, out=np.zeros_like(true_norm), where=positive)
    share = np.where(positive, evidence.token_weight[:, None], 0)
    if share.sum() > 0:
        centre = np.average(logs, weights=share)
        width = np.sqrt(np.average((logs - centre) ** 2, weights=share))
        size = np.where(positive, np.tanh((logs - centre) / (width or 1)), 0)
    else:
        size = np.zeros_like(logs)
    curve = np.einsum("naa->na", evidence.norm_form).clip(min=0) * (~evidence.exact & evidence.real)
    noise = (curve / evidence.count).sum(axis=1)
    effective = np.divide(curve.sum(axis=1), noise, out=np.full(len(curve), np.inf), where=noise > 0)
    return NoiseCorrection(
        reliability=cosine.mean(axis=1),
        tilted=(cosine * size).mean(axis=1),
        size=size.mean(axis=1),
        norm=true_norm.mean(axis=1),
        effective=effective,
    )
