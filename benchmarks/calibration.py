"""Do the intervals cover, and are the figures unbiased? Simulated probes against populations whose truth is known.

python benchmarks/calibration.py --probes 1000
"""

import argparse
import time

import numpy as np
from populations import Population, synthetic
from scipy import stats

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.jackknife import Estimator, jackknife
from odp_callbacks.analysis.node_estimates import statuses
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.summaries import gradient_figures

FIGURES = ("predicted_gain", "gain_weighted_alignment", "alignment")


def estimators(evidence: Evidence) -> dict[tuple[str, str], Estimator]:
    """All figures of a probe, with the gap and the difference between teachers."""
    correction, status = correct_for_noise(evidence), statuses(evidence)
    everything = np.ones(len(evidence.correct), bool)
    first, second = (gradient_figures(evidence, correction, k, everything, status[:, k]) for k in range(2))
    right, wrong = (
        gradient_figures(evidence, correction, 0, chosen, status[:, 0])
        for chosen in (evidence.correct, ~evidence.correct)
    )
    found = {}
    for name in FIGURES:
        found[name, "all"] = first[name]
        found[name, "incorrect"] = wrong[name]
        found[name, "gap"] = wrong[name] - right[name]
        found[name, "A - B"] = first[name] - second[name]
    return found


def truth(population: Population) -> dict[tuple[str, str], float]:
    """The figures of the whole population."""
    return {key: float(e.function(np.ones(len(e.questions)))) for key, e in estimators(population.exact()).items()}


def cell(population: Population, questions: int, continuations: int, probes: int, seed: int) -> dict:
    """Coverage, bias and share of probes that show each figure."""
    rng = np.random.default_rng(seed)
    rows: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for _ in range(probes):
        for key, estimator in estimators(population.probe(questions, continuations, rng)).items():
            figure = jackknife(estimator)
            rows.setdefault(key, []).append((figure.value, figure.low, figure.high, figure.uncorrected))
    return {key: np.array(values) for key, values in rows.items()}


def bias_of_the_gain(probes: int, questions: int = 8) -> None:
    """Print the bias of predicted gain with one continuation a branch."""
    population, rng, found = synthetic(0.35), np.random.default_rng(7), []
    for _ in range(probes):
        evidence = population.probe(questions, 1, rng)
        found.append(np.average(evidence.gain[:, 0], weights=evidence.token_weight))
    gap = np.array(found) - truth(population)["predicted_gain", "all"]
    error = gap.std() / np.sqrt(probes)
    print(f"predicted gain, n = 1, {probes} probes: bias {gap.mean():+.5f}, standard error {error:.5f}", flush=True)


def main() -> None:
    """Print a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--continuations", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.35, 0.1])
    parser.add_argument("--links", type=float, nargs="+", default=[0.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gain-probes", type=int, default=10_000)
    options = parser.parse_args()
    bias_of_the_gain(options.gain_probes)
    print(
        "figure | part | spread link | questions n | truth | bias (plain) | coverage [95 % of it] | half-width | shown"
    )
    for spread in options.spreads:
        for link in options.links:
            population = synthetic(spread, link=link, seed=options.seed)
            exact = truth(population)
            for questions in options.questions:
                for n in options.continuations:
                    start = time.perf_counter()
                    found = cell(population, questions, n, options.probes, options.seed + 1)
                    for key, rows in found.items():
                        shown = ~np.isnan(rows[:, 1])
                        place = f"{key[0]:24}{key[1]:10}{spread:5}{link:5}{questions:4}{n:4} {exact[key]:+.4f}"
                        if not shown.any():
                            print(f"{place}  withheld")
                            continue
                        hit = ((rows[:, 1] <= exact[key]) & (exact[key] <= rows[:, 2]))[shown]
                        low, high = stats.binomtest(int(hit.sum()), len(hit)).proportion_ci(method="wilson")
                        bias, raw = rows[shown, 0].mean() - exact[key], rows[~np.isnan(rows[:, 3]), 3]
                        plain = raw.mean() - exact[key] if len(raw) else np.nan
                        half = ((rows[:, 2] - rows[:, 1]) / 2)[shown].mean()
                        print(
                            f"{place} {bias:+.4f} "
                            f"({plain:+.3f})  {hit.mean():.3f} [{low:.3f} {high:.3f}] {half:.4f}  {shown.mean():.0%}",
                            flush=True,
                        )
                    print(f"    {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
