r"""Correction of alignments for the noise in estimated successes.

Noise turns the estimated ideal gradient away from the true one, and so pulls its cosine with any direction towards 0.
By how much, :math:`\cos(\hat g, g)`, does not depend on the teacher. It is computed from draws of the true successes,
see :mod:`~odp_callbacks.analysis.success_model`. With :math:`c(g)` the alignment of a node whose ideal gradient is
:math:`g`,

.. math:: E[\cos(\hat g, d) \mid \text{rewards}] = E[c(g) \cos(\hat g, g) \mid \text{rewards}]

if noise turns :math:`g` in all directions equally. With :math:`c(g) = \beta_0 + \beta_1 \phi(\|g\|)` the left-hand
side is a regression on known features, and :math:`\hat\beta` gives the mean of :math:`c` over all nodes, including
those whose continuations happened to agree. The slope is needed because nodes with large ideal gradients are the ones
that are measured well, and a teacher may be better aligned at exactly those nodes. This correction is ours.
"""

from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.evidence import Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel, fit_success_model
from odp_callbacks.records import Floats

MINIMUM_RELIABILITY = 0.5
"""Corrected figures are withheld if the mean cosine of estimated and true ideal gradient is smaller than this."""
MINIMUM_CONTINUATIONS = 4.0
"""Corrected figures are withheld if branches have fewer effective continuations than this."""


@dataclass(frozen=True)
class NoiseCorrection:
    """Features of ``N`` nodes for the regression that corrects alignments.

    Attributes:
        reliability: ``(N,)``, expected cosine of estimated and true ideal gradient; 0 where the estimate is zero.
        tilted: ``(N,)``, expectation of that cosine times :attr:`size`.
        size: ``(N,)``, expected size of the true ideal gradient: tanh of its standardised logarithmic norm. Nodes with
            gradients stand for those without, which have 0 here: sums over nodes are right.
        norm: ``(N,)``, expected norm of the true ideal gradient, likewise.
        effective: ``(N,)``, continuations a branch, where each branch counts by how much noise it adds; infinite where
            no branch adds any.
    """

    reliability: Floats
    tilted: Floats
    size: Floats
    norm: Floats
    effective: Floats


def correct_for_noise(evidence: Evidence, model: SuccessModel | None = None, draws: int = 64) -> NoiseCorrection:
    """Compute the features of the correction from draws of the true successes.

    Args:
        evidence: ``N`` nodes.
        model: Success model fitted to these nodes; None fits one.
        draws: Number of draws, ``S``, of each node's successes.
    """
    model = model or fit_success_model(evidence)
    successes = model.draw(evidence, draws)  # (N, S, A)
    offsets = successes - successes[:, :, :1]
    true_norm = norm(evidence.norm_form, offsets)  # (N, S)
    norm_product = true_norm * evidence.ideal_norm[:, None]
    inner_product = np.einsum("nsa,nab,nb->ns", offsets, evidence.norm_form, evidence.offset, optimize=True)
    blank = np.zeros_like(norm_product)
    cosine = np.divide(inner_product, norm_product, out=blank, where=norm_product > 0).clip(-1, 1)
    gradient_weight = evidence.gradient_weight
    size = _standardised_size(true_norm, evidence.token_weight * gradient_weight)
    return NoiseCorrection(
        reliability=cosine.mean(axis=1),
        tilted=(cosine * size).mean(axis=1),
        size=size.mean(axis=1) * gradient_weight,
        norm=true_norm.mean(axis=1) * gradient_weight,
        effective=_effective_continuations(evidence),
    )


def _standardised_size(true_norm: Floats, token_weight: Floats) -> Floats:
    """Tanh of the standardised logarithm of the norms ``(N, S)``; 0 where a norm is 0."""
    positive = (true_norm > 0) & (token_weight > 0)[:, None]
    log_norm = np.log(true_norm, out=np.zeros_like(true_norm), where=positive)
    weight = np.where(positive, token_weight[:, None], 0)
    if not weight.sum() > 0:
        return np.zeros_like(log_norm)
    centre = np.average(log_norm, weights=weight)
    deviation = np.sqrt(np.average((log_norm - centre) ** 2, weights=weight))
    return np.where(positive, np.tanh((log_norm - centre) / (deviation or 1)), 0)


def _effective_continuations(evidence: Evidence) -> Floats:
    """Harmonic mean of each node's continuations a branch, weighted by the noise that a branch adds: ``(N,)``."""
    sampled = ~evidence.exact & evidence.real
    noise_weight = np.einsum("naa->na", evidence.norm_form).clip(min=0) * sampled
    noise = (noise_weight / evidence.count).sum(axis=1)
    unlimited = np.full(len(noise_weight), np.inf)
    effective: Floats = np.divide(noise_weight.sum(axis=1), noise, out=unlimited, where=noise > 0)
    return effective
