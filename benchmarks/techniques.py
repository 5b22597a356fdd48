"""What else might narrow the figures: tried on enumerated worlds, each against the plain mean of the rewards.

    python benchmarks/techniques.py --worlds 20

Prints ratios of mean squared errors; below 1 the technique helps. `docs/statistics.md` says what was kept.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from efficiency import Walked
from populations import World, worlds

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.success_model import fit_success_model


def common_random_numbers(world: World, rng: np.random.Generator, runs: int = 60) -> tuple[float, float]:
    """Variance of the nodes' gains from one continuation a branch, with common uniform numbers and with own ones."""
    fixed, total = Walked(world), np.zeros(2)
    for n, record in enumerate(world.records):
        question, prefix = int(record.question), world.tree.prefix(n)
        slope = fixed.evidence.gain_form[n, 0, : len(record.tokens)] * fixed.evidence.token_weight[n]
        for way in range(2):
            gains = []
            for _ in range(runs):
                seed = int(rng.integers(2**31))
                rewards = [
                    world.walk(question, (*prefix, int(k)), np.random.default_rng(seed if way else seed + b))[1]
                    for b, k in enumerate(record.tokens)
                ]
                gains.append(slope @ rewards)
            total[way] += np.var(gains)
    return total[1], total[0]


def plain(evidence: Evidence) -> np.ndarray:
    return evidence.success


def shrunk(evidence: Evidence) -> np.ndarray:
    """Posterior means of the success model."""
    return fit_success_model(evidence).mean(evidence)


def smoothed(world: World) -> Callable[[Evidence], np.ndarray]:
    """The success of the token that was taken is that of the next node: both estimates, weighted by their variance."""
    places = {(r.rollout, r.depth): n for n, r in enumerate(world.records)}

    def estimate(evidence: Evidence) -> np.ndarray:
        success = evidence.success.copy()
        variance = np.where(evidence.exact, 0, 0.25 / evidence.count)
        for n, record in enumerate(world.records):
            after = places.get((record.rollout, record.depth + 1))
            if after is None or evidence.exact[n, record.taken]:
                continue
            weight = np.zeros(success.shape[1])
            weight[: len(world.records[after].weight)] = world.records[after].weight
            own, other = variance[n, record.taken], (weight**2 * variance[after]).sum()
            value = weight @ evidence.success[after]
            success[n, record.taken] = (success[n, record.taken] * other + value * own) / (own + other)
        return success

    return estimate


def errors(world: World, estimators: dict, n: int, rng: np.random.Generator, runs: int = 60) -> dict[str, np.ndarray]:
    """Squared errors: of the mean gain, of its bias alone, and of the nodes' cosines."""
    fixed = Walked(world)
    truth = fixed.truth()
    slope = fixed.evidence.gain_form[:, 0] * fixed.evidence.token_weight[:, None] / fixed.evidence.token_weight.sum()
    gain = (slope * fixed.success).sum()
    cosine = truth.cosine[:, 0]
    found = {name: ([], []) for name in estimators}
    for _ in range(runs):
        evidence, _ = fixed.equal(n, rng)
        for name, estimator in estimators.items():
            success = np.where(fixed.open, estimator(evidence), fixed.evidence.success)
            changed = replace(evidence, count=np.ones_like(success), total=success)
            found[name][0].append((slope * success).sum() - gain)
            found[name][1].append(np.nanmean((np.nan_to_num(changed.cosine[:, 0]) - cosine) ** 2))
    return {name: np.array([np.mean(np.square(g)), np.mean(g) ** 2, np.mean(c)]) for name, (g, c) in found.items()}


def main() -> None:
    """Print a line for each technique."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--continuations", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    made = worlds(options.worlds)
    pairs = np.array([common_random_numbers(world, rng) for world in made])
    ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
    each = np.quantile(pairs[:, 0] / pairs[:, 1].clip(1e-300), [0.1, 0.9])
    print(
        f"common random numbers: variance of a node's gain x {ratio:.2f} ({each[0]:.2f} to {each[1]:.2f})", flush=True
    )
    for n in options.continuations:
        rows: dict[str, list[np.ndarray]] = {}
        for world in made:
            ways = {"plain": plain, "shrinkage": shrunk, "smoothing along the rollout": smoothed(world)}
            for name, values in errors(world, ways, n, rng).items():
                rows.setdefault(name, []).append(values)
        base = np.array(rows["plain"])
        for name in ("shrinkage", "smoothing along the rollout"):
            values = np.array(rows[name])
            there = base[:, 0] > 0
            gain = np.exp(np.log(values[there, 0] / base[there, 0]).mean())
            bias, cosine = values[:, 1].sum() / values[:, 0].sum(), values[:, 2].sum() / base[:, 2].sum()
            print(
                f"{name}, n = {n}: squared error of the mean gain x {gain:.2f} (bias makes {bias:.0%} of it), "
                f"of a node's cosine x {cosine:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
