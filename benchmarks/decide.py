"""How soon is it known which context helps? Update gain against probes by continuations, in seconds.

Both methods measure the same questions and the four contexts of `examples/diagnose` on SmolLM2-135M with LoRA, in one
process and in turns, so that other load of the machine falls on both.

- Update gain: `update=True, budget=0`, 4 rollouts a question. Its direction is a sum over all questions, so a look at
  more questions is a new run with all of them; only the seconds of that run count.
- Probes: `update=False` and the file's options (2 rollouts a question, 6,000 tokens of continuations for 24 questions),
  with nodes in exponential windows that are thinned uniformly, as they were before update gain. Their questions are
  independent: blocks of questions are measured once and added up, and so are their seconds.

Neither measures what its deciding figure does not need: no influence of tokens there, no step alignment here. Seconds
are those of the processor on one thread. A context is decided at the first size from which on the 95 % interval of its
figure (update gain, or predicted gain) excludes 0 on the same side at all sizes; a pair likewise by the difference.

Every measurement is a line of `results/decide.jsonl`; the same command, started again, goes on (probes' records are
kept in `diagnosis/decide`, which git ignores). `--report` prints the tables of what is there.

Run: python benchmarks/decide.py [--task chain_sum | products] [--seed 0] [--questions 48] [--report]
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from decide_tables import FIGURES, PROBES, UPDATE, kept_lines, report_tables, side
from earlier_probes import OPTIONS, uniform_thinning
from example_tasks import TASKS, ExampleTask, example_task
from sizes import size_parser
from student import end_of_line, student_and_tokenizer

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.prompts import Question
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate, load, save

RESULTS_FILE = Path(__file__).parent / "results" / "decide.jsonl"
RECORDS_FOLDER = Path(__file__).parent.parent / "diagnosis" / "decide"
USUAL = {"questions": 48, "contexts": 4, "block": 8, "seed": 0, "max_new_tokens": 24, "budget": 6000}
SMOKE = {"questions": 2, "contexts": 2, "block": 1, "max_new_tokens": 4, "budget": 480}
Line = dict[str, Any]


class Comparison:
    """Measures blocks of questions by both methods and keeps what came out.

    Args:
        task: Questions and contexts.
        sizes: The seed of questions, adapter and draws; the questions that are added at a time; tokens of a response
            and of the continuations.
        results_file: Where lines are kept.
        records_folder: Where reports of probes are kept.
    """

    def __init__(self, task: ExampleTask, sizes: argparse.Namespace, results_file: Path, records_folder: Path) -> None:
        seed, block = sizes.seed, sizes.block
        self.task, self.seed, self.block = task, seed, block
        self.results_file, self.records_folder = results_file, records_folder
        torch.manual_seed(seed)
        student, tokenizer = student_and_tokenizer()
        measure = {
            **task.measure,
            "max_new_tokens": sizes.max_new_tokens,
            "eos_token_ids": end_of_line(tokenizer),
            "step_alignment": False,
        }
        budget_per_question = sizes.budget / task.usual_questions
        configs = {
            UPDATE: ProbeConfig(**{**measure, "rollouts_per_question": 4, "budget": 0, "influence": False}),
            PROBES: ProbeConfig(
                **{**measure, "budget": round(budget_per_question * block), "update": False, **OPTIONS}
            ),
        }
        self.probes = {
            method: Probe(student, tokenizer, task.reward, task.contexts, config) for method, config in configs.items()
        }
        ids = [str(place) for place in range(len(task.rows))]
        self.questions = self.probes[UPDATE].validate(task.rows, ids)
        self.reports: list[ProbeReport] = []

    def run(self) -> None:
        """Measure every size that is not kept yet, the methods in turns."""
        kept = {(line["method"], line["questions"]) for line in self.own_lines()}
        self.warm_up()
        for turn, size in enumerate(range(self.block, len(self.questions) + 1, self.block)):
            methods = [(UPDATE, self.measure_update), (PROBES, self.measure_probes)]
            for method, measure in methods if turn % 2 == 0 else methods[::-1]:
                if (method, size) not in kept:
                    self.keep(method, size, *measure(size))

    def warm_up(self) -> None:
        """Run both once on few questions: first calls import and compile."""
        for probe in self.probes.values():
            probe.run(self.questions[:1], seed=self.seed + 1)

    def measure_update(self, size: int) -> tuple[ProbeReport, float, float]:
        return self.timed(self.probes[UPDATE], self.questions[:size])

    def measure_probes(self, size: int) -> tuple[ProbeReport, float, float]:
        """Add a block to the earlier ones, whose reports and seconds are kept."""
        for stop in range(self.block, size, self.block):
            if len(self.reports) < stop // self.block:
                self.reports.append(load(self.block_folder(stop)))
        report, seconds, wall = self.timed(self.probes[PROBES], self.questions[size - self.block : size])
        save(report, self.block_folder(size), overwrite=True)
        self.reports.append(report)
        before = {line["questions"]: line for line in self.own_lines() if line["method"] == PROBES}
        earlier = before.get(size - self.block, {"seconds": 0.0, "wall": 0.0})
        return concatenate(self.reports), earlier["seconds"] + seconds, earlier["wall"] + wall

    def timed(self, probe: Probe, questions: list[Question]) -> tuple[ProbeReport, float, float]:
        start, wall_start = time.process_time(), time.perf_counter()
        with uniform_thinning():
            report = probe.run(questions, seed=self.seed)
        return report, time.process_time() - start, time.perf_counter() - wall_start

    def block_folder(self, stop: int) -> Path:
        return self.records_folder / f"{self.task.name}-{self.seed}-{self.block}" / f"{stop:03d}"

    def own_lines(self) -> list[Line]:
        identity = {"task": self.task.name, "seed": self.seed, "block": self.block}
        return [line for line in kept_lines(self.results_file) if identity.items() <= line.items()]

    def keep(self, method: str, size: int, report: ProbeReport, seconds: float, wall: float) -> None:
        line = {
            "task": self.task.name,
            "seed": self.seed,
            "block": self.block,
            "method": method,
            "questions": size,
            "seconds": round(seconds, 2),
            "wall": round(wall, 2),
            "stages": {stage: round(value, 2) for stage, value in report.stage_seconds.items()},
            "tokens": report.generated_tokens,
            "nodes": len(report.nodes),
            "success": sum(rollout.reward for rollout in report.rollouts) / len(report.rollouts),
            "gains": gains_of(report, FIGURES[method]),
        }
        self.results_file.parent.mkdir(parents=True, exist_ok=True)
        with self.results_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        sides = [side(gain) for name, gain in line["gains"].items() if name.endswith("/all")]
        decided = f"{sum(map(abs, sides))} of {len(sides)} decided"
        print(f"{self.task.name} {method} {size} questions {seconds:.0f} s: {decided}", flush=True)


def gains_of(report: ProbeReport, figure: str) -> dict[str, list[float]]:
    """Value and interval of each context and of each pair, by ``name/split``."""
    analysis = Analysis(report)
    summaries = [*analysis.summaries(), *analysis.contrasts()]
    estimates = {f"{summary.teacher}/{summary.split}": summary.figures.get(figure) for summary in summaries}
    return {
        name: [estimate.value, estimate.low, estimate.high]
        for name, estimate in estimates.items()
        if estimate is not None
    }


def parse_arguments() -> argparse.Namespace:
    parser = size_parser(__doc__, USUAL, SMOKE)
    parser.add_argument("--task", default=TASKS[0], choices=TASKS)
    parser.add_argument("--report", action="store_true", help="print the tables of what is kept, and measure nothing")
    return parser.parse_args()


def measure(given: argparse.Namespace, results_file: Path, records_folder: Path) -> None:
    task = example_task(given.task, given.questions, given.seed, given.contexts)
    Comparison(task, given, results_file, records_folder).run()
    print(report_tables(results_file))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*empty completion.*")
    arguments = parse_arguments()
    if arguments.report:
        print(report_tables(RESULTS_FILE))
    elif arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder) / RESULTS_FILE.name, Path(folder))
    else:
        measure(arguments, RESULTS_FILE, RECORDS_FOLDER)
