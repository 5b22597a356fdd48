r"""A model of the branches' true successes, given the few continuations of each; all nodes of a probe share it.

At each node the branches' successes follow beta distributions with a mean and a concentration of that node. The
student's most probable token leads the others by an amount of that node, in log odds. The distribution of these three
numbers over nodes is fitted to the probe by nonparametric maximum likelihood (EM on a grid). Without the lead, nodes
where one token is right and the others are wrong would be shrunk too much.

The model uses neither gradients nor teachers, so it cannot favour a sign of the alignment. Figures that must be
unbiased, such as predicted gain, do not use it. The model is ours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.records import Floats

MEANS = np.array([0.002, 0.01, 0.04, 0.1, 0.2, 0.32, 0.44, 0.5, 0.56, 0.68, 0.8, 0.9, 0.96, 0.99, 0.998])
"""Grid of mean successes of the tokens other than the most probable one."""
CONCENTRATIONS = np.array([0.5, 2, 6, 20, 80, 1000])
"""Grid of concentrations of the beta distributions; the larger, the more alike are a node's branches."""
LEADS = np.array([-2.0, 0.0, 1.0, 2.0, 4.0])
"""Grid of leads: log odds of success of the student's most probable token minus those of the others."""
_MEAN, _CONCENTRATION, _LEAD = (grid.ravel() for grid in np.meshgrid(MEANS, CONCENTRATIONS, LEADS, indexing="ij"))
_MEAN_BY_ROLE = np.stack([1 / (1 + (1 - _MEAN) / _MEAN * np.exp(-_LEAD)), _MEAN])
"""Mean success of the most probable token and of any other, ``(2, G)``."""
PRIOR_FLOOR = 0.001
"""Share of the fitted prior that stays uniform, so that no grid point becomes impossible."""
MAXIMUM_CERTAINTY = 1e4
"""Rewards that hardly vary count as at most this many yes-or-no outcomes each."""


@dataclass(frozen=True)
class SuccessModel:
    """A fitted model with ``G`` grid points, for ``N`` nodes with up to ``A`` branches.

    Attributes:
        prior: ``(G,)``, share of nodes at each grid point.
        log_likelihood: ``(N, A, G)``, of each branch's rewards; 0 where there is no branch.
        wins: ``(N, A)``, sum of rewards, in yes-or-no outcomes.
        losses: ``(N, A)``, continuations minus sum of rewards, in yes-or-no outcomes.
    """

    prior: Floats
    log_likelihood: Floats
    wins: Floats
    losses: Floats

    def draw(self, evidence: Evidence, draws: int = 64, seed: int = 0) -> Floats:
        """Draw successes from the posterior.

        Args:
            evidence: The nodes that the model was fitted to.
            draws: Number of draws, ``S``.
            seed: Seed of numpy's generator; the same evidence and seed give the same draws.

        Returns:
            ``(N, S, A)``; a success that is known is the same in every draw.
        """
        generator = np.random.default_rng(seed)
        node_count = len(self.wins)
        cumulative_posterior = _normalise(self.log_likelihood.sum(axis=1) + self._log_prior()).cumsum(axis=1)
        # Stratified draws of the grid point need fewer draws for the same precision.
        quantiles = (generator.random((node_count, draws)) + np.arange(draws)) / draws
        grid_index = np.zeros((node_count, draws), dtype=np.int64)
        for node_index, (cumulative, levels) in enumerate(zip(cumulative_posterior, quantiles, strict=True)):
            grid_index[node_index] = np.searchsorted(cumulative, levels * cumulative[-1])
        mean = self._prior_means()[:, grid_index].transpose(1, 2, 0)  # (N, S, A)
        concentration = _CONCENTRATION[grid_index][:, :, None]
        successes = generator.beta(
            mean * concentration + self.wins[:, None], (1 - mean) * concentration + self.losses[:, None]
        )
        return np.where((evidence.exact | ~evidence.real)[:, None], evidence.success[:, None], successes)

    def leave_one_out_spread(self, question: NDArray[np.int64], group: NDArray[np.int64]) -> Floats:
        """Expected standard deviation of one reward at each branch, from all rewards but the branch's own.

        If a branch's own rewards counted, continuations would go where rewards have varied so far, and that would bias
        the branch's mean: a branch whose first two rewards agree by chance would never get a third. The estimate uses
        the node's other branches and the other nodes of its question, which together count as one node.

        Args:
            question: ``(N,)``, a number for each question.
            group: ``(N,)``, the same number for nodes that share their continuations.

        Returns:
            ``(N, A)``.
        """
        other_branches = self.log_likelihood.sum(axis=1, keepdims=True) - self.log_likelihood
        node_likelihood = self.log_likelihood.sum(axis=1)
        other_nodes = _sum_by_label(question, node_likelihood) - _sum_by_label(group, node_likelihood)
        other_node_count = np.bincount(question)[question] - np.bincount(group)[group]
        other_nodes /= np.maximum(other_node_count, 1)[:, None]
        posterior = _normalise(other_branches + other_nodes[:, None] + self._log_prior())
        mean = self._prior_means()
        variance = mean * (1 - mean) * _CONCENTRATION / (1 + _CONCENTRATION)  # (A, G)
        spread: Floats = np.sqrt((posterior * variance).sum(axis=-1))
        return spread

    def mean(self, evidence: Evidence) -> Floats:
        """Posterior mean of each branch's success, ``(N, A)``, for the nodes that the model was fitted to."""
        posterior = _normalise(self.log_likelihood.sum(axis=1) + self._log_prior())  # (N, G)
        wins, losses = self.wins[..., None], self.losses[..., None]
        prior_wins = self._prior_means() * _CONCENTRATION  # (A, G)
        conditional_mean = (prior_wins + wins) / (_CONCENTRATION + wins + losses)
        mean = (conditional_mean * posterior[:, None]).sum(axis=-1)
        return np.where(evidence.exact | ~evidence.real, evidence.success, mean)

    def _log_prior(self) -> Floats:
        return np.log(self.prior, out=np.full_like(self.prior, -np.inf), where=self.prior > 0)

    def _prior_means(self) -> Floats:
        """Prior mean of each branch, ``(A, G)``; the first branch is the student's most probable token."""
        return _MEAN_BY_ROLE[_roles(self.wins.shape[1])]


