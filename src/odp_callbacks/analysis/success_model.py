r"""What success is likely at a branch, given what few continuations gave: one model shared by all nodes of a probe.

At a node the branches' successes come from beta distributions with a mean and a concentration of the node's own, the
student's likeliest token ahead of the others by a lead of the node's own; how often each triple of them occurs is
fitted to the probe (nonparametric maximum likelihood, by EM on a grid). Without the lead, nodes where one token is
right and the others are wrong would be shrunk too much. The model knows nothing of gradients or teachers, so it cannot
push an alignment either way. Figures that must be unbiased (predicted gain) do not use it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, logsumexp

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.records import Floats

MEANS = np.array([0.002, 0.01, 0.04, 0.1, 0.2, 0.32, 0.44, 0.5, 0.56, 0.68, 0.8, 0.9, 0.96, 0.99, 0.998])
CONCENTRATIONS = np.array([0.5, 2, 6, 20, 80, 1000])
LEADS = np.array([-2.0, 0.0, 1.0, 2.0, 4.0])
"""By how much the student's likeliest token is better than the others, in log odds."""
_MEAN, _CONCENTRATION, _LEAD = (grid.ravel() for grid in np.meshgrid(MEANS, CONCENTRATIONS, LEADS, indexing="ij"))
_BOTH = np.stack([1 / (1 + (1 - _MEAN) / _MEAN * np.exp(-_LEAD)), _MEAN])
"""Mean of the likeliest token and of the others, ``(2, G)``."""
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
        cumulative = _normalise(self.log_likelihood.sum(axis=1) + self._log_prior()).cumsum(axis=1)
        # Stratified over the mixture: fewer draws for the same precision.
        level = (generator.random((nodes, draws)) + np.arange(draws)) / draws
        point = np.zeros((nodes, draws), dtype=np.int64)
        for n, (c, u) in enumerate(zip(cumulative, level, strict=True)):
            point[n] = np.searchsorted(c, u * c[-1])
        mean, concentration = self._means()[:, point].transpose(1, 2, 0), _CONCENTRATION[point][:, :, None]
        drawn = generator.beta(
            mean * concentration + self.wins[:, None], (1 - mean) * concentration + self.losses[:, None]
        )
        return np.where((evidence.exact | ~evidence.real)[:, None], evidence.success[:, None], drawn)

    def spread_without_own(self, question: NDArray[np.int64], group: NDArray[np.int64]) -> Floats:
        """Standard deviation of one reward expected at each branch from what was seen elsewhere, ``(N, A)``.

        A branch's own rewards are left out: continuations that go where rewards have varied would otherwise bias its
        mean (a branch whose first two agree by chance would never get a third). What is left are the node's other
        branches, and the other nodes of its question, which together count as one node.

        Args:
            question: ``(N,)``, a number for each question.
            group: ``(N,)``, nodes with the same number share their continuations.
        """
        others = self.log_likelihood.sum(axis=1, keepdims=True) - self.log_likelihood
        logs = self.log_likelihood.sum(axis=1)
        elsewhere = _sum_by(question, logs) - _sum_by(group, logs)
        count = np.bincount(question)[question] - np.bincount(group)[group]
        elsewhere /= np.maximum(count, 1)[:, None]
        weight = _normalise(others + elsewhere[:, None] + self._log_prior())
        mean = self._means()
        variance = mean * (1 - mean) * _CONCENTRATION / (1 + _CONCENTRATION)  # (A, G)
        spread: Floats = np.sqrt((weight * variance).sum(axis=-1))
        return spread

    def mean(self, evidence: Evidence) -> Floats:
        """Posterior mean of each branch's success, ``(N, A)``."""
        weight = _normalise(self.log_likelihood.sum(axis=1) + self._log_prior())  # (N, G)
        wins, losses = self.wins[..., None], self.losses[..., None]
        prior = self._means() * _CONCENTRATION  # (A, G)
        mean = ((prior + wins) / (_CONCENTRATION + wins + losses) * weight[:, None]).sum(axis=-1)
        return np.where(evidence.exact | ~evidence.real, evidence.success, mean)

    def _log_prior(self) -> Floats:
        return np.log(self.prior, out=np.full_like(self.prior, -np.inf), where=self.prior > 0)

    def _means(self) -> Floats:
        """Prior mean of each branch, ``(A, G)``."""
        return _branch_means(self.wins.shape[1])


def _sum_by(label: NDArray[np.int64], values: Floats) -> Floats:
    """Sum of ``(N, G)`` over the rows with the same label, at each row."""
    total = np.zeros((int(label.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(total, label, values)
    return total[label]


def _branch_means(branches: int) -> Floats:
    return _BOTH[np.minimum(np.arange(branches), 1)]


def fit_success_model(evidence: Evidence, iterations: int = 60, symmetric: bool = False) -> SuccessModel:
    """Fit the model to a probe's nodes, each weighted by its tokens.

    Args:
        evidence: ``N`` nodes.
        iterations: Of EM.
        symmetric: Without leads: before its rewards are seen, no branch of a node is better than another. Not what
            fits best, but then only a node's own rewards tell which of its tokens are better.

    Examples:
        >>> from odp_callbacks.analysis.evidence import gather
        >>> fit_success_model(gather([])).prior.sum().round(6)
        np.float64(1.0)
    """
    certainty = _certainty(evidence)
    wins = np.where(evidence.real, evidence.total * certainty, 0)
    losses = np.where(evidence.real, (evidence.count - evidence.total).clip(min=0) * certainty, 0)
    log_likelihood = _log_likelihood(wins, losses)
    possible = _LEAD == 0 if symmetric else np.ones(len(_LEAD), bool)
    flat = possible / possible.sum()
    prior = flat
    if len(wins):
        logs = log_likelihood.sum(axis=1)
        likelihood = np.exp(logs - logs.max(axis=1, keepdims=True))
        share = evidence.token_weight / evidence.token_weight.sum()
        for _ in range(iterations):
            posterior = likelihood * prior
            prior = (share / posterior.sum(axis=1)) @ posterior
            # Nothing is impossible, however the nodes seen so far came out.
            prior = 0.999 * prior / prior.sum() + 0.001 * flat
    if symmetric:
        # What was fitted to a few nodes says little about others: it counts as so many, against one of knowing nothing.
        prior = (len(wins) * prior + flat) / (len(wins) + 1)
    return SuccessModel(prior, log_likelihood, wins, losses)


def _log_likelihood(wins: Floats, losses: Floats) -> Floats:
    """Of every branch's rewards at every grid point, ``(N, A, G)``."""
    # Few different counts occur: the special functions are evaluated once for each.
    pairs, index = np.unique(np.stack([wins.ravel(), losses.ravel()]), axis=1, return_inverse=True)
    alpha = (_BOTH * _CONCENTRATION)[:, None]  # (2, 1, G)
    beta = _CONCENTRATION - alpha
    table = betaln(pairs[0][:, None] + alpha, pairs[1][:, None] + beta) - betaln(alpha, beta)  # (2, U, G)
    kind = np.minimum(np.arange(wins.shape[1]), 1)
    found: Floats = table[kind, index.reshape(wins.shape)]
    return found


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
