"""Estimators of a branch's success where responses are long: bias, and variance at equal tokens against plain ones.

- *plain*: one continuation of every branch, to its end.
- *one branch*: a continuation of one branch of the node, drawn in proportion to its slope.
- *fitted values*: the same, less a value that is fitted to the outcomes of other questions (depth, length, the
  rollout's own reward, a noisy predictor). For the student's success: fitted values of all nodes, and what the outcomes
  of a random subset differ from them.
- *equal weights*, *slopes*: nodes are drawn in proportion to their weights, or to these times the length of their
  slopes; *short first* divides by the square root of the tokens that their continuations will take.
- *two phases*: a forced answer at every node, and continuations from a random subset for the difference.
- *two phases, targeted*: the subset is drawn with probabilities that the forced answers suggest.
- *roulette*: continuations are cut at random at doubling distances; a forced answer at each, and differences weighted
  by the inverse probability of getting there.
- *answers alone*: forced answers in place of outcomes.

What an estimator learns (factors, shares, fitted values) comes from the other half of the rollouts. Variances are those
within rollouts, over the choice of nodes and all that is sampled there.

Run: python benchmarks/long_responses.py [--rollouts 10000] [--lengths 1024 4096 16384] [--answer-tokens 16]
"""

from typing import Any

import numpy as np
from long_response_estimators import ESTIMATORS, Estimate, Tuner, along, plain, price
from long_response_worlds import WORLDS, Floats, NodeDraws
from sizes import parse_sizes

USUAL = {
    "rollouts": 10000,
    "enumerated_rollouts": 4000,
    "student_draws": 400,
    "lengths": [1024, 4096, 16384],
    "answer_tokens": 16,
    "worlds": list(WORLDS),
    "seed": 0,
}
SMOKE = {"rollouts": 100, "enumerated_rollouts": 60, "lengths": [1024], "worlds": ["even", "enumerated"]}


def cross_fitted(draws: NodeDraws, tuner: Tuner, answer: float, rng: np.random.Generator) -> Estimate:
    """Estimates of all nodes, each half with what was learned from the other one."""
    value, tokens = np.zeros(len(draws.rollout)), np.zeros(len(draws.rollout))
    half = draws.rollout % 2 == 0
    for own in (half, ~half):
        estimate = tuner(draws.take(~own), answer, rng)(draws.take(own), rng)
        value[own], tokens[own] = estimate.value, estimate.tokens
    return Estimate(value, tokens)


def mean_price(estimate: Estimate, draws: NodeDraws) -> float:
    """Mean price over the halves, each of which may have chosen a share of nodes of its own."""
    half = draws.rollout % 2 == 0
    return sum(price(Estimate(estimate.value[own], estimate.tokens[own]), draws.take(own)) for own in (half, ~half)) / 2


def bias(value: Floats, draws: NodeDraws) -> tuple[float, float]:
    """Mean error with 1.96 standard errors over rollouts."""
    errors = draws.positions * (value - along(draws, draws.success))
    _, place = np.unique(draws.rollout, return_inverse=True)
    means = np.bincount(place, errors) / np.bincount(place)
    return float(errors.mean()), float(1.96 * means.std(ddof=1) / np.sqrt(len(means)))


def print_world(name: str, draws: NodeDraws, sizes: dict[str, Any], rng: np.random.Generator) -> None:
    """Print a line for each figure and estimator."""
    lengths, answer_tokens = sizes["lengths"], sizes["answer_tokens"]
    for figure, of_figure in (("gain", draws), ("success", draws.of_success())):
        truth = float((of_figure.positions * along(of_figure, of_figure.success)).mean())
        print(f"\n{name}, {figure} (truth {truth:+.4f}); tokens for the same variance, plain / this, and bias")
        for title, tuner in ESTIMATORS.items():
            if title == "one branch" and figure == "success":
                continue
            ratios, errors = [], []
            for length in lengths:
                estimate = cross_fitted(of_figure, tuner, answer_tokens / length, rng)
                reference = cross_fitted(of_figure, plain, answer_tokens / length, rng)
                ratios.append(mean_price(reference, of_figure) / mean_price(estimate, of_figure))
                errors.append(bias(estimate.value, of_figure))
            wrong, half = max(errors, key=lambda pair: abs(pair[0]) / max(pair[1], 1e-300))
            gains = "  ".join(f"{length}: {ratio:6.2f}" for length, ratio in zip(lengths, ratios, strict=True))
            flag = "" if abs(wrong) < 2 * half else "  BIASED"
            print(f"  {title:21} {gains}   bias {wrong:+.5f} +- {half:.5f}{flag}", flush=True)


def main() -> None:
    """Run the benchmark."""
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    for name in sizes["worlds"]:
        rng = np.random.default_rng(sizes["seed"])
        count = sizes[{"enumerated": "enumerated_rollouts", "student": "student_draws"}.get(name, "rollouts")]
        print_world(name, WORLDS[name](count, rng), sizes, rng)


if __name__ == "__main__":
    main()
