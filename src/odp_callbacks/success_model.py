r"""What success is likely at a branch, given what few continuations gave: one model shared by all nodes of a probe.

At a node the branches' successes come from a beta distribution with a mean and a concentration of the node's own; how
often each pair of them occurs is fitted to the probe (nonparametric maximum likelihood, by EM on a grid). It knows of
lengths and spreads of success, nothing of gradients or teachers, so it cannot push an alignment either way. Figures
that must be unbiased (predicted gain) do not use it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, logsumexp

from odp_callbacks.evidence import Evidence
from odp_callbacks.records import Floats

MEANS = np.array([0.01, 0.03, 0.07, 0.13, 0.2, 0.28, 0.36, 0.44, 0.5, 0.56, 0.64, 0.72, 0.8, 0.87, 0.93, 0.97, 0.99])
CONCENTRATIONS = np.array([0.3, 1, 2, 4, 8, 16, 32, 64, 150, 1000])
_MEAN, _CONCENTRATION = (grid.ravel() for grid in np.meshgrid(MEANS, CONCENTRATIONS, indexing="ij"))
_ALPHA, _BETA = _MEAN * _CONCENTRATION, (1 - _MEAN) * _CONCENTRATION
MOST_CERTAIN = 1e4
"""Rewards that hardly vary count as at most so many times a yes or no."""


@dataclass(frozen=True)
class SuccessModel:
    """A fitted model; ``G`` grid points, ``N`` nodes, ``A`` branches.

    Attributes:
        prior: ``(G,)``.
        log_likelihood: ``(N, A, G)``, of each branch's rewards; 0 where there is no branch.
        wins: ``(N, A)``, rewards, in units of a yes or no.
        losses: ``(N, A)``, what was missing of them.
    """

    prior: Floats
    log_likelihood: Floats
    wins: Floats
    losses: Floats

    def draw(self, evidence: Evidence, draws: int = 64, seed: int = 0) -> Floats:
        """Draw successes from the posterior, ``(N, draws, A)``; known ones are what they are.

        Args:
            evidence: The nodes that the model was fitted to.
            draws: How many.
            seed: Of numpy's generator: the same evidence gives the same draws.
        """
        generator = np.random.default_rng(seed)
        nodes = len(self.wins)
        cumulative = _normalise(self.log_likelihood.sum(axis=1) + np.log(self.prior)).cumsum(axis=1)
        # Stratified over the mixture: fewer draws for the same precision.
        level = (generator.random((nodes, draws)) + np.arange(draws)) / draws
        point = np.zeros((nodes, draws), dtype=np.int64)
        for n, (c, u) in enumerate(zip(cumulative, level, strict=True)):
            point[n] = np.searchsorted(c, u * c[-1])
        drawn = generator.beta(
            _ALPHA[point][:, :, None] + self.wins[:, None], _BETA[point][:, :, None] + self.losses[:, None]
        )
        return np.where((evidence.exact | ~evidence.real)[:, None], evidence.success[:, None], drawn)

    def spread_without_own(self) -> Floats:
        """Standard deviation of one reward expected at each branch from the node's other branches, ``(N, A)``.

        A branch's own rewards are left out: continuations that go where rewards have varied would otherwise bias its
        mean (a branch whose first two agree by chance would never get a third).
        """
        others = self.log_likelihood.sum(axis=1, keepdims=True) - self.log_likelihood
        weight = _normalise(others + np.log(self.prior))
        spread: Floats = np.sqrt(weight @ (_MEAN * (1 - _MEAN) * _CONCENTRATION / (1 + _CONCENTRATION)))
        return spread

    def mean(self, evidence: Evidence) -> Floats:
        """Posterior mean of each branch's success, ``(N, A)``."""
        weight = _normalise(self.log_likelihood.sum(axis=1) + np.log(self.prior))  # (N, G)
        wins, losses = self.wins[..., None], self.losses[..., None]
        mean = ((_ALPHA + wins) / (_ALPHA + _BETA + wins + losses) * weight[:, None]).sum(axis=-1)
        return np.where(evidence.exact | ~evidence.real, evidence.success, mean)


def fit_success_model(evidence: Evidence, iterations: int = 60) -> SuccessModel:
    """Fit the model to a probe's nodes, each weighted by its tokens.

    Args:
        evidence: ``N`` nodes.
        iterations: Of EM.

    Example:
        >>> from odp_callbacks.evidence import gather
        >>> fit_success_model(gather([])).prior.sum().round(6)
        np.float64(1.0)
    """
    certainty = _certainty(evidence)
    wins = np.where(evidence.real, evidence.total * certainty, 0)
    losses = np.where(evidence.real, (evidence.count - evidence.total).clip(min=0) * certainty, 0)
    log_likelihood = betaln(wins[..., None] + _ALPHA, losses[..., None] + _BETA) - betaln(_ALPHA, _BETA)  # (N, A, G)
    prior = np.full(len(_MEAN), 1 / len(_MEAN))
    if len(wins):
        logs = log_likelihood.sum(axis=1)
        likelihood = np.exp(logs - logs.max(axis=1, keepdims=True))
        share = evidence.token_weight / evidence.token_weight.sum()
        for _ in range(iterations):
            posterior = likelihood * prior
            prior = (share / posterior.sum(axis=1)) @ posterior
            # Nothing is impossible, however the nodes seen so far came out.
            prior = 0.999 * prior / prior.sum() + 0.001 / len(prior)
    return SuccessModel(prior, log_likelihood, wins, losses)


def _certainty(evidence: Evidence) -> float:
    """How many yes-or-no outcomes one reward is worth: 1 for rewards of 0 and 1, more where they vary less."""
    several = evidence.real & ~evidence.exact & (evidence.count > 1)
    if not several.any():
        return 1.0
    mean, variance = evidence.success[several], evidence.variance[several]
    one = (variance * evidence.count[several]).sum()
    binary = (mean * (1 - mean) + variance).sum()
    return float(np.clip(binary / one, 1, MOST_CERTAIN)) if one > 0 and binary > 0 else 1.0


def _normalise(logs: Floats) -> Floats:
    weights: NDArray[np.float64] = np.exp(logs - logsumexp(logs, axis=-1, keepdims=True))
    return weights
