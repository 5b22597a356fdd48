"""Does a gate help? On-policy distillation of SmolLM2-135M from the same teacher, with and without gates.

Two reasoning-gym tasks, several arms and seeds; the arms of one seed see the same questions in the same order and start
from the same adapter. The teacher is the student itself with the worked solution in its context; the router may also
choose the one that is only told the answer. The gates act on update gain, from probes without continuations; the arms
with "(tokens)" act on the predicted gain of single tokens. In the positive control the teacher harms on correct
rollouts by construction (`harmful_teacher.py`): a gate must close that class, and accuracy must be saved.

Held-out accuracy (mean reward at the training's temperature, on questions that training never sees) is measured half
way and at the end, with intervals over runs, paired with the same teacher without a gate. Every run is kept as a line
of `results/gating.jsonl`; the same command, started again, resumes. `--control` trains the arms of the positive control
only. `--why` asks the library before any training, on more questions than a probe in a run has: in which class does
which teacher help, and what would each rule have gained?

Run: python benchmarks/gating.py [--seeds 0 1 2] [--steps 16] [--arms ARM ...] [--control] [--report | --why]
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harmful_teacher import HarmfulOnCorrect
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import disable_possible_user_warnings
from peft import LoraConfig, get_peft_model
from scipy import stats
from student import end_of_line
from torch.utils.data import DataLoader

from odp_callbacks import AlignmentGate, GradientAlignmentCallback, IncorrectRolloutGate, OnPolicyDistillation, Teacher
from odp_callbacks.analysis.summaries import SPLITS, Analysis
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import Task, make_task
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.gates import TeacherRouter, score_rules
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, class_name
from odp_callbacks.gates.rules import correct_rollouts
from odp_callbacks.storage import save

RESULTS = Path(__file__).parent / "results"
RUNS_FILE = "gating.jsonl"
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASKS = ("chain_sum", "products")
TEACHERS = {"solution": "{solution}\n{prompt}", "answer": "The answer is {answer}.\n{prompt}"}


@dataclass(frozen=True)
class Arm:
    """What is different between the runs of one seed.

    Attributes:
        gate: From a seed to the gate.
        teachers: The teachers that the training distils from; "harmful" is that of the positive control.
        probes: What the probes measure that the gate learns from: "updates", "tokens", or "" if it does not learn.
    """

    gate: Callable[[int], Any]
    teachers: tuple[str, ...] = ("solution",)
    probes: str = ""

    @property
    def baseline(self) -> str:
        """The arm without a gate that this one is compared with."""
        return "no gate, harmful" if self.teachers == ("harmful",) else "no gate"


ARMS: dict[str, Arm] = {
    "no gate": Arm(lambda seed: None),
    "incorrect only": Arm(lambda seed: IncorrectRolloutGate()),
    "correct only": Arm(lambda seed: correct_rollouts),
    "AlignmentGate": Arm(lambda seed: AlignmentGate(), probes="updates"),
    "TeacherRouter": Arm(lambda seed: TeacherRouter(seed=seed), tuple(TEACHERS), "updates"),
    "AlignmentGate (tokens)": Arm(lambda seed: AlignmentGate("predicted_gain"), probes="tokens"),
    "TeacherRouter (tokens)": Arm(
        lambda seed: TeacherRouter(figure="predicted_gain", seed=seed), tuple(TEACHERS), "tokens"
    ),
    "no gate, harmful": Arm(lambda seed: None, ("harmful",)),
    "AlignmentGate, harmful": Arm(lambda seed: AlignmentGate(), ("harmful",), "updates"),
}
"""All arms by name."""
CONTROL = tuple(name for name, arm in ARMS.items() if arm.teachers == ("harmful",))
"""The arms of the positive control."""
EXAM_ROLLOUTS = 4
Interval = tuple[float, float, float]
"""A value, and the low and high end of its interval."""


@dataclass(frozen=True)
class TrainingSize:
    """How large a run is.

    Attributes:
        questions: Questions that are made; repeated ones are dropped.
        held_out: Of them, those that training never sees.
        probe_questions: Questions of a probe with continuations.
        budget: Tokens of its continuations.
        update_questions: Questions of a probe without continuations.
        update_rollouts: Rollouts of each of them.
        max_new_tokens: Limit of a response.
    """

    questions: int = 160
    held_out: int = 24
    probe_questions: int = 8
    budget: int = 3000
    update_questions: int = 16
    update_rollouts: int = 4
    max_new_tokens: int = 24


SMOKE_SIZE = TrainingSize(
    questions=12, held_out=1, probe_questions=1, budget=20, update_questions=3, update_rollouts=2, max_new_tokens=4
)


class Exam(Callback):
    """Held-out success at some steps: mean reward of sampled responses, question by question."""

    def __init__(self, rows: list[Any], every_n_steps: int) -> None:
        self.rows, self.every_n_steps = rows, every_n_steps
        self.marks: dict[int, list[float]] = {}
        self.seconds = 0.0

    def take(self, module: OnPolicyDistillation, step: int) -> None:
        start, training_rollouts = time.perf_counter(), module.rollouts_per_question
        module.rollouts_per_question = EXAM_ROLLOUTS
        with torch.random.fork_rng():
            torch.manual_seed(10_000)
            rollouts = module.sample(self.rows)
        module.rollouts_per_question = training_rollouts
        rewards = np.array([rollout.reward for rollout in rollouts])
        self.marks[step] = rewards.reshape(-1, EXAM_ROLLOUTS).mean(axis=1).tolist()
        self.seconds += time.perf_counter() - start

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.take(pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.take(pl_module, trainer.global_step)


def load_task(task_name: str, seed: int, questions: int) -> tuple[Any, Any, Task, list[Any], tuple[int, ...]]:
    """Student, tokenizer, task, its different questions, and the tokens that end a response."""
    seed_everything(seed, verbose=False)
    model, tokenizer = load_student(None, lambda message: None)
    task = make_task(task_name, questions=questions, lines=0, shots=2, seed=100 + seed, settings=ONE_DIGIT)
    student = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).train()
    rows = list({row["prompt"]: row for row in task.rows}.values())
    return student, tokenizer, task, rows, end_of_line(tokenizer)


def train(task_name: str, arm_name: str, seed: int, steps: int, size: TrainingSize) -> dict[str, Any]:
    """Train once; what is worth keeping of it."""
    start = time.perf_counter()
    arm = ARMS[arm_name]
    student, tokenizer, task, rows, stop_tokens = load_task(task_name, seed, size.questions)
    held_out, training = rows[: size.held_out], rows[size.held_out :]
    teachers: dict[str, Teacher] = {name: Teacher(context) for name, context in TEACHERS.items()}
    if arm.teachers == ("harmful",):
        teachers = {"harmful": HarmfulOnCorrect(tokenizer, rows, task.reward, TEACHERS["solution"])}
    gate = arm.gate(seed)
    module = OnPolicyDistillation(
        student,
        tokenizer,
        {name: teachers[name] for name in arm.teachers},
        max_new_tokens=size.max_new_tokens,
        rollouts_per_question=2,
        eos_token_ids=stop_tokens,
        reward=task.reward,
        gate=gate,
        learning_rate=3e-4,
    )
    exam = Exam(held_out, max(1, steps // 2))
    callbacks: list[Callback] = [exam]
    followed = Followed(gate)
    if arm.probes:
        callbacks.append(
            GradientAlignmentCallback(
                module.teachers,
                training,
                task.reward,
                every_n_steps=max(1, steps // 3),
                at_start=True,
                max_overhead=None,
                questions_per_probe=size.update_questions if arm.probes == "updates" else size.probe_questions,
                seed=seed,
                strict=True,
                gate=followed,
                config=update_config(size, stop_tokens)
                if arm.probes == "updates"
                else probe_config(size.budget, size.max_new_tokens, stop_tokens),
            )
        )
    trainer = Trainer(
        max_steps=steps,
        max_epochs=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(training, batch_size=4, shuffle=True, collate_fn=list))
    result = {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "steps": steps,
        "marks": exam.marks,
        "seconds": time.perf_counter() - start,
        "seconds_exam": exam.seconds,
    }
    return {**result, "probes": followed.probes, "weights": gate.scalars()} if arm.probes else result


class Followed:
    """Passes every probe on to a gate, and keeps what it measured and what the gate made of it."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.probes: list[dict[str, Any]] = []

    def observe(self, report: Any) -> None:
        """Learn from a probe."""
        self.gate.observe(report)
        figure = self.gate.figure
        pooled = {
            f"{teacher}/{class_name(token_class)}": interval_of(self.gate.evidence.estimate(token_class, teacher))
            for teacher in report.teachers
            for token_class in self.gate.evidence.classes()
            if token_class[1] == ALL_DEPTHS
        }
        seconds = sum(report.stage_seconds.values())
        kept = {"figure": figure, "gains": gains(report, figure), "pooled": pooled, "weights": self.gate.scalars()}
        self.probes.append({**kept, "seconds": seconds})


