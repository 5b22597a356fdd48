"""Do the intervals cover, and are the figures unbiased? Simulated probes of populations whose truth is known.

With ``--gradients 0.5``, gradients are known at a sample of the nodes only, as in a probe.

Run: python benchmarks/calibration.py --probes 1000 [--gradients 0.5]
"""

import time
from dataclasses import replace

import numpy as np
import torch
from populations import Population, synthetic
from scipy import stats
from sizes import parse_sizes

from odp_callbacks.analysis.estimators import gradient_figures
from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.jackknife import Estimator, jackknife
from odp_callbacks.analysis.node_estimates import statuses
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.engine.gradients.gradient_nodes import draw_gradient_nodes, sample_probabilities

FIGURES = ("predicted_gain", "gain_weighted_alignment", "alignment")
USUAL = {
    "probes": 1000,
    "questions": [8, 16, 32],
    "continuations": [1, 2, 4, 8, 16],
    "spreads": [0.35, 0.1],
    "links": [0.0],
    "seed": 0,
    "gain_probes": 10_000,
    "gradients": 1.0,
}
SMOKE = {"probes": 4, "questions": [8], "continuations": [2], "spreads": [0.35], "gain_probes": 20, "gradients": 0.5}
AGREEING_GRADIENTS = 0.1
LOGIT_SPREAD = 0.3
"""Standard deviation of the logarithmic norm of a gradient on the parameters, given that on the logits."""


def estimators(evidence: Evidence) -> dict[tuple[str, str], Estimator]:
    """All figures of a probe, with the gap between rollouts and the difference between teachers."""
    correction, status = correct_for_noise(evidence), statuses(evidence)
    all_nodes = np.ones(len(evidence.correct), bool)
    first, second = (
        gradient_figures(evidence, correction, teacher, all_nodes, status[:, teacher]) for teacher in range(2)
    )
    on_correct, on_incorrect = (
        gradient_figures(evidence, correction, 0, chosen, status[:, 0])
        for chosen in (evidence.correct, ~evidence.correct)
    )
    estimator_of = {}
    for name in FIGURES:
        estimator_of[name, "all"] = first[name]
        estimator_of[name, "incorrect"] = on_incorrect[name]
        estimator_of[name, "gap"] = on_incorrect[name] - on_correct[name]
        estimator_of[name, "A - B"] = first[name] - second[name]
    return estimator_of


def population_figures(population: Population) -> dict[tuple[str, str], float]:
    """The figures of the whole population."""
    return {
        key: float(estimator.statistic(np.ones(len(estimator.questions))))
        for key, estimator in estimators(population.exact()).items()
    }


def with_sampled_gradients(evidence: Evidence, share: float, rng: np.random.Generator) -> Evidence:
    """The evidence with gradients at a sample of the nodes; those on the logits, which choose it, are similar ones."""
    if share == 1:
        return evidence
    scale = np.exp(LOGIT_SPREAD * rng.normal(size=len(evidence.correct)))[:, None, None]
    slopes = evidence.gain_form * (1 + LOGIT_SPREAD * rng.normal(size=evidence.gain_form.shape))
    on_logits = replace(evidence, norm_form=evidence.norm_form * scale**2, gain_form=slopes)
    probabilities = sample_probabilities(on_logits, evidence.differs, share, AGREEING_GRADIENTS)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    weight = np.zeros(len(probabilities))
    chosen = draw_gradient_nodes(probabilities, generator)
    weight[chosen] = 1 / probabilities[chosen]
    return replace(evidence, gradient_weight=weight)


def simulate_probes(
    population: Population, questions: int, continuations: int, probes: int, seed: int, gradients: float
) -> dict[tuple[str, str], np.ndarray]:
    """For each figure ``(probes, 4)``: value, low and high end, and value before the correction for noise."""
    rng = np.random.default_rng(seed)
    estimates: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for _ in range(probes):
        evidence = with_sampled_gradients(population.probe(questions, continuations, rng), gradients, rng)
        for key, estimator in estimators(evidence).items():
            estimate = jackknife(estimator)
            estimates.setdefault(key, []).append((estimate.value, estimate.low, estimate.high, estimate.uncorrected))
    return {key: np.array(values) for key, values in estimates.items()}


def print_bias_of_the_gain(probes: int, questions: int = 8) -> None:
    """Print the bias of predicted gain with one continuation a branch."""
    population, rng, gains = synthetic(0.35), np.random.default_rng(7), []
    for _ in range(probes):
        evidence = population.probe(questions, 1, rng)
        gains.append(np.average(evidence.gain[:, 0], weights=evidence.token_weight))
    errors = np.array(gains) - population_figures(population)["predicted_gain", "all"]
    standard_error = errors.std() / np.sqrt(probes)
    print(
        f"predicted gain, n = 1, {probes} probes: bias {errors.mean():+.5f}, standard error {standard_error:.5f}",
        flush=True,
    )


def print_coverage(label: str, truth: float, estimates: np.ndarray) -> None:
    """Print bias, coverage and half-width of one figure, over the probes that show it."""
    shown = ~np.isnan(estimates[:, 1])
    if not shown.any():
        print(f"{label} {truth:+.4f}  withheld")
        return
    covered = ((estimates[:, 1] <= truth) & (truth <= estimates[:, 2]))[shown]
    low, high = stats.binomtest(int(covered.sum()), len(covered)).proportion_ci(method="wilson")
    bias = estimates[shown, 0].mean() - truth
    uncorrected = estimates[~np.isnan(estimates[:, 3]), 3]
    uncorrected_bias = uncorrected.mean() - truth if len(uncorrected) else np.nan
    half_width = ((estimates[:, 2] - estimates[:, 1]) / 2)[shown].mean()
    print(
        f"{label} {truth:+.4f} {bias:+.4f} ({uncorrected_bias:+.3f})  {covered.mean():.3f} [{low:.3f} {high:.3f}] "
        f"{half_width:.4f}  {shown.mean():.0%}",
        flush=True,
    )


def main(
    probes: int,
    questions: list[int],
    continuations: list[int],
    spreads: list[float],
    links: list[float],
    seed: int,
    gain_probes: int,
    gradients: float,
) -> None:
    """Print a line for each figure of each cell: a population, a number of questions and of continuations."""
    print_bias_of_the_gain(gain_probes)
    print(
        "figure | part | spread link | questions n | truth | bias (uncorrected) | coverage [95 % of it] | half-width "
        "| shown"
    )
    for spread in spreads:
        for link in links:
            population = synthetic(spread, link=link, seed=seed)
            truth = population_figures(population)
            for question_count in questions:
                for continuation_count in continuations:
                    start = time.perf_counter()
                    estimates = simulate_probes(
                        population, question_count, continuation_count, probes, seed + 1, gradients
                    )
                    for (figure, part), values in estimates.items():
                        label = f"{figure:24}{part:10}{spread:5}{link:5}{question_count:4}{continuation_count:4}"
                        print_coverage(label, truth[figure, part], values)
                    print(f"    {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
