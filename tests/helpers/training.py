"""A tiny distillation with the callback, and the state that it ends in."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, OnPolicyDistillation, Teacher
from odp_callbacks.records import ProbeReport
from tests.helpers.models import tiny, word_tokenizer

ROWS = [{"prompt": p, "answer": a} for p, a in zip(("a b", "c", "b a d", "d c"), "abcd", strict=True)]


TEACHERS = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}


def starts_right(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """A verifier that draws from every global random stream, as careless ones do."""
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    return [float(a in c.split()) for c, a in zip(completions, answer, strict=True)]


def make_callback(**changes: Any) -> GradientAlignmentCallback:
    options: dict[str, Any] = {
        "teachers": dict(TEACHERS),
        "prompts": ROWS,
        "reward": starts_right,
        "every_n_steps": 2,
        "max_overhead": None,
        "questions_per_probe": 3,
        "strict": True,
        "rollouts_per_question": 2,
        "max_new_tokens": 5,
        "continuations": 2,
    }
    return GradientAlignmentCallback(**(options | changes))


def make_module(dropout: float = 0.0, **changes: Any) -> OnPolicyDistillation:
    student = tiny("llama", dropout=dropout).float().train()
    options = {"max_new_tokens": 5, "learning_rate": 1e-2, "reward": starts_right}
    return OnPolicyDistillation(student, word_tokenizer(), Teacher("{answer} {prompt}"), **(options | changes))


def make_trainer(callback: Any = None, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "callbacks": [] if callback is None else [callback],
    }
    return Trainer(**(options | changes))


def loader(rows: Any = ROWS, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=list)


class Manual(OnPolicyDistillation):
    """The same by manual optimization, with two optimizers."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        taken = self.token_losses(self.sample(batch))
        self.manual_backward(taken.losses.sum() / taken.mask.sum())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.Adam(parameters[::2], lr=1e-2), torch.optim.SGD(parameters[1::2], lr=1e-2, momentum=0.9)]


def end_state(trainer: Trainer) -> tuple[Any, ...]:
    module = trainer.lightning_module
    return (
        {name: p.detach().clone() for name, p in module.named_parameters()},
        [optimizer.state_dict() for optimizer in trainer.optimizers],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def odd(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """A verifier that draws from every global random stream, as careless ones do."""
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    return [float(len(c.split()) % 2) for c in completions]


class Gate:
    def __init__(self, broken: bool = False) -> None:
        self.seen: list[ProbeReport] = []
        self.broken, self.count = broken, 0

    def observe(self, report: ProbeReport) -> None:
        if self.broken:
            raise RuntimeError("no")
        self.seen.append(report)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def watcher(**changes: Any) -> GradientAlignmentCallback:
    return make_callback(**{"reward": odd, "questions_per_probe": 2, **changes})
