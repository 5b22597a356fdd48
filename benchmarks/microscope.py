"""How much narrower are the figures of nodes at the same price with balanced nodes, and how much faster is one stream?

Both halves compare with the path as it was before:

- *Nodes.* One node in each exponential window, thinned uniformly where the budget is short, against nodes with nearly
  equal weights, thinned in proportion to their weights. Same questions, rollouts, budget and seeds, alternating.
  Printed: Kish's effective share of the nodes, half-widths of the figures (mean over teachers), and how many times the
  seconds the old nodes would need for the half-width of the new ones, with the interval over seeds:
  ``(old half-width / new half-width)^2 * old seconds / new seconds``.
- *Stream.* ``diagnose`` question by question against all questions in one batch, with the same figures.

Run: python benchmarks/microscope.py [--task chain_sum products] [--questions 32] [--seeds 3] [--budget 8000]
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from earlier_probes import uniform_thinning
from example_tasks import TASKS, ExampleTask, example_task
from scipy import stats
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.cli import diagnosis
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.records import ProbeReport

USUAL = {"task": list(TASKS), "questions": 32, "seeds": 3, "budget": 8000, "stream_questions": 16}
SMOKE = {"task": ["chain_sum"], "questions": 2, "seeds": 1, "budget": 100, "stream_questions": 2}
FIGURES = ("predicted_gain", "gain_weighted_alignment", "alignment")
WAYS = {"windows": "exponential", "balanced": "balanced"}
MEASURE = {"rollouts_per_question": 2, "max_new_tokens": 24, "max_branches": 3, "tail_draws": 1, "update": False}


def kish_share(report: ProbeReport) -> float:
    """Effective share of the nodes of a report."""
    weights = np.array([1 / node.inclusion for node in report.nodes])
    return float(weights.sum() ** 2 / len(weights) / (weights**2).sum())


def half_widths(report: ProbeReport) -> list[float]:
    """Half-width of each figure over all nodes, the mean over teachers that have one."""
    summaries = [summary for summary in Analysis(report).summaries() if summary.split == "all"]
    widths = np.array([[summary.figures[figure].half_width for figure in FIGURES] for summary in summaries])
    means: list[float] = np.nanmean(widths, axis=0).tolist()
    return means


def interval(values: Sequence[float]) -> str:
    """Geometric mean of ratios with its 95 % interval over seeds."""
    logs = np.log(values)
    if len(logs) < 2:
        return f"{np.exp(logs.mean()):.2f}"
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return f"{np.exp(logs.mean()):.2f} ({np.exp(logs.mean() - half):.2f} to {np.exp(logs.mean() + half):.2f})"


def compare_nodes(task: ExampleTask, sizes: dict[str, Any]) -> None:
    """Measure with both kinds of nodes, alternating, and print one line for each figure."""
    student, tokenizer = student_and_tokenizer()
    options = {**MEASURE, "budget": sizes["budget"], "eos_token_ids": end_of_line(tokenizer), "step_alignment": False}
    probes = {
        way: Probe(student, tokenizer, task.reward, task.contexts, ProbeConfig(**options, nodes=nodes))
        for way, nodes in WAYS.items()
    }
    kish: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    widths: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(sizes["seeds"]):
        for way in list(WAYS)[:: 1 if seed % 2 else -1]:
            start = time.perf_counter()
            with uniform_thinning() if way == "windows" else nullcontext():
                report = probes[way].run(task.rows, seed=seed)
            seconds[way].append(time.perf_counter() - start)
            kish[way].append(kish_share(report))
            widths[way].append(half_widths(report))
            print(
                f"{task.name}, seed {seed}, {way}: {seconds[way][-1]:.0f} s, {len(report.nodes)} nodes, Kish share "
                f"{kish[way][-1]:.2f}, half-widths "
                + ", ".join(f"{name} {width:.3f}" for name, width in zip(FIGURES, widths[way][-1], strict=True)),
                flush=True,
            )
    for place, figure in enumerate(FIGURES):
        ratios = [
            (old[place] / new[place]) ** 2 * old_seconds / new_seconds
            for old, new, old_seconds, new_seconds in zip(
                widths["windows"], widths["balanced"], seconds["windows"], seconds["balanced"], strict=True
            )
        ]
        print(f"{task.name}, {figure}: seconds for the same half-width, windows / balanced: {interval(ratios)}")


def compare_streams(task: ExampleTask, questions: int) -> None:
    """Time ``diagnose`` question by question, and in one block."""
    student, tokenizer = student_and_tokenizer()
    config = ProbeConfig(**MEASURE, continuations=4, eos_token_ids=end_of_line(tokenizer), step_alignment=False)
    seconds, continuations = {}, {}
    largest_block = diagnosis.MAXIMUM_BLOCK
    for name, block in (("one stream", largest_block), ("question by question", 1)):
        diagnosis.MAXIMUM_BLOCK = block
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = diagnosis.run_diagnosis(
                student, tokenizer, task.rows[:questions], task.reward, task.contexts, Path(folder), config=config
            )
            seconds[name] = time.perf_counter() - start
        continuations[name] = report.stage_seconds["continuations"]
        print(f"{task.name}, {name}: {seconds[name]:.0f} s, of them continuations {continuations[name]:.0f} s")
    diagnosis.MAXIMUM_BLOCK = largest_block
    whole, sampling = (times["question by question"] / times["one stream"] for times in (seconds, continuations))
    print(f"{task.name}: question by question / one stream: {whole:.2f}, continuations alone {sampling:.2f}")


def main() -> None:
    """Run the benchmark."""
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    for name in sizes["task"]:
        task = example_task(name, sizes["questions"], seed=0)
        compare_nodes(task, sizes)
        compare_streams(task, sizes["stream_questions"])


if __name__ == "__main__":
    main()
