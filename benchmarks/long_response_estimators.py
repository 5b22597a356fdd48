"""The estimators that ``long_responses.py`` compares, each tuned on the rollouts of other questions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from long_response_worlds import Floats, NodeDraws
from scipy.optimize import nnls

SHARES = np.geomspace(0.02, 1, 12)
"""Shares of the nodes that are continued, of which the best on the other half is taken."""
SMALLEST_SHARE = 0.01


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of each node, and the tokens that it took there, over the longest response."""

    value: Floats
    tokens: Floats


Measure = Callable[[NodeDraws, np.random.Generator], Estimate]
Tuner = Callable[[NodeDraws, float, np.random.Generator], Measure]
"""From the other half's nodes, the price of a forced answer (over the longest response) and a random stream."""


def along(draws: NodeDraws, success: Floats) -> Floats:
    """The figure at each node, if its branches' success is ``(N, A)``."""
    return (draws.slopes * success).sum(axis=1)


def whole_tokens(draws: NodeDraws) -> Floats:
    """Tokens of one continuation of every branch to its end, ``(N,)``."""
    return draws.tokens.sum(axis=(1, 2))


def noise(values: Floats, draws: NodeDraws) -> float:
    """Variance within rollouts of values that are weighted by their rollouts' lengths."""
    weighted = draws.positions * values
    _, place, count = np.unique(draws.rollout, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weighted) / count
    return float(((weighted - mean[place]) ** 2).sum() / (len(values) - len(count)))


def price(estimate: Estimate, draws: NodeDraws) -> float:
    """Variance times tokens: the tokens that a given variance takes."""
    return noise(estimate.value, draws) * float(estimate.tokens.mean())


def best(candidates: Iterable[tuple[float, float, Measure]], other: NodeDraws) -> Measure:
    """The estimator of least expected price on the other half.

    Args:
        candidates: What each adds to the variance of plain continuations, its tokens, and itself.
        other: The other half's nodes.
    """
    outcomes = noise(along(other, other.answers[:, -1]), other)
    return min(candidates, key=lambda candidate: (outcomes + candidate[0]) * candidate[1])[2]


