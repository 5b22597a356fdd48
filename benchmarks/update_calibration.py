"""Do the 95 % intervals of an update's figures cover the truth? Simulated measurements of known populations.

What the intervals are to cover, with G the exact gradient of the mean reward, and N questions:

- update gain: <G, D / |D|>, where D is the direction of N - 1 questions, in the mean over all that is drawn. It is what
  one step on a batch of N - 1 questions gains on average. Likewise for each class and for differences.
- contribution of a class: <G, D_c / |D|> with the direction of all N questions, in the mean over all that is drawn.
- influence of a token: <G, v> / |D| with the measured direction v of the token and the measured D.
- update gain pooled over looks: the weighted mean of the looks' true update gains, at every look.

Run: python benchmarks/update_calibration.py
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product

import numpy as np
from scipy import stats
from sizes import parse_sizes
from update_populations import Population, Sample, enumerated, synthetic

from odp_callbacks.analysis.confidence_sequences import ConfidenceSequence
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.token_influence import influence_intervals
from odp_callbacks.analysis.update_gain import update_contribution, update_gain
from odp_callbacks.records import Floats

CORRECT, INCORRECT = (1.0, 0.0), (0.0, 1.0)
USUAL = {
    "measurements": 1000,
    "questions": [8, 16, 32, 64],
    "rollouts": [2, 4, 8],
    "worlds": ["signal", "nothing", "enumerated"],
    "grouped_questions": 200,
    "sequences": 400,
    "looks": 200,
    "processes": 2,
    "seed": 0,
}
SMOKE = {
    "measurements": 6,
    "questions": [8],
    "rollouts": [2],
    "worlds": ["signal"],
    "grouped_questions": 0,
    "sequences": 3,
    "looks": 5,
}


@cache
def population(world: str) -> Population:
    """A world by its name; built once in each process."""
    if world == "enumerated":
        return enumerated()
    return synthetic({"signal": 0.5, "nothing": 0.0}[world])


def figures(sample: Sample) -> dict[str, tuple[Estimator, float]]:
    """Every figure of a measurement with the truth about what was drawn."""
    grams = [sample.gram]
    everything, correct, incorrect = (update_gain(grams, 0, classes) for classes in ((1.0, 1.0), CORRECT, INCORRECT))
    gain, part = sample.gains, sample.contributions
    part_correct, part_incorrect = (update_contribution(grams, 0, classes) for classes in (CORRECT, INCORRECT))
    return {
        "gain, all": (everything, gain[0, 0]),
        "gain, correct": (correct, gain[0, 1]),
        "gain, incorrect": (incorrect, gain[0, 2]),
        "gain, incorrect-correct": (incorrect - correct, gain[0, 2] - gain[0, 1]),
        "gain, A - B": (everything - update_gain(grams, 1), gain[0, 0] - gain[1, 0]),
        "contribution, correct": (part_correct, part[0, 0]),
        "contribution, incorrect": (part_incorrect, part[0, 1]),
        "contribution, incorrect-correct": (part_incorrect - part_correct, part[0, 1] - part[0, 0]),
    }


def measure(sample: Sample) -> tuple[dict[str, tuple[Estimate, float]], tuple[float, ...]]:
    """Estimates with truths; of tokens the share that is covered, how many have the right sign, any sign, and all."""
    found = {name: (jackknife(estimator), truth) for name, (estimator, truth) in figures(sample).items()}
    intervals = influence_intervals(sample.influence)
    shown = np.isfinite(intervals.low) & (sample.influence.logit_norm > 0)  # shorter responses have no further tokens
    covered = (intervals.low <= sample.influences) & (sample.influences <= intervals.high)
    sure = (intervals.low > 0) | (intervals.high < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.sign(intervals.value[sure]) == np.sign(sample.influences[sure])
        return found, (covered[shown].mean() if shown.any() else np.nan, right.sum(), sure.sum(), sure.size)


def simulate(cell: tuple[str, int, int, int, int, int]) -> list[str]:
    """Simulate the measurements of one cell: world, questions, rollouts, groups, how many, seed."""
    world, questions, rollouts, groups, measurements, seed = cell
    rng = np.random.default_rng([seed, questions, rollouts])
    began, samples = time.perf_counter(), population(world)
    measured = [measure(samples.draw(questions, rollouts, groups, rng)) for _ in range(measurements)]
    title = f"{world:10} {questions:3d} x {rollouts}" + ("" if groups == questions else f", {groups} groups")
    lines = [line(title, name, [found[name] for found, _ in measured]) for name in measured[0][0]]
    tokens = np.array([of_tokens for _, of_tokens in measured], float)
    shares = tokens[np.isfinite(tokens[:, 0]), 0]
    error = 1.96 * shares.std() / np.sqrt(max(len(shares), 1))
    right, sure, count = tokens[:, 1:].sum(axis=0)
    lines.append(
        f"{title} {'influence of tokens':32} coverage {shares.mean():.3f} [{shares.mean() - error:.3f} "
        f"{shares.mean() + error:.3f}], with a sign {sure / count:.1%}, of these wrong {1 - right / max(sure, 1):.1%}"
    )
    return [*lines, f"    {time.perf_counter() - began:.0f} s"]


def line(title: str, name: str, found: list[tuple[Estimate, float]]) -> str:
    """Coverage of one figure with its own 95 % interval (Clopper and Pearson)."""
    values = np.array([(e.value, e.low, e.high, truth) for e, truth in found])
    value, low, high, truth = values[np.isfinite(values[:, 1])].T
    if len(value) < 2:
        return f"{title} {name:32} cannot tell"
    mean = np.nanmean(values[:, 3])
    hits = int(((low <= mean) & (mean <= high)).sum())
    bounds = stats.binomtest(hits, len(value)).proportion_ci()
    bias, spread = (value - truth).mean(), value.std()
    return (
        f"{title} {name:32} coverage {hits / len(value):.3f} [{bounds.low:.3f} {bounds.high:.3f}], truth {mean:+.4f}, "
        f"bias {bias:+.4f}, half-width {np.median(high - low) / 2:.4f} ({np.median(high - low) / 2 / spread:.2f} sd), "
        f"shown {len(value) / len(found):.0%}"
    )


def follow(looks: Floats, truth: Floats, decay: float) -> tuple[bool, bool, float]:
    """Whether a sequence was ever outside, and a plain interval; how many times wider it is at the last look."""
    sequence, target, weight, outside, plain_outside, ratio = ConfidenceSequence(decay), 0.0, 0.0, False, False, 1.0
    for (value, variance, degrees), true_value in zip(looks, truth, strict=True):
        sequence.add(value, variance, degrees)
        target, weight = decay * target + true_value, decay * weight + 1
        pooled, low, high = sequence.interval()
        if np.isfinite(low):
            half_width = stats.t.ppf(0.975, sequence.variance**2 / sequence.spread) * sequence.variance**0.5 / weight
            outside |= not low <= target / weight <= high
            plain_outside |= abs(pooled - target / weight) > half_width
            ratio = (high - low) / 2 / half_width
    return outside, plain_outside, ratio


def print_sequences(measurements: int, sequences: int, looks: int, seed: int) -> None:
    """Print how often sequences of looks are ever outside, with the gain drifting and without."""
    rng, samples = np.random.default_rng(seed), population("signal")
    drawn = [update_gain([sample.gram], 0) for sample in (samples.draw(8, 4, 8, rng) for _ in range(measurements))]
    pool = np.array([(figure.value, figure.variance, figure.degrees_of_freedom) for figure in drawn])
    true_gain = np.mean([samples.draw(8, 4, 8, rng).gains[0, 0] for _ in range(measurements)])
    for drift, decay in product((False, True), (1.0, 0.9)):
        found = []
        for _ in range(sequences):
            chosen = pool[rng.integers(0, len(pool), looks)]
            shift = np.cumsum(rng.normal(size=looks)) * 0.2 * pool[:, 0].std() if drift else np.zeros(looks)
            scale = np.exp(-np.arange(looks) / looks) if drift else np.ones(looks)
            scaled = chosen * np.stack([scale, scale**2, np.ones(looks)], axis=1) + np.outer(shift, [1, 0, 0])
            found.append(follow(scaled, true_gain * scale + shift, decay))
        outside, plain, ratio = np.array(found, float).T
        bounds = stats.binomtest(int(outside.sum()), sequences).proportion_ci()
        print(
            f"{looks} looks of 8 x 4, {'drifting' if drift else 'constant'}, decay {decay}: ever outside "
            f"{outside.mean():.3f} [{bounds.low:.3f} {bounds.high:.3f}], plain {plain.mean():.3f}; at the last "
            f"look {np.median(ratio):.2f} times as wide as a plain interval",
            flush=True,
        )


def main(
    measurements: int,
    questions: Iterable[int],
    rollouts: Iterable[int],
    worlds: Iterable[str],
    grouped_questions: int,
    sequences: int,
    looks: int,
    processes: int,
    seed: int,
) -> None:
    """Print the coverage of every cell, then that of sequences."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    cells = [(w, n, m, n, measurements, seed) for w, n, m in product(worlds, questions, rollouts)]
    if grouped_questions:
        cells.append(("signal", grouped_questions, 4, min(64, grouped_questions), max(measurements // 2, 2), seed))
    with ProcessPoolExecutor(processes) as pool:
        for lines in pool.map(simulate, cells):
            print("\n".join(lines), flush=True)
    if sequences:
        print_sequences(4 * measurements, sequences, looks, seed)


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