def update_config(size: TrainingSize, stop_tokens: tuple[int, ...]) -> ProbeConfig:
    """How the benchmark's probes without continuations measure."""
    return ProbeConfig(
        rollouts_per_question=size.update_rollouts,
        max_new_tokens=size.max_new_tokens,
        budget=0,
        influence=False,
        eos_token_ids=stop_tokens,
    )


def probe_config(budget: int, max_new_tokens: int, stop_tokens: tuple[int, ...]) -> ProbeConfig:
    """How the benchmark's probes measure."""
    return ProbeConfig(
        rollouts_per_question=2,
        max_new_tokens=max_new_tokens,
        budget=budget,
        max_branches=3,
        tail_draws=1,
        eos_token_ids=stop_tokens,
        step_alignment=False,
        update=False,
    )


def explain(questions: int, budget: int, size: TrainingSize, results: Path) -> str:
    """Gains of each teacher by class, and what each rule would gain, on the student before training."""
    gain_rows = [
        "| task | teacher | figure | all | correct | incorrect | incorrect - correct |",
        "|---|---|---|---|---|---|---|",
    ]
    rule_rows = [
        "| task | teacher | rule | tokens | gained | help kept | harm removed |",
        "|---|---|---|---|---|---|---|",
    ]
    for task_name in TASKS:
        student, tokenizer, task, rows, stop_tokens = load_task(task_name, 0, size.questions)
        config = replace(probe_config(budget, size.max_new_tokens, stop_tokens), update=True, influence=False)
        report = Probe(student, tokenizer, task.reward, TEACHERS, config).run(rows[:questions], seed=0)
        save(report, results / f"gating-why-{task_name}", overwrite=True)
        for teacher in TEACHERS:
            for figure in ("update_gain", "predicted_gain"):
                found = gains(report, figure)
                cells = [
                    show(tuple(found[f"{teacher}/{split}"]), sign=True) for split in (*SPLITS, "incorrect-correct")
                ]
                gain_rows.append(f"| {task_name} | {teacher} | {figure} | " + " | ".join(cells) + " |")
        rule_rows += [
            f"| {task_name} | {score.teacher} | {score.rule} | {score.token_share:.2f} "
            f"| {show(interval_of(score.gained), sign=True)} | {score.help_kept.value:.2f} "
            f"| {score.harm_removed.value:.2f} |"
            for score in score_rules(report)
        ]
    return "\n".join([*gain_rows, "", *rule_rows])