def fit_success_model(evidence: Evidence, iterations: int = 60, symmetric: bool = False) -> SuccessModel:
    """Fit the model to a probe's nodes, each weighted by the tokens that it stands for.

    Args:
        evidence: ``N`` nodes.
        iterations: Number of EM steps.
        symmetric: Allow no leads, so that before a node's rewards are seen none of its branches is better than
            another. This fits less well, but then only a node's own rewards tell which of its tokens are better.

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
    uniform = possible / possible.sum()
    prior = uniform
    if len(wins):
        node_likelihood = log_likelihood.sum(axis=1)
        likelihood = np.exp(node_likelihood - node_likelihood.max(axis=1, keepdims=True))
        node_share = evidence.token_weight / evidence.token_weight.sum()
        for _ in range(iterations):
            posterior = likelihood * prior
            prior = (node_share / posterior.sum(axis=1)) @ posterior
            prior = (1 - PRIOR_FLOOR) * prior / prior.sum() + PRIOR_FLOOR * uniform
    if symmetric:
        # A prior fitted to few nodes says little about other nodes: the uniform one counts as one node more.
        prior = (len(wins) * prior + uniform) / (len(wins) + 1)
    return SuccessModel(prior, log_likelihood, wins, losses)


def _roles(branches: int) -> NDArray[np.int64]:
    """0 for the most probable token, which is the first branch, and 1 for the others: ``(A,)``."""
    return np.minimum(np.arange(branches), 1)


def _sum_by_label(labels: NDArray[np.int64], values: Floats) -> Floats:
    """Sum of the rows ``(N, G)`` that have the same label, at each row."""
    label_sums = np.zeros((int(labels.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(label_sums, labels, values)
    return label_sums[labels]


def _log_likelihood(wins: Floats, losses: Floats) -> Floats:
    """Log likelihood of every branch's rewards at every grid point, ``(N, A, G)``."""
    from scipy.special import betaln  # importing it takes more than half a second

    # Few different counts occur, so the special functions are evaluated once for each.
    counts, count_index = np.unique(np.stack([wins.ravel(), losses.ravel()]), axis=1, return_inverse=True)
    prior_wins = (_MEAN_BY_ROLE * _CONCENTRATION)[:, None]  # (2, 1, G)
    prior_losses = _CONCENTRATION - prior_wins
    table = betaln(counts[0][:, None] + prior_wins, counts[1][:, None] + prior_losses)  # (2, U, G)
    table = table - betaln(prior_wins, prior_losses)
    log_likelihood: Floats = table[_roles(wins.shape[1]), count_index.reshape(wins.shape)]
    return log_likelihood


def _certainty(evidence: Evidence) -> float:
    """Number of yes-or-no outcomes that one reward is worth: 1 for rewards of 0 and 1, more where they vary less."""
    repeated = evidence.real & ~evidence.exact & (evidence.count > 1)
    if not repeated.any():
        return 1.0
    mean, mean_variance = evidence.success[repeated], evidence.variance[repeated]
    reward_variance = (mean_variance * evidence.count[repeated]).sum()
    binary_variance = (mean * (1 - mean) + mean_variance).sum()
    if not (reward_variance > 0 and binary_variance > 0):
        return 1.0
    return float(np.clip(binary_variance / reward_variance, 1, MAXIMUM_CERTAINTY))


def _normalise(log_weights: Floats) -> Floats:
    """Weights that sum to 1 along the last axis."""
    from scipy.special import logsumexp  # see :func:`_log_likelihood`

    weights: NDArray[np.float64] = np.exp(log_weights - logsumexp(log_weights, axis=-1, keepdims=True))
    return weights
