"""The demo's run: measure three contexts on some questions, step along each, and see what that does to others."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from odp_callbacks.cli.datasets import TASK_PREFIX, load_questions
from odp_callbacks.cli.models import load_named_model, stop_token_ids
from odp_callbacks.cli.results import terminal_text
from odp_callbacks.demo.config import CONTROL, ONE_DIGIT, TEACHERS, DemoConfig
from odp_callbacks.demo.printing import print_results
from odp_callbacks.demo.progress import StageProgress
from odp_callbacks.demo.results import DemoResults
from odp_callbacks.demo.tensorboard import PINNED, ROOT, write_to_tensorboard
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.trial_step import success_by_question, trial_step
from odp_callbacks.files import local_path
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.storage import save
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.tensorboard_tags import pinned_cards

LORA_RANK = 8
SECONDS_OF_RESPONSE = 0.06
SECONDS_OF_UPDATE = 1.0
"""What a response, and the update of a response, take on two cores: the first guess of the time left."""
SAMPLING, UPDATE, BEFORE = "sampling responses", "measuring each update", "success on other questions"
STAGES_OF_PROBE = {"rollouts": SAMPLING, "verifier": "scoring responses", "update": UPDATE}
"""Stages of a probe that have another name here."""
POOL, SEED_OF_POOL = 100, 0
"""How many questions there are to choose from, and the seed that they and the examples are made with."""
SEED_OF_HELD_OUT = 1000
"""Distance of the seed of the held-out responses from that of the measured ones."""
END_OF_LINE = "\n"
"""Ends a response, as in the examples of the prompt."""


def run_demo(config: DemoConfig, console: Console) -> DemoResults:
    """Run the demo, and print what it found.

    Args:
        config: The arguments of the command.
        console: Where progress and results are printed.
    """
    start = time.perf_counter()
    rows, reward = load_rows(config)
    student, tokenizer = _load_student(config, console)
    eos_token_ids = (*config.probe.eos_token_ids, *stop_token_ids([END_OF_LINE], tokenizer))
    probe_config = replace(config.probe, eos_token_ids=eos_token_ids)
    probe = Probe(student, tokenizer, reward, TEACHERS, probe_config)
    questions = probe.validate(rows, ids=[str(number) for number in range(len(rows))])
    with StageProgress(console, _expected_seconds(config)) as progress:
        report = _measure(probe, questions[: config.questions], config, progress)
        before, after = _take_steps(probe, questions[config.questions :], config, progress)
    results = DemoResults(report, config.step_length, before, after, CONTROL)
    print_results(results, console)
    _save(results, config, console)
    processor, elapsed = time.process_time(), time.perf_counter() - start
    console.print(f"{elapsed:.0f} s in all, and {processor:.0f} s of computing on one core.")
    return results


def load_rows(config: DemoConfig) -> tuple[list[Row], RewardFunction]:
    """The questions of the task, first those that the teachers are measured on, and its reward.

    The seed chooses the questions. The solved examples in their prompts are the same for every seed.

    Raises:
        ValueError: If there is no such task, or if it has fewer questions.
    """
    count = config.questions + config.held_out
    rows, reward = load_questions(
        TASK_PREFIX + config.task, count=max(count, POOL), seed=SEED_OF_POOL, settings=ONE_DIGIT
    )
    if len(rows) < count:
        raise ValueError(
            f"`questions` and `held_out` are {count} together, but the task {config.task!r} has only {len(rows)} "
            "different questions; ask for fewer."
        )
    assert reward is not None  # a task has one
    return random.Random(config.seed).sample(rows, count), reward


def _load_student(config: DemoConfig, console: Console) -> tuple[nn.Module, Any]:
    model, tokenizer = load_named_model("model", config.model, lambda line: console.print(terminal_text(line)))
    torch.manual_seed(config.seed)  # of the LoRA matrices
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(cast(Any, model), lora)
    student: nn.Module = adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return student, tokenizer


def _expected_seconds(config: DemoConfig) -> dict[str, float]:
    responses = config.questions * config.probe.rollouts
    held_out = config.held_out * config.held_out_responses * SECONDS_OF_RESPONSE
    stages = {SAMPLING: responses * SECONDS_OF_RESPONSE, UPDATE: responses * SECONDS_OF_UPDATE, BEFORE: held_out}
    return {**stages, **{step_stage(teacher): held_out for teacher in TEACHERS}}


def step_stage(teacher: str) -> str:
    """The stage in which a step along a teacher's update is tried."""
    return f"success after a step along “{teacher}”"


def _measure(probe: Probe, questions: Sequence[Question], config: DemoConfig, progress: StageProgress) -> ProbeReport:
    """Measure the update gain of each teacher, and keep the directions of the updates in the probe."""
    probe.summed_directions = {}

    def show(stage: str, done: int, total: int) -> None:
        progress.report(STAGES_OF_PROBE.get(stage, stage.replace("_", " ")), done, total)

    return probe.run(questions, seed=config.seed, progress=show)


def _take_steps(
    probe: Probe, questions: Sequence[Question], config: DemoConfig, progress: StageProgress
) -> tuple[Floats, dict[str, Floats]]:
    """Success on each question before a step, and after a step along each teacher's update."""

    def success() -> Floats:
        return success_by_question(probe, questions, config.held_out_responses, seed=config.seed + SEED_OF_HELD_OUT)

    progress.report(BEFORE, 0, 1)
    before, after = success(), {}
    for teacher, direction in (probe.summed_directions or {}).items():
        progress.report(step_stage(teacher), 0, 1)
        if direction.any():  # a teacher may equal the student
            with trial_step(probe.student, direction, config.step_length):
                after[teacher] = success()
    return before, after


def _save(results: DemoResults, config: DemoConfig, console: Console) -> None:
    """Write records, report and TensorBoard's files, and say where they are."""
    output = local_path("output", config.output)
    save(results.report, output / "records" / "demo", overwrite=True)
    page = write_report(results.report, output / "report.html")
    write_to_tensorboard(results, TensorBoardLogger(output, name=config.task).experiment)
    console.print(
        f"\nSee every token: open [bold]{terminal_text(page)}[/bold] in a browser.\n"
        f"See the curves:  [bold]tensorboard --logdir {terminal_text(config.output)}[/bold], then"
    )
    # On a line of its own, and never wrapped: it is copied or clicked.
    console.print(
        f"http://localhost:6006{pinned_cards(ROOT, tags=PINNED)}", soft_wrap=True, style="dim", highlight=False
    )
