"""A whole training: the sum of the gains that its steps were expected to bring, and the success that it reached.

`realised.py` runs it. The callback's `odp/step/gain` is taken as it is logged.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation
from odp_callbacks.functional import lora_parameters
from odp_callbacks.functional.gradients import evaluation_mode

STEP = "odp/step/"
LEARNING_RATE = 3e-4
QUESTIONS_PER_STEP, ROLLOUTS_PER_QUESTION = 4, 4


class KeepingLogger(DummyLogger):
    """Keeps the figures of the callback's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if f"{STEP}gain" in metrics:
            own = {name.removeprefix(STEP): float(value) for name, value in metrics.items() if name.startswith(STEP)}
            self.figures.append({"step": float(step or 0), **own})


class SuccessAt(Callback):
    """Measures held-out success and the distance from the start, once, after a number of steps."""

    def __init__(self, experiment: Any, step: int) -> None:
        self.experiment, self.step = experiment, step
        self.start = flat_parameters(experiment.student)
        self.line: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.random.fork_rng(), evaluation_mode(pl_module.student):
                self.line = self.experiment.success()
            self.line["distance"] = float((flat_parameters(pl_module.student) - self.start).norm())


def train(experiment: Any, context: str) -> dict[str, Any]:
    """Train the experiment's student on one context, and put its parameters back.

    One more batch than steps is drawn: a step's gain is measured on the rollouts after it.
    """
    given, steps = experiment.given, experiment.given.steps
    teacher = {context: experiment.task.contexts[context]}
    rows = experiment.task.rows[: given.questions]
    torch.manual_seed(given.seed)
    module = OnPolicyDistillation(
        experiment.student,
        experiment.tokenizer,
        teacher,
        max_new_tokens=given.max_new_tokens,
        rollouts_per_question=ROLLOUTS_PER_QUESTION,
        eos_token_ids=experiment.eos_token_ids,
        reward=experiment.task.reward,
        learning_rate=LEARNING_RATE,
    )
    callback = GradientAlignmentCallback(
        teacher,
        rows,
        experiment.task.reward,
        every_n_steps=10_000,
        max_overhead=None,
        strict=True,
        max_new_tokens=given.max_new_tokens,
        eos_token_ids=experiment.eos_token_ids,
        budget=0,
    )
    logger, after = KeepingLogger(), SuccessAt(experiment, steps)
    trainer = Trainer(
        max_steps=steps + 1,
        max_epochs=steps + 1,
        accelerator="cpu",
        devices=1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[callback, after],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    before = experiment.base_success()
    with experiment.moved_by(torch.zeros_like(after.start)):
        trainer.fit(module, DataLoader(rows, batch_size=QUESTIONS_PER_STEP, shuffle=True, collate_fn=list))
    experiment.student.eval()
    return {"steps": steps, "before": before, "after": after.line, "figures": logger.figures}


def flat_parameters(student: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in lora_parameters(student).values()])
