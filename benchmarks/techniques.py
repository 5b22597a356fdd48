"""What else might narrow the figures: tried on enumerated worlds, each against the plain mean of the rewards.

Prints ratios of mean squared errors; below 1 the technique helps. `docs/statistics.md` says what was kept.

Run: python benchmarks/techniques.py --worlds 20
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from efficiency import Walked
from populations import World, worlds
from sizes import parse_sizes

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.success_model import fit_success_model

USUAL = {"worlds": 20, "continuations": [2, 4, 8], "runs": 60}
SMOKE = {"worlds": 1, "continuations": [2], "runs": 2}
SuccessEstimator = Callable[[Evidence], np.ndarray]
"""From evidence to an estimate ``(N, A)`` of the success of each branch."""


def gain_variances(world: World, rng: np.random.Generator, runs: int) -> tuple[float, float]:
    """Variance of the nodes' gains from one continuation a branch, with common and with separate random numbers."""
    fixed, common, separate = Walked(world), 0.0, 0.0
    for node_index, record in enumerate(world.records):
        question, prefix = int(record.question), world.tree.prefix(node_index)
        evidence = fixed.evidence
        slope = evidence.gain_form[node_index, 0, : len(record.tokens)] * evidence.token_weight[node_index]
        for is_common in (False, True):
            gains = []
            for _ in range(runs):
                seed = int(rng.integers(2**31))
                rewards = [
                    world.walk(
                        question,
                        (*prefix, int(token)),
                        np.random.default_rng(seed if is_common else seed + branch_index),
                    )[1]
                    for branch_index, token in enumerate(record.tokens)
                ]
                gains.append(slope @ rewards)
            if is_common:
                common += np.var(gains)
            else:
                separate += np.var(gains)
    return common, separate


def plain_mean(evidence: Evidence) -> np.ndarray:
    """The mean reward of each branch."""
    return evidence.success


def shrinkage(evidence: Evidence) -> np.ndarray:
    """Posterior means of the success model."""
    return fit_success_model(evidence).mean(evidence)


def smoothing_along_the_rollout(world: World) -> SuccessEstimator:
    """The success of the token that was taken is also that of the next node: both, weighted by their variances."""
    node_at = {(record.rollout, record.depth): node_index for node_index, record in enumerate(world.records)}

    def estimate(evidence: Evidence) -> np.ndarray:
        success = evidence.success.copy()
        variance = np.where(evidence.exact, 0, 0.25 / evidence.count)
        for node_index, record in enumerate(world.records):
            next_node = node_at.get((record.rollout, record.depth + 1))
            if next_node is None or evidence.exact[node_index, record.taken]:
                continue
            weight = np.zeros(success.shape[1])
            weight[: len(world.records[next_node].weight)] = world.records[next_node].weight
            this_variance = variance[node_index, record.taken]
            next_variance = (weight**2 * variance[next_node]).sum()
            next_success = weight @ evidence.success[next_node]
            success[node_index, record.taken] = (
                success[node_index, record.taken] * next_variance + next_success * this_variance
            ) / (this_variance + next_variance)
        return success

    return estimate


def squared_errors(
    world: World,
    estimators: dict[str, SuccessEstimator],
    continuations: int,
    rng: np.random.Generator,
    runs: int,
) -> dict[str, np.ndarray]:
    """Squared errors of the mean gain, of its bias alone, and of the nodes' cosines."""
    fixed = Walked(world)
    weight = fixed.evidence.token_weight
    slope = fixed.evidence.gain_form[:, 0] * weight[:, None] / weight.sum()
    true_gain = (slope * fixed.success).sum()
    true_cosine = fixed.truth().cosine[:, 0]
    gain_errors: dict[str, list[float]] = {name: [] for name in estimators}
    cosine_errors: dict[str, list[float]] = {name: [] for name in estimators}
    for _ in range(runs):
        evidence, _ = fixed.sample_equally(continuations, rng)
        for name, estimator in estimators.items():
            success = np.where(fixed.open, estimator(evidence), fixed.evidence.success)
            estimated = replace(evidence, count=np.ones_like(success), total=success)
            gain_errors[name].append((slope * success).sum() - true_gain)
            cosine_errors[name].append(np.nanmean((np.nan_to_num(estimated.cosine[:, 0]) - true_cosine) ** 2))
    return {
        name: np.array(
            [np.mean(np.square(gain_errors[name])), np.mean(gain_errors[name]) ** 2, np.mean(cosine_errors[name])]
        )
        for name in estimators
    }


def main(worlds_: int, continuations: list[int], runs: int) -> None:
    """Print a line for each technique."""
    rng = np.random.default_rng(0)
    enumerated = worlds(worlds_)
    variances = np.array([gain_variances(world, rng, runs) for world in enumerated])
    ratio = variances[:, 0].sum() / variances[:, 1].sum()
    low, high = np.quantile(variances[:, 0] / variances[:, 1].clip(1e-300), [0.1, 0.9])
    print(f"common random numbers: variance of a node's gain x {ratio:.2f} ({low:.2f} to {high:.2f})", flush=True)
    for count in continuations:
        by_technique: dict[str, list[np.ndarray]] = {}
        for world in enumerated:
            techniques = {
                "plain mean": plain_mean,
                "shrinkage": shrinkage,
                "smoothing along the rollout": smoothing_along_the_rollout(world),
            }
            for name, errors in squared_errors(world, techniques, count, rng, runs).items():
                by_technique.setdefault(name, []).append(errors)
        plain_errors = np.array(by_technique.pop("plain mean"))
        for name, error_rows in by_technique.items():
            errors = np.array(error_rows)
            has_error = plain_errors[:, 0] > 0
            gain_ratio = np.exp(np.log(errors[has_error, 0] / plain_errors[has_error, 0]).mean())
            bias_share = errors[:, 1].sum() / errors[:, 0].sum()
            cosine_ratio = errors[:, 2].sum() / plain_errors[:, 2].sum()
            print(
                f"{name}, n = {count}: squared error of the mean gain x {gain_ratio:.2f} (bias is {bias_share:.0%} of "
                f"it), of a node's cosine x {cosine_ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    main(sizes.pop("worlds"), **sizes)
