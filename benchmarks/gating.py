"""Does a gate help? On-policy distillation of SmolLM2-135M from the same teacher, with and without gates.

Two reasoning-gym tasks, five arms, several seeds; the arms of one seed see the same questions in the same order and
start from the same adapter. Teacher is the student itself with the worked solution in its context; the router may also
turn to the one that is only told the answer. Held-out accuracy (mean reward at the training's temperature, on questions
that training never sees) half way and at the end, with intervals over runs, paired with "no gate". Whatever is done is
kept in `results/gating.jsonl`, one line a run: started again, it goes on. `--why` asks the library itself, before any
training and of more questions than a probe in a run: in which class does which teacher help, and what would each rule
have gained?

Run: python benchmarks/gating.py [--seeds 0 1 2] [--steps 16] [--arms ARM ...] [--report | --why]
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import disable_possible_user_warnings
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch.utils.data import DataLoader

from odp_callbacks import AlignmentGate, GradientAlignmentCallback, IncorrectRolloutGate, OnPolicyDistillation, Teacher
from odp_callbacks.analysis.summaries import SPLITS, Analysis
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import EASY, make_task
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.gates import TeacherRouter, score_rules
from odp_callbacks.gates.rules import correct_rollouts
from odp_callbacks.storage import save

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "gating.jsonl"
TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
ARMS = ("no gate", "incorrect only", "correct only", "AlignmentGate", "TeacherRouter")
TEACHERS = {"solution": "{solution}\n{prompt}", "answer": "The answer is {answer}.\n{prompt}"}
EASY |= TASKS


def gate_of(arm: str, seed: int) -> Any:
    return {
        "no gate": lambda: None,
        "incorrect only": IncorrectRolloutGate,
        "correct only": lambda: correct_rollouts,
        "AlignmentGate": AlignmentGate,
        "TeacherRouter": lambda: TeacherRouter(seed=seed),
    }[arm]()


class Exam(Callback):
    """Held-out success at some steps: mean reward of sampled responses, question by question."""

    def __init__(self, rows: list[Any], every: int) -> None:
        self.rows, self.every = rows, every
        self.marks: dict[int, list[float]] = {}
        self.seconds = 0.0

    def take(self, module: OnPolicyDistillation, step: int) -> None:
        start, usual = time.perf_counter(), module.rollouts_per_prompt
        module.rollouts_per_prompt = 4
        with torch.random.fork_rng():
            torch.manual_seed(10_000)
            rollouts = module.sample(self.rows)
        module.rollouts_per_prompt = usual
        self.marks[step] = np.array([r.reward for r in rollouts]).reshape(-1, 4).mean(axis=1).tolist()
        self.seconds += time.perf_counter() - start

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.take(pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.take(pl_module, trainer.global_step)


def ingredients(task_name: str, seed: int) -> tuple[Any, Any, Any, list[Any], tuple[int, ...]]:
    """Student, tokenizer, task, its different questions, and what ends a response."""
    seed_everything(seed, verbose=False)
    model, tokenizer = load_student(None, lambda _: None)
    task = make_task(task_name, questions=160, lines=0, shots=2, seed=100 + seed)
    student = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).train()
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    return student, tokenizer, task, list({row["prompt"]: row for row in task.rows}.values()), newline


def run(task_name: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One training."""
    start = time.perf_counter()
    student, tokenizer, task, rows, newline = ingredients(task_name, seed)
    held_out, training = rows[:24], rows[24:]
    teachers = {name: Teacher(context) for name, context in TEACHERS.items()}
    gate = gate_of(arm, seed)
    module = OnPolicyDistillation(
        student, tokenizer, teachers if arm == "TeacherRouter" else {"solution": teachers["solution"]},
        max_new_tokens=24, rollouts_per_prompt=2, eos_token_ids=newline, reward=task.reward, gate=gate,
        learning_rate=3e-4,
    )  # fmt: skip
    exam = Exam(held_out, max(1, steps // 2))
    callbacks: list[Callback] = [exam]
    probing = arm in ("AlignmentGate", "TeacherRouter")
    if probing:
        callbacks.append(
            GradientAlignmentCallback(
                teachers,
                training,
                task.reward,
                every_n_steps=max(1, steps // 3),
                at_start=True,
                max_overhead=None,
                questions_per_probe=8,
                rollouts_per_question=2,
                max_new_tokens=24,
                budget=3000,
                max_branches=3,
                tail_draws=1,
                eos_token_ids=newline,
                seed=seed,
                strict=True,
                step_alignment=False,
            )
        )
    trainer = Trainer(
        max_steps=steps, max_epochs=steps, accelerator="auto", devices=1, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(training, batch_size=4, shuffle=True, collate_fn=list))
    found = {
        "task": task_name, "arm": arm, "seed": seed, "steps": steps, "marks": exam.marks,
        "seconds": time.perf_counter() - start, "seconds_exam": exam.seconds,
    }  # fmt: skip
    if probing:
        found["weights"] = gate.scalars()
        report = callbacks[-1].last_report
        found["probe"] = figures(report)
        found["rules"] = [
            {"rule": s.rule, "teacher": s.teacher, "gain": s.predicted_gain.value, "gained": triple(s.gained),
             "harm_removed": s.harm_removed.value, "help_kept": s.help_kept.value, "token_share": s.token_share}
            for s in score_rules(report)
        ]  # fmt: skip
    return found


def why(questions: int, budget: int) -> str:
    """Predicted gain of each teacher by class, and what each rule would gain, on the student before training."""
    lines = ["| task | teacher | all | correct | incorrect | incorrect - correct |", "|---|---|---|---|---|---|"]
    more = ["| task | teacher | rule | tokens | gained | help kept | harm removed |", "|---|---|---|---|---|---|---|"]
    for task_name in TASKS:
        student, tokenizer, task, rows, newline = ingredients(task_name, 0)
        probe = Probe(
            student, tokenizer, task.reward, TEACHERS,
            ProbeConfig(
                rollouts_per_question=2, max_new_tokens=24, budget=budget, max_branches=3, tail_draws=1,
                eos_token_ids=newline, step_alignment=False,
            ),
        )  # fmt: skip
        found = probe.run(rows[:questions], seed=0)
        save(found, RESULTS / f"gating-why-{task_name}", overwrite=True)
        gains = figures(found)
        for teacher in TEACHERS:
            cells = [show(tuple(gains[f"{teacher}/{split}"]), sign=True) for split in (*SPLITS, "incorrect-correct")]
            lines.append(f"| {task_name} | {teacher} | " + " | ".join(cells) + " |")
        more += [
            f"| {task_name} | {s.teacher} | {s.rule} | {s.token_share:.2f} | {show(triple(s.gained), sign=True)} "
            f"| {s.help_kept.value:.2f} | {s.harm_removed.value:.2f} |"
            for s in score_rules(found)
        ]
    return "\n".join([*lines, "", *more])


def triple(figure: Any) -> tuple[float, float, float]:
    return figure.value, figure.low, figure.high


def figures(report: Any) -> dict[str, list[float]]:
    """Predicted gain of each teacher in each class of a probe."""
    return {f"{s.teacher}/{s.split}": list(triple(s.figures["predicted_gain"])) for s in Analysis(report).summaries()}


def done() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean with Student's 95 % interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def report(steps: int) -> str:
    """The table: end accuracy, mean accuracy along the way (step efficiency), and both against "no gate"."""
    found = [r for r in done() if r["steps"] == steps]
    by = {(r["task"], r["arm"], r["seed"]): {int(k): np.mean(v) for k, v in r["marks"].items()} for r in found}
    lines = [
        "| task | arm | runs | before | after | after, against no gate | along the way, against no gate | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in (*TASKS, "both"):
        for arm in ARMS:
            keys = [key for key in by if task in (key[0], "both") and key[1] == arm]
            pairs = [(by[key], by[base]) for key in keys if (base := (key[0], "no gate", key[2])) in by]
            if not keys:
                continue
            last = [by[key][steps] for key in keys]
            cells = [f"{np.mean([by[key][0] for key in keys]):.3f}", show(interval(last))]
            if arm == "no gate":
                cells += ["", ""]
            else:
                cells.append(show(interval([a[steps] - b[steps] for a, b in pairs]), sign=True))
                along = [np.mean([a[s] - b[s] for s in a if s > 0]) for a, b in pairs]
                cells.append(show(interval(along), sign=True))
            seconds = np.mean(
                [r["seconds"] - r["seconds_exam"] for r in found if (r["task"], r["arm"], r["seed"]) in keys]
            )
            lines.append(f"| {task} | {arm} | {len(keys)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def show(figure: tuple[float, float, float], sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{figure[0]:{form}} ({figure[1]:{form}} to {figure[2]:{form}})"


def main(seeds: list[int], steps: int, arms: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for seed in seeds:
        for task in TASKS:
            for arm in arms:
                if any((r["task"], r["arm"], r["seed"], r["steps"]) == (task, arm, seed, steps) for r in done()):
                    continue
                found = run(task, arm, seed, steps)
                with KEPT.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                ends = {s: round(float(np.mean(v)), 3) for s, v in found["marks"].items()}
                print(f"{task} {arm} seed {seed}: {ends} in {found['seconds']:.0f} s", flush=True)
    table = report(steps)
    (RESULTS / "gating.md").write_text(f"{steps} steps, 95 % intervals over runs\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    disable_possible_user_warnings()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--report", action="store_true", help="only the table of what is done")
    parser.add_argument("--why", action="store_true", help="only what the library says of the untrained student")
    parser.add_argument("--questions", type=int, default=48, help="of `--why`")
    parser.add_argument("--budget", type=int, default=16000, help="continuations of `--why`")
    given = parser.parse_args()
    if given.report:
        print(report(given.steps))
    elif given.why:
        table = why(given.questions, given.budget)
        (RESULTS / "gating-why.md").write_text(
            f"{given.questions} questions, at most {given.budget} continuations a task, 95 % intervals\n\n{table}\n"
        )
        print(table)
    else:
        main(given.seeds, given.steps, given.arms)
