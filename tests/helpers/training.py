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

ROWS = [
    {"prompt": prompt, "answer": answer} for prompt, answer in zip(("a b", "c", "b a d", "d c"), "abcd", strict=True)
]
TEACHERS = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}


def contains_answer_reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """Rewards the answer; it draws from every global random stream, as careless verifiers do."""
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    return [float(right in completion.split()) for completion, right in zip(completions, answer, strict=True)]


def make_callback(**changes: Any) -> GradientAlignmentCallback:
    options: dict[str, Any] = {
        "teachers": dict(TEACHERS),
        "prompts": ROWS,
        "reward": contains_answer_reward,
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
    options = {"max_new_tokens": 5, "learning_rate": 1e-2, "reward": contains_answer_reward}
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


def make_loader(rows: Any = ROWS, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=list)


class ManualOptimization(OnPolicyDistillation):
    """Distillation by manual optimization, with two optimizers."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        batch_losses = self.token_losses(self.sample(batch))
        self.manual_backward(batch_losses.losses.sum() / batch_losses.mask.sum())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [torch.optim.Adam(parameters[::2], lr=1e-2), torch.optim.SGD(parameters[1::2], lr=1e-2, momentum=0.9)]


def end_state(trainer: Trainer) -> tuple[Any, ...]:
    """Everything that a callback could have changed: weights, optimizers, random streams, modes and flags."""
    module = trainer.lightning_module
    return (
        {name: parameter.detach().clone() for name, parameter in module.named_parameters()},
        [optimizer.state_dict() for optimizer in trainer.optimizers],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        [submodule.training for submodule in module.modules()],
        [parameter.requires_grad for parameter in module.parameters()],
    )


def states_equal(first: Any, second: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(states_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(states_equal, first, second))
    return bool(first == second)


def odd_length_reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Rewards an odd number of words; like :func:`contains_answer_reward`, it draws from every random stream."""
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    return [float(len(completion.split()) % 2) for completion in completions]


class LearningGate:
    """A gate that counts the probes it has learned from."""

    def __init__(self, broken: bool = False) -> None:
        self.reports: list[ProbeReport] = []
        self.broken, self.count = broken, 0

    def observe(self, report: ProbeReport) -> None:
        if self.broken:
            raise RuntimeError("no")
        self.reports.append(report)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def make_watching_callback(**changes: Any) -> GradientAlignmentCallback:
    """A callback with few questions and a reward that needs no answers."""
    return make_callback(**{"reward": odd_length_reward, "questions_per_probe": 2, **changes})
