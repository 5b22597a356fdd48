"""At which nodes gradients are computed: where they matter, and at a sample of the others that stands for these.

Where all branches of a node gave the same rewards, the estimated ideal gradient is zero, and so is the gain along any
teacher's gradient, whatever these gradients are. Where outcomes differ, the estimated ideal gradient *on the logits* is
known before any backward pass, and it tells two things. If a token's alignment is decided on the logits, it mostly is
on the parameters: such a node always gets gradients. And the larger the ideal gradient there, the more the node may
contribute to predicted gain: of the undecided nodes, a sample is drawn in proportion to that.

Figures that are corrected for noise need the *expected* norm of the ideal gradient also where outcomes agree: with few
continuations, branches that differ may agree by chance. A smaller sample serves for that. All probabilities are known,
so that sums over nodes stay unbiased (Horvitz and Thompson, 1952), and they look at nothing but outcomes and logits.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from odp_callbacks.analysis.alignment_intervals import alignment_intervals
from odp_callbacks.analysis.evidence import Evidence, gather, stack
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.engine.tree.nodes import inclusion_probabilities, systematic_sample
from odp_callbacks.records import Floats, NodeRecord

EVEN_SHARE = 0.25
"""Share of the probability that is spread evenly over the nodes of a sample."""
FEWEST_NODES = 2
"""How many nodes a sample holds at least."""


def outcomes_differ(records: Sequence[NodeRecord]) -> NDArray[np.bool_]:
    """Whether the branches of each node differ in success, ``(N,)``, by their own rewards or with those of neighbours.

    Args:
        records: ``N`` records with outcomes.
    """
    return stack(records).differs | gather(records).differs


def gradient_probabilities(records: Sequence[NodeRecord], differing_share: float, agreeing_share: float) -> Floats:
    """The probability with which the gradients of each node are computed, ``(N,)``.

    Args:
        records: ``N`` records with outcomes.
        differing_share: Share of the nodes where outcomes differ, and no alignment is decided on the logits, whose
            gradients are computed in expectation, in (0, 1].
        agreeing_share: The same share of the nodes where outcomes agree.
    """
    if not len(records) or differing_share == agreeing_share == 1:
        return np.ones(len(records))
    return sample_probabilities(gather(records, logits=True), outcomes_differ(records), differing_share, agreeing_share)


def sample_probabilities(
    evidence: Evidence, differ: NDArray[np.bool_], differing_share: float, agreeing_share: float
) -> Floats:
    """The same from evidence on the logits.

    Args:
        evidence: ``N`` nodes, with their gradients on the logits.
        differ: ``(N,)``, whether outcomes differ.
        differing_share: As for :func:`gradient_probabilities`.
        agreeing_share: As for :func:`gradient_probabilities`.
    """
    probabilities = np.ones(len(differ))
    low, high = alignment_intervals(evidence)
    undecided = differ & ~((low > 0) | (high < 0)).any(axis=1)
    for chosen, share, norms in (
        (undecided, differing_share, evidence.ideal_norm),
        (~differ, agreeing_share, correct_for_noise(evidence).norm),
    ):
        probabilities[chosen] = _sample_probabilities((evidence.token_weight * norms)[chosen], share)
    return probabilities


def _sample_probabilities(sizes: Floats, share: float) -> Floats:
    """Probabilities that grow with the sizes ``(n,)``, for a sample of this share."""
    count = max(FEWEST_NODES, math.ceil(share * len(sizes)))
    if count >= len(sizes):
        return np.ones(len(sizes))
    even = np.full(len(sizes), 1 / len(sizes))
    total = sizes.sum()
    shares = EVEN_SHARE * even + (1 - EVEN_SHARE) * (sizes / total if total > 0 else even)
    return inclusion_probabilities(torch.from_numpy(shares), count).numpy()


def draw_gradient_nodes(probabilities: Floats, generator: torch.Generator) -> list[int]:
    """Draw the nodes whose gradients are computed.

    Args:
        probabilities: ``(N,)``.
        generator: Random stream on the CPU.
    """
    return [place for place, _ in systematic_sample(torch.from_numpy(probabilities), generator)]
