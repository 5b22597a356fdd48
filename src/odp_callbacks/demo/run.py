"""The demo's run: load, fine-tune a teacher, distil with the callback watching, show the table."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from odp_callbacks.callbacks.lightning import GradientAlignmentCallback
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import Task, make_task
from odp_callbacks.distillation import OnPolicyDistillation
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import encode_prompt
from odp_callbacks.engine.teachers import AdapterTeacher, ModelTeacher, Teacher
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import load
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.table import summary_table


@dataclass(frozen=True)
class DemoConfig:
    """What the demo's flags set.

    Attributes:
        model: Local folder or hub name of the student; none for SmolLM2-135M-Instruct.
        teacher_model: Local folder or hub name of an external teacher; none fine-tunes an adapter on the task.
        task: A reasoning-gym dataset.
        steps: Optimizer steps of the student.
        probes: Probes during training, besides the one before it.
        questions: Questions in each probe.
        rollouts: Student rollouts of each question.
        continuations: Continuations of each branch, at most.
        budget: Tokens to spend on the continuations of a probe; none for no limit.
        max_new_tokens: Limit of a response.
        shots: Solved examples in each prompt.
        teacher_steps: Optimizer steps of the fine-tuned teacher.
        seed: Of everything.
        output: Folder for TensorBoard's files.
    """

    model: str | None = None
    teacher_model: str | None = None
    task: str = "chain_sum"
    steps: int = 6
    probes: int = 1
    questions: int = 6
    rollouts: int = 2
    continuations: int = 4
    budget: int | None = 3000
    max_new_tokens: int = 20
    shots: int = 2
    teacher_steps: int = 12
    seed: int = 0
    output: str = "odp-demo"

    def __post_init__(self) -> None:
        """Check what the callback does not."""
        for name in ("steps", "probes", "questions", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {getattr(self, name)!r} was given.")
        if self.probes > self.steps:
            raise ValueError(f"`probes` must be at most `steps` = {self.steps}, but {self.probes} was given.")
        self.probe_config(())

    def probe_config(self, eos_token_ids: tuple[int, ...]) -> ProbeConfig:
        """How the demo's probes measure."""
        return ProbeConfig(
            rollouts_per_question=self.rollouts,
            max_new_tokens=self.max_new_tokens,
            continuations=self.continuations,
            budget=self.budget,
            max_branches=3,
            tail_draws=1,
            eos_token_ids=eos_token_ids,
        )


def run_demo(config: DemoConfig, console: Console) -> ProbeReport:
    """Run the demonstration and print its table.

    Args:
        config: Its flags.
        console: Where it speaks.

    Returns:
        The last probe's report.
    """
    start = time.perf_counter()
    seed_everything(config.seed, verbose=False)
    model, tokenizer = load_student(config.model, console.print)
    task = make_task(
        config.task,
        questions=4 * config.questions,
        lines=8 * 4 * config.teacher_steps,
        shots=config.shots,
        seed=config.seed,
    )
    student: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    teachers: dict[str, Teacher] = {
        "answer": Teacher("The answer is {answer}.\n{prompt}"),
        "solution": Teacher("{solution}\n{prompt}"),
    }
    if config.teacher_model is None:
        tune_adapter(student, tokenizer, task, config.teacher_steps, console)
        teachers["tuned"] = AdapterTeacher("tuned")
    else:
        external, its_tokenizer = load_student(config.teacher_model, console.print)
        teachers["external"] = ModelTeacher(external, tokenizer=its_tokenizer)
    student.train()
    # A line's end ends the response, as it does in the examples of the prompt.
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    module = OnPolicyDistillation(
        student,
        tokenizer,
        list(teachers.values())[-1],
        max_new_tokens=config.max_new_tokens,
        eos_token_ids=newline,
        reward=task.reward,
        learning_rate=2e-4,
    )
    callback = GradientAlignmentCallback(
        teachers,
        task.rows,
        task.reward,
        every_n_steps=config.steps // config.probes,
        max_overhead=None,  # a run this short is for looking at its probes
        questions_per_probe=config.questions,
        at_start=True,
        seed=config.seed,
        strict=True,
        records=f"{config.output}/records",
        config=config.probe_config(newline),
    )
    logger = TensorBoardLogger(config.output, name=config.task)
    console.print(f"watch it live:  [bold]tensorboard --logdir {config.output}[/bold]")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        trainer = Trainer(
            max_steps=config.steps,
            max_epochs=config.steps,
            accelerator="auto",
            devices=1,
            logger=logger,
            callbacks=[callback],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        rows: Any = task.rows
        trainer.fit(module, DataLoader(rows, batch_size=8, shuffle=True, collate_fn=list))
    report = callback.last_report
    assert report is not None
    console.print(summary_table(report))
    probes = sorted(Path(config.output, "records").glob("step-*"))
    page = write_report([(probe.name, load(probe)) for probe in probes], Path(config.output, "report.html"))
    share = trainer.callback_metrics["odp/probe/time_share"]
    console.print(
        f"{time.perf_counter() - start:.0f} s in all; {float(share):.0%} of the training's time went into probes.\n"
        f"See it:  [bold]{page}[/bold] in a browser, and [bold]tensorboard --logdir {config.output}[/bold]"
    )
    return report


def tune_adapter(student: Any, tokenizer: Any, task: Task, steps: int, console: Console) -> None:
    """Fine-tune an adapter ``"tuned"`` on worked lines, eight in a document, and leave the student's own active."""
    student.add_adapter("tuned", LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    student.set_adapter("tuned")
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-3)
    documents = ["\n".join(task.lines[i : i + 8]) + "\n" for i in range(0, len(task.lines), 8)]
    student.train()
    for step in track(range(steps), "fine-tuning a teacher on the task", console=console, transient=True):
        encoded = [encode_prompt(tokenizer, d) for d in documents[4 * step : 4 * step + 4]]
        ids = pad_sequence(encoded, batch_first=True)
        mask = pad_sequence([torch.ones_like(x) for x in encoded], batch_first=True)
        loss = student(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=ids.masked_fill(mask == 0, -100).to(device)
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.set_adapter("default")
