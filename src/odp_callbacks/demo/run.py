"""The demonstration's run: load, fine-tune a teacher, distil while the callback measures, show the results."""

import time
import warnings
from dataclasses import dataclass, field, replace
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
from odp_callbacks.files import check_can_be_written, local_path
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import RUN_SETTING, load, record_folders
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.table import summary_table

LINES_PER_DOCUMENT = 8
DOCUMENTS_PER_STEP = 4


@dataclass(frozen=True)
class DemoConfig:
    """The arguments of ``odp-callbacks demo``.

    Attributes:
        model: Local folder or hub name of the student; none for SmolLM2-135M-Instruct.
        teacher_model: Local folder or hub name of an external teacher; none fine-tunes an adapter on the task.
        task: A reasoning-gym dataset.
        steps: Optimizer steps of the student.
        probes: Probes during training, besides the one before it.
        questions: Questions in each probe.
        shots: Solved examples in each prompt.
        teacher_steps: Optimizer steps of the fine-tuned teacher.
        seed: Seed of all random draws.
        output: Folder for TensorBoard's files, records and report.
        probe: How to measure.
    """

    model: str | None = None
    teacher_model: str | None = None
    task: str = "chain_sum"
    steps: int = 6
    probes: int = 1
    questions: int = 6
    shots: int = 2
    teacher_steps: int = 12
    seed: int = 0
    output: str = "odp-demo"
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        """Check what the callback does not check."""
        for name in ("steps", "probes", "questions", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {getattr(self, name)!r} was given.")
        check_can_be_written("output", local_path("output", self.output))
        if self.probes > self.steps:
            raise ValueError(f"`probes` must be at most `steps` = {self.steps}, but {self.probes} was given.")


def run_demo(config: DemoConfig, console: Console) -> ProbeReport:
    """Run the demonstration, and print its table.

    Args:
        config: The arguments of the command.
        console: Where progress and results are printed.

    Returns:
        The report of the last probe.
    """
    start = time.perf_counter()
    seed_everything(config.seed, verbose=False)
    model, tokenizer = load_student(config.model, console.print)
    task = make_task(
        config.task,
        questions=4 * config.questions,
        lines=LINES_PER_DOCUMENT * DOCUMENTS_PER_STEP * config.teacher_steps,
        shots=config.shots,
        seed=config.seed,
    )
    student: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    teachers = _make_teachers(student, tokenizer, task, config, console)
    student.train()
    # The end of a line ends a response, as in the examples of the prompt.
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    probe = replace(config.probe, eos_token_ids=(*config.probe.eos_token_ids, *newline))
    module = OnPolicyDistillation(
        student,
        tokenizer,
        list(teachers.values())[-1],
        max_new_tokens=probe.max_new_tokens,
        eos_token_ids=probe.eos_token_ids,
        reward=task.reward,
        learning_rate=2e-4,
    )
    callback = GradientAlignmentCallback(
        teachers,
        task.rows,
        task.reward,
        every_n_steps=config.steps // config.probes,
        max_overhead=None,  # so short a run is there for its probes
        questions_per_probe=config.questions,
        at_start=True,
        seed=config.seed,
        strict=True,
        records=local_path("output", config.output) / "records",
        config=probe,
    )
    console.print(f"watch it live:  [bold]tensorboard --logdir {config.output}[/bold]")
    trainer = _train(module, callback, task, config)
    time_share = float(trainer.callback_metrics["odp/probe/time_share"])
    return _show_results(callback, config, console, time.perf_counter() - start, time_share)


def _make_teachers(
    student: Any, tokenizer: Any, task: Task, config: DemoConfig, console: Console
) -> dict[str, Teacher]:
    """Two contexts for the student itself, and a teacher with other weights; the last one is distilled."""
    teachers: dict[str, Teacher] = {
        "answer": Teacher("The answer is {answer}.\n{prompt}"),
        "solution": Teacher("{solution}\n{prompt}"),
    }
    if config.teacher_model is None:
        tune_adapter(student, tokenizer, task, config.teacher_steps, console)
        teachers["tuned"] = AdapterTeacher("tuned")
    else:
        teacher_model, teacher_tokenizer = load_student(config.teacher_model, console.print)
        teachers["external"] = ModelTeacher(teacher_model, tokenizer=teacher_tokenizer)
    return teachers


def _train(
    module: OnPolicyDistillation, callback: GradientAlignmentCallback, task: Task, config: DemoConfig
) -> Trainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        trainer = Trainer(
            max_steps=config.steps,
            max_epochs=config.steps,
            accelerator="auto",
            devices=1,
            logger=TensorBoardLogger(local_path("output", config.output), name=config.task),
            callbacks=[callback],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        rows: Any = task.rows
        trainer.fit(module, DataLoader(rows, batch_size=8, shuffle=True, collate_fn=list))
    return trainer


def _show_results(
    callback: GradientAlignmentCallback, config: DemoConfig, console: Console, seconds: float, time_share: float
) -> ProbeReport:
    report = callback.last_report
    assert report is not None
    console.print(summary_table(report))
    output = local_path("output", config.output)
    saved_probes = [(folder.name, load(folder)) for folder in record_folders(output / "records")]
    run = callback.monitor.run_records.run  # an earlier demo may have left probes in the folder
    probes = [(name, probe) for name, probe in saved_probes if probe.settings.get(RUN_SETTING) == run]
    page = write_report(probes, output / "report.html")
    console.print(
        f"{seconds:.0f} s in all; probes took {time_share:.0%} of the training's time.\n"
        f"See it:  [bold]{page}[/bold] in a browser, and [bold]tensorboard --logdir {config.output}[/bold]"
    )
    return report


def tune_adapter(student: Any, tokenizer: Any, task: Task, steps: int, console: Console) -> None:
    """Fine-tune a new adapter named ``"tuned"`` on the task's worked lines, and leave the student's own active.

    Args:
        student: A peft model with one adapter.
        tokenizer: Its tokenizer.
        task: The task with its worked lines.
        steps: Optimizer steps.
        console: Where progress is shown.
    """
    student.add_adapter("tuned", LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    student.set_adapter("tuned")
    device = next(student.parameters()).device
    trainable_parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable_parameters, lr=2e-3)
    documents = [
        "\n".join(task.lines[first_line : first_line + LINES_PER_DOCUMENT]) + "\n"
        for first_line in range(0, len(task.lines), LINES_PER_DOCUMENT)
    ]
    student.train()
    for step in track(range(steps), "fine-tuning a teacher on the task", console=console, transient=True):
        first_document = DOCUMENTS_PER_STEP * step
        batch = documents[first_document : first_document + DOCUMENTS_PER_STEP]
        token_ids = [encode_prompt(tokenizer, document) for document in batch]
        input_ids = pad_sequence(token_ids, batch_first=True)
        mask = pad_sequence([torch.ones_like(ids) for ids in token_ids], batch_first=True)
        loss = student(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            labels=input_ids.masked_fill(mask == 0, -100).to(device),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.set_adapter("default")