def interval_of(estimate: Any) -> Interval:
    return estimate.value, estimate.low, estimate.high


def gains(report: Any, figure: str) -> dict[str, list[float]]:
    """A figure of each teacher in each class of a probe."""
    return {
        f"{summary.teacher}/{summary.split}": list(interval_of(summary.figures[figure]))
        for summary in Analysis(report).summaries()
    }


def kept_runs(results: Path) -> list[dict[str, Any]]:
    path = results / RUNS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_with_interval(values: list[float]) -> Interval:
    """Mean with Student's 95 % interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, float("nan"), float("nan")
    half_width = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - half_width, mean + half_width


def results_table(steps: int, results: Path) -> str:
    """End accuracy, mean accuracy along the way (step efficiency), and both against the same teacher without a gate."""
    runs = [run for run in kept_runs(results) if run["steps"] == steps]
    accuracy = {
        (run["task"], run["arm"], run["seed"]): {int(step): np.mean(marks) for step, marks in run["marks"].items()}
        for run in runs
    }
    lines = [
        "| task | arm | runs | before | after | after, against no gate | along the way, against no gate | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in (*TASKS, "both"):
        for arm in ARMS:
            keys = [key for key in accuracy if task in (key[0], "both") and key[1] == arm]
            if not keys:
                continue
            pairs = [
                (accuracy[key], accuracy[baseline])
                for key in keys
                if (baseline := (key[0], ARMS[arm].baseline, key[2])) in accuracy
            ]
            before = np.mean([accuracy[key][0] for key in keys])
            cells = [f"{before:.3f}", show(mean_with_interval([accuracy[key][steps] for key in keys]))]
            if arm == ARMS[arm].baseline:
                cells += ["", ""]
            else:
                at_end = [gated[steps] - ungated[steps] for gated, ungated in pairs]
                along = [
                    np.mean([gated[step] - ungated[step] for step in gated if step > 0]) for gated, ungated in pairs
                ]
                cells += [show(mean_with_interval(at_end), sign=True), show(mean_with_interval(along), sign=True)]
            seconds = np.mean(
                [run["seconds"] - run["seconds_exam"] for run in runs if (run["task"], run["arm"], run["seed"]) in keys]
            )
            lines.append(f"| {task} | {arm} | {len(keys)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def show(interval: Interval, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    value, low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def main(
    seeds: list[int], steps: int, arms: list[str], tasks: tuple[str, ...], size: TrainingSize, results: Path
) -> None:
    """Train whatever is not kept yet, and print the table."""
    results.mkdir(exist_ok=True)
    for seed in seeds:
        for task in tasks:
            for arm in arms:
                kept = {(run["task"], run["arm"], run["seed"], run["steps"]) for run in kept_runs(results)}
                if (task, arm, seed, steps) in kept:
                    continue
                result = train(task, arm, seed, steps, size)
                with (results / RUNS_FILE).open("a") as file:
                    file.write(json.dumps(result) + "\n")
                accuracy = {step: round(float(np.mean(marks)), 3) for step, marks in result["marks"].items()}
                print(f"{task} {arm} seed {seed}: {accuracy} in {result['seconds']:.0f} s", flush=True)
    table = results_table(steps, results)
    (results / "gating.md").write_text(f"{steps} steps, 95 % intervals over runs\n\n{table}\n")
    print(table)


def smoke() -> None:
    """Three arms of one step, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        main([0], 1, ["TeacherRouter (tokens)", *CONTROL], TASKS[:1], SMOKE_SIZE, Path(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--control", action="store_true", help="only the positive control, on the first task")
    parser.add_argument("--report", action="store_true", help="print the table of what is done, and train nothing")
    parser.add_argument("--why", action="store_true", help="only ask the library about the untrained student")
    parser.add_argument("--questions", type=int, default=48, help="questions of `--why`")
    parser.add_argument("--budget", type=int, default=16000, help="tokens of continuations of `--why`")
    parser.add_argument("--smoke", action="store_true", help="the smallest size: show only that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    disable_possible_user_warnings()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    given = parse_arguments()
    if given.smoke:
        smoke()
    elif given.report:
        print(results_table(given.steps, RESULTS))
    elif given.why:
        table = explain(given.questions, given.budget, TrainingSize(), RESULTS)
        (RESULTS / "gating-why.md").write_text(
            f"{given.questions} questions, at most {given.budget} continuations a task, 95 % intervals\n\n{table}\n"
        )
        print(table)
    elif given.control:
        main(
            given.seeds, given.steps, [arm for arm in given.arms if arm in CONTROL], TASKS[:1], TrainingSize(), RESULTS
        )
    else:
        main(given.seeds, given.steps, given.arms, TASKS, TrainingSize(), RESULTS)
