"""Which tokens are worth a measurement, what fewer gradients save, and what a probe costs with nothing to find.

- *Draws.* What predicts a node's gain before any continuation? For draws in proportion to a predictor, mixed with an
  even share: the second moment of the weighted gain relative to even draws (below 1 is better), and Kish's share of the
  weights. Gains are posterior second moments, so that noise in the successes does not count as gain.
- *Price.* Probes with the same budget, questions and seeds, alternating: gradients at every node, and gradients where
  they matter. Printed: seconds, nodes, nodes with gradients, Kish's share,
  half-widths (mean over teachers), decided tokens, and how many times the seconds the first would need for the same
  half-width, ``(half-width / own half-width)^2 * seconds / own seconds``; for decided tokens, tokens a second.
- *Nothing to find.* Seconds of a probe whose rewards are all 0, relative to the same probe with the task's rewards.

Run: python benchmarks/node_sampling.py [--task chain_sum] [--questions 20] [--seeds 2] [--budget 1500]
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from example_tasks import TASKS, ExampleTask, example_task
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.tree.contributions import EVEN_SHARE
from odp_callbacks.records import ProbeReport

USUAL = {"task": list(TASKS[:1]), "questions": 20, "seeds": 2, "budget": 1500, "continuations": 6}
SMOKE = {"task": ["chain_sum"], "questions": 2, "seeds": 1, "budget": 60, "continuations": 1}
FIGURES = ("predicted_gain", "gain_weighted_alignment")
EVEN_SHARES = (0.0, 0.25, 0.5, EVEN_SHARE)
MEASURE = {"rollouts_per_question": 2, "max_new_tokens": 24, "max_branches": 3, "tail_draws": 1, "update": False}
ALL_GRADIENTS = {"differing_gradients": 1.0, "agreeing_gradients": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "every gradient": ALL_GRADIENTS,
    "gradients where they matter": {},
}


@dataclass(frozen=True)
class Bench:
    """A student with a task."""

    student: Any
    tokenizer: Any
    task: ExampleTask

    def run(self, seed: int, reward: Callable[..., Any] | None = None, **options: Any) -> tuple[ProbeReport, float]:
        """Run one probe, and return it with its seconds."""
        config = ProbeConfig(
            **{**MEASURE, "step_alignment": False, "eos_token_ids": end_of_line(self.tokenizer), **options}
        )
        probe = Probe(self.student, self.tokenizer, reward or self.task.reward, self.task.contexts, config)
        start = time.perf_counter()
        report = probe.run(self.task.rows, seed=seed)
        return report, time.perf_counter() - start


def kish_share(weights: np.ndarray) -> float:
    """Effective share of a weighted sample."""
    return float(weights.sum() ** 2 / len(weights) / (weights**2).sum())


def mean_of_known(values: Any) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    known = np.array(values)[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def compare_draws(report: ProbeReport) -> None:
    """Print the relative second moment of draws by each predictor."""
    evidence, logits = gather(report.nodes), gather(report.nodes, logits=True)
    draws = fit_success_model(evidence).draw(evidence, 200)
    gains = np.einsum("nka,nsa->nsk", np.nan_to_num(evidence.gain_form), draws - draws[:, :, :1])
    squares, weight = (gains**2).mean(axis=(1, 2)), evidence.token_weight
    rewards: dict[str, list[float]] = {}
    for rollout in report.rollouts:
        rewards.setdefault(rollout.question, []).append(rollout.reward)
    overall = np.mean([rollout.reward for rollout in report.rollouts])
    means = np.array([(sum(rewards[n.question]) + overall) / (len(rewards[n.question]) + 1) for n in report.nodes])
    on_logits = np.sqrt((np.nan_to_num(logits.gain_form) ** 2).sum(axis=2).mean(axis=1))
    predictors = {
        "entropy": np.array([node.predictors["student_entropy"].mean() for node in report.nodes]),
        "p-variance": np.array([np.sqrt((node.probability * (1 - node.probability)).sum()) for node in report.nodes]),
        "sensitivity on the logits": on_logits,
        "times sd of rewards": on_logits * np.sqrt(means * (1 - means)),
        "sensitivity on the parameters": np.sqrt((np.nan_to_num(evidence.gain_form) ** 2).sum(axis=2).mean(axis=1)),
        "gain itself": np.sqrt(squares),
    }
    print(f"draws: {len(report.nodes)} nodes, {report.continuations} continuations; even shares {EVEN_SHARES}")
    for name, predictor in predictors.items():
        cells = []
        for even in EVEN_SHARES:
            size = even + (1 - even) * predictor / max(1e-300, np.average(predictor, weights=weight))
            mean_size = np.average(size, weights=weight)
            with np.errstate(divide="ignore", invalid="ignore"):
                moment = np.average(np.where(squares > 0, squares / size, 0), weights=weight) * mean_size
                kish = 1 / (np.average(1 / size, weights=weight) * mean_size)
            cells.append(f"{moment / max(1e-300, np.average(squares, weights=weight)):.2f} (Kish {kish:.2f})")
        print(f"  {name:30} " + "   ".join(cells), flush=True)


def compare_prices(bench: Bench, seeds: int, budget: int) -> float:
    """Measure in all ways, alternating, print a line for each, and return the mean seconds of the usual way."""
    measured: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way in list(WAYS)[:: 1 if seed % 2 else -1]:
            report, seconds = bench.run(seed, budget=budget, **WAYS[way])
            analysis = Analysis(report)
            summaries = [summary for summary in analysis.summaries() if summary.split == "all"]
            widths = [mean_of_known([s.figures[figure].half_width for s in summaries]) for figure in FIGURES]
            with_gradients = sum(node.has_gradients for node in report.nodes)
            kish = kish_share(np.array([1 / node.inclusion for node in report.nodes]))
            decided = int(analysis.significant_tokens().sum())
            measured[way].append([seconds, *widths, decided])
            print(
                f"seed {seed}, {way}: {seconds:.0f} s, {len(report.nodes)} nodes, {with_gradients} with gradients, "
                f"{report.continuations} continuations, Kish share {kish:.2f}, half-widths "
                + ", ".join(f"{figure} {width:.3f}" for figure, width in zip(FIGURES, widths, strict=True))
                + f", {decided} decided tokens; "
                + ", ".join(f"{stage} {spent:.0f} s" for stage, spent in report.stage_seconds.items() if spent > 1),
                flush=True,
            )
    first = np.array(next(iter(measured.values())))
    for way in list(WAYS)[1:]:
        own = np.array(measured[way])
        ratios = [np.exp(mean_of_known(np.log(first[:, 0] / own[:, 0])))]
        for place in (1, 2):
            ratios.append(np.exp(2 * mean_of_known(np.log(first[:, place] / own[:, place]))) * ratios[0])
        tokens = own[:, 3].sum() / own[:, 0].sum() / max(1e-9, first[:, 3].sum() / first[:, 0].sum())
        print(
            f"{way}: {ratios[0]:.2f} times faster; for the same half-width of {FIGURES[0]} {ratios[1]:.2f}, of "
            f"{FIGURES[1]} {ratios[2]:.2f} times; {tokens:.2f} times the decided tokens a second"
        )
    return float(np.array(measured["gradients where they matter"])[:, 0].mean())


def main(task: list[str], questions: int, seeds: int, budget: int, continuations: int) -> None:
    """Print all three parts for each task."""
    student, tokenizer = student_and_tokenizer()
    for name in task:
        bench = Bench(student, tokenizer, example_task(name, questions, seed=0, contexts=4))
        full_seconds = compare_prices(bench, seeds, budget)
        quiet_seconds = [
            bench.run(seed, lambda completions, **columns: [0.0] * len(completions), budget=budget)[1]
            for seed in range(seeds)
        ]
        share = np.mean(quiet_seconds) / full_seconds
        print(f"{name}: a probe with nothing to find takes {np.mean(quiet_seconds):.0f} s, {share:.0%} of a full one")
        compare_draws(bench.run(seeds, continuations=continuations, **ALL_GRADIENTS)[0])


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