def plain(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """One continuation of every branch."""
    return lambda draws, rng: Estimate(along(draws, draws.answers[:, -1]), whole_tokens(draws))


def fitted_values(other: NodeDraws) -> Callable[[NodeDraws], Floats]:
    """Least squares of the mean outcome of a node on what is known without a token more."""
    outcomes = (other.policy * other.answers[:, -1]).sum(axis=1)
    coefficients = np.linalg.lstsq(other.predictors, outcomes, rcond=None)[0]
    return lambda draws: np.clip(draws.predictors @ coefficients, 0, 1)


def one_branch(other: NodeDraws, answer: float, rng: np.random.Generator, fitted: bool = False) -> Measure:
    """A continuation of one branch, less a value that is common to all branches; their slopes add up to zero."""
    value_of = fitted_values(other) if fitted else lambda draws: np.zeros(len(draws.rollout))

    def measure(draws: NodeDraws, rng: np.random.Generator) -> Estimate:
        total = np.abs(draws.slopes).sum(axis=1)
        shares = np.abs(draws.slopes) / total[:, None]
        branch = (rng.random((len(total), 1)) > shares.cumsum(axis=1)).sum(axis=1).clip(max=shares.shape[1] - 1)
        rows = np.arange(len(total))
        outcome = draws.answers[rows, -1, branch] - value_of(draws)
        value = np.sign(draws.slopes[rows, branch]) * total * outcome
        return Estimate(value, draws.tokens[rows, :, branch].sum(axis=1))

    return measure


def control_variate(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """Fitted values: as a baseline for the gain, and for success as what a subset of the nodes corrects."""
    if np.abs(other.slopes.sum(axis=1)).max() < 1e-9:
        return one_branch(other, answer, rng, fitted=True)
    value_of = fitted_values(other)
    return with_subset(other, value_of, lambda draws: np.ones(len(draws.rollout)), 0.0)


def with_subset(
    other: NodeDraws, proxy_of: Callable[[NodeDraws], Floats], wanted: Callable[[NodeDraws], Floats], answer: float
) -> Measure:
    """A proxy at every node, and outcomes from a random subset, of the size that is best on the other half.

    Args:
        other: The other half's nodes.
        proxy_of: What stands for the outcome at each node.
        wanted: The probabilities of the subset are in proportion to it.
        answer: The price of the proxy for each branch.
    """
    scale = wanted(other).mean() or 1.0
    weighted = (other.positions * (along(other, other.answers[:, -1]) - proxy_of(other))) ** 2

    def of_size(size: float) -> tuple[float, float, Measure]:
        def shares_of(draws: NodeDraws) -> Floats:
            shares: Floats = np.clip(size * wanted(draws) / scale, SMALLEST_SHARE, 1)
            return shares

        def measure(draws: NodeDraws, rng: np.random.Generator) -> Estimate:
            return continued(draws, proxy_of(draws), shares_of(draws), answer, rng)

        shares = shares_of(other)
        tokens = answer * other.slopes.shape[1] + (shares * whole_tokens(other)).mean()
        return float(((1 / shares - 1) * weighted).mean()), float(tokens), measure

    return best(map(of_size, SHARES), other)


def continued(draws: NodeDraws, proxy: Floats, shares: Floats, answer: float, rng: np.random.Generator) -> Estimate:
    """A proxy at every node, and the outcomes' difference from it at a random subset."""
    chosen = rng.random(len(shares)) < shares
    difference = along(draws, draws.answers[:, -1]) - proxy
    tokens = answer * draws.slopes.shape[1] + chosen * whole_tokens(draws)
    return Estimate(proxy + chosen / shares * difference, tokens)


def factor_of(other: NodeDraws) -> float:
    """Regression coefficient of outcomes on forced answers."""
    forced, outcome = along(other, other.answers[:, 0]), along(other, other.answers[:, -1])
    square = float((other.positions**2 * forced**2).sum())
    return float((other.positions**2 * forced * outcome).sum()) / square if square > 0 else 0.0


def two_phases(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """Forced answers everywhere, and continuations from a share of the nodes."""
    factor = factor_of(other)
    return with_subset(
        other,
        lambda draws: factor * along(draws, draws.answers[:, 0]),
        lambda draws: np.ones(len(draws.rollout)),
        answer,
    )


def suggestions(draws: NodeDraws) -> Floats:
    """What may predict the squared difference of outcome and forced answer at a node, ``(N, 3)``."""
    forced = draws.answers[:, 0]
    scale = (draws.slopes**2).sum(axis=1)
    return np.stack([scale, (draws.slopes**2 * forced * (1 - forced)).sum(axis=1), along(draws, forced) ** 2], axis=1)


def expected_tokens(other: NodeDraws) -> Callable[[NodeDraws], Floats]:
    """Tokens of a node's continuations, fitted to what is known before them."""
    coefficients = np.linalg.lstsq(other.predictors, whole_tokens(other), rcond=None)[0]
    shortest = 0.1 * whole_tokens(other).mean()
    return lambda draws: np.maximum(draws.predictors @ coefficients, shortest)


def drawn_by(slopes: bool = False, tokens: bool = False) -> Tuner:
    """No answers: what is known before is only which nodes are drawn.

    Args:
        slopes: Draw nodes in proportion to the length of their slopes, too.
        tokens: And in inverse proportion to the square root of the tokens that their continuations will take.
    """

    def tune(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
        length_of = expected_tokens(other)

        def wanted(draws: NodeDraws) -> Floats:
            size = np.sqrt((draws.slopes**2).sum(axis=1)) if slopes else 1.0
            return draws.positions * size / (np.sqrt(length_of(draws)) if tokens else 1.0)

        return with_subset(other, lambda draws: np.zeros(len(draws.rollout)), wanted, 0.0)

    return tune


def targeted(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """Forced answers everywhere, and continuations where these let expect the most for the tokens."""
    factor = factor_of(other)
    difference = along(other, other.answers[:, -1]) - factor * along(other, other.answers[:, 0])
    spread, _ = nnls(suggestions(other), difference**2)
    length_of = expected_tokens(other)

    def wanted(draws: NodeDraws) -> Floats:
        return draws.positions * np.sqrt(suggestions(draws) @ spread / length_of(draws))

    return with_subset(other, lambda draws: factor * along(draws, draws.answers[:, 0]), wanted, answer)


def roulette(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """Continuations that are cut at random; variance and tokens of each stretch decide how many go on to it."""

    def stretches(draws: NodeDraws) -> tuple[Floats, Floats]:
        changes = np.einsum("na,nja->nj", draws.slopes, np.diff(draws.answers, axis=1))
        asked = answer * draws.running
        asked[:, -1] = 0
        return changes, (draws.tokens + asked).sum(axis=2)

    changes, tokens = stretches(other)
    # What is still to come after a stretch was reached is what its weight multiplies.
    to_come = changes[:, ::-1].cumsum(axis=1)[:, ::-1]
    square = (other.positions[:, None] ** 2 * to_come**2).mean(axis=0)
    worth = falling(np.maximum(square - np.append(square[1:], 0.0), 0.0), np.maximum(tokens.mean(axis=0), 1e-9))

    def of_size(size: float) -> tuple[float, float, Measure]:
        reached = np.clip(size * np.sqrt(worth / max(worth.max(), 1e-300)), SMALLEST_SHARE, 1)

        def measure(draws: NodeDraws, rng: np.random.Generator) -> Estimate:
            changes, tokens = stretches(draws)
            goes_on = rng.random((len(changes), 1)) < reached
            value = along(draws, draws.answers[:, 0]) + (goes_on / reached * changes).sum(axis=1)
            return Estimate(value, answer * draws.slopes.shape[1] + (goes_on * tokens).sum(axis=1))

        added = float(np.diff(1 / reached, prepend=1.0) @ square)
        return added, answer * other.slopes.shape[1] + float(tokens.mean(axis=0) @ reached), measure

    return best(map(of_size, SHARES * 4), other)


def falling(variance: Floats, tokens: Floats) -> Floats:
    """Variance over tokens of each stretch, neighbours pooled where it would rise: who goes on was there before."""
    pools: list[list[float]] = []
    for pair in zip(variance, tokens, strict=True):
        pools.append([*pair, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] < pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = [mine + its for mine, its in zip(pools[-1], last, strict=True)]
    return np.concatenate([np.full(int(count), of_pool / cost) for of_pool, cost, count in pools])


def answers_alone(other: NodeDraws, answer: float, rng: np.random.Generator) -> Measure:
    """No continuation at all."""
    return lambda draws, rng: Estimate(
        along(draws, draws.answers[:, 0]), np.full(len(draws.rollout), answer * draws.slopes.shape[1])
    )


ESTIMATORS: dict[str, Tuner] = {
    "plain": plain,
    "one branch": one_branch,
    "fitted values": control_variate,
    "equal weights": drawn_by(),
    "equal, short first": drawn_by(tokens=True),
    "slopes": drawn_by(slopes=True),
    "slopes, short first": drawn_by(slopes=True, tokens=True),
    "two phases": two_phases,
    "two phases, targeted": targeted,
    "roulette": roulette,
    "answers alone": answers_alone,
}
