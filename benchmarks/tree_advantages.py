"""Do continuations sharpen update gain, where they were paid for anyway?

One probe measures update gain twice. *From rollouts*: success gradients with `r - b` for all tokens of a rollout. *From
nodes*: the ideal gradients of the nodes, whose advantages are differences between branches (tree advantages), summed
with the nodes' weights. Both estimate the same gradient, so they can be combined with weights in inverse proportion to
their variances. Printed for each teacher: both estimates with the half-widths of their 95 % intervals (delete-one
jackknife over questions), the correlation of the two, and the half-width of the best combination, which is chosen on
the same data and so flatters it. Norms of the direction are those from rollouts in both. Then the seconds of both.

Run: python benchmarks/tree_advantages.py [--task chain_sum] [--questions 32] [--budget 8000] [--seeds 1]
"""

from typing import Any

import numpy as np
from example_tasks import TASKS, example_task
from numpy.typing import NDArray
from scipy import stats
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer

from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.records import ProbeReport

USUAL = {"task": list(TASKS[:1]), "questions": 32, "rollouts": 4, "budget": 8000, "seeds": 1}
SMOKE = {"task": ["chain_sum"], "questions": 3, "rollouts": 2, "budget": 60, "seeds": 1}
MEASURE = {"max_new_tokens": 24, "max_branches": 3, "tail_draws": 1, "differing_gradients": 1.0}
NODE_STAGES = ("branches", "teachers", "continuations", "gradients", "step_gradients")
Floats = NDArray[np.float64]


def products_of_nodes(report: ProbeReport, questions: list[str]) -> Floats:
    """``(F, F, K)``: products of the questions' ideal gradients (mean over rollouts) and the teachers' directions."""
    assert report.step is not None
    place = {question: number for number, question in enumerate(questions)}
    rollouts = np.bincount([place[rollout.question] for rollout in report.rollouts], minlength=len(questions))
    groups = np.array([place[question] for question in report.step.question])
    membership = np.eye(len(questions))[:, groups]  # (F, G)
    gram = report.step.gram
    ideal = (gram[:, 0, :, 2:] + gram[:, 1, :, 2:]) / 2  # (G, G, K)
    products: Floats = np.einsum("fg,ghk,eh->fek", membership, ideal, membership)
    return products / rollouts[:, None, None]


def gain(products: Floats, norms: Floats, kept: NDArray[np.bool_]) -> float:
    """Mean over the kept questions of the gain along the direction of the others; both arguments ``(F, F)``."""
    others = kept[None, :] & ~np.eye(len(kept), dtype=bool)
    values = (products * others).sum(1)
    squares = np.einsum("qh,hi,qi->q", others, norms, others)
    return float(np.mean((values / np.sqrt(squares))[kept]))


def pseudo_values(products: Floats, norms: Floats) -> Floats:
    """The jackknife's pseudo-values of a gain, ``(F,)``."""
    count = len(norms)
    whole = gain(products, norms, np.ones(count, dtype=bool))
    without = np.array([gain(products, norms, np.arange(count) != left_out) for left_out in range(count)])
    return np.asarray(count * whole - (count - 1) * without)


def compare(report: ProbeReport, teachers: list[str]) -> None:
    """Print a line for each teacher."""
    gram = report.updates[0].gram
    questions = list(dict.fromkeys(rollout.question for rollout in report.rollouts))
    if report.step is None or gram.groups != len(questions):
        print("  not every question has rollouts, nodes and a group of its own")
        return
    by_nodes, by_rollouts = products_of_nodes(report, questions), gram.cross.sum(-1)
    quantile = stats.t.ppf(0.975, len(questions) - 1)
    for index, teacher in enumerate(teachers):
        norms = gram.between[:, :, index, index]
        first, second = (pseudo_values(products[:, :, index], norms) for products in (by_rollouts, by_nodes))
        covariance = np.cov(first, second) / len(questions)
        difference = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        weight = float(np.clip((covariance[0, 0] - covariance[0, 1]) / difference, 0, 1))
        parts = np.array([1 - weight, weight])
        widths = quantile * np.sqrt([covariance[0, 0], covariance[1, 1], parts @ covariance @ parts])
        print(
            f"  {teacher}: from rollouts {first.mean():+.3f} +- {widths[0]:.3f}, from nodes {second.mean():+.3f} +- "
            f"{widths[1]:.3f}, correlation {covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]):+.2f}, "
            f"combined +- {widths[2]:.3f} (weight of nodes {weight:.2f})",
            flush=True,
        )


def main() -> None:
    """Run the benchmark."""
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    student, tokenizer = student_and_tokenizer()
    for name in sizes["task"]:
        task = example_task(name, sizes["questions"], 0, 4)
        options: dict[str, Any] = {
            "rollouts_per_question": sizes["rollouts"], "budget": sizes["budget"], "nodes": "balanced",
            "eos_token_ids": end_of_line(tokenizer),
        }  # fmt: skip
        probe = Probe(student, tokenizer, task.reward, task.contexts, ProbeConfig(**MEASURE, **options))
        for seed in range(sizes["seeds"]):
            report = probe.run(task.rows, seed=seed)
            seconds = report.stage_seconds
            nodes = sum(seconds.get(stage, 0.0) for stage in NODE_STAGES)
            print(
                f"{name}, seed {seed}: {len(report.nodes)} nodes, {report.continuations} continuations; update "
                f"{seconds['update']:.0f} s, rollouts {seconds['rollouts']:.0f} s, nodes {nodes:.0f} s",
                flush=True,
            )
            compare(report, list(task.contexts))


if __name__ == "__main__":
    main()
