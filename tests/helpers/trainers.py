"""Runs of the trainers of transformers and TRL on a tiny student, and the state that they end in."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from odp_callbacks import GradientAlignmentTrainerCallback
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.training import ROWS, TEACHERS, odd_length_reward

# TRL needs Python 3.11; with an older one, the tests that import this module are skipped.
pytest.importorskip("trl")
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "logging_steps": 1,
    "bf16": False,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "save_strategy": "no",
}


def trainer_student(dropout: float = 0.0) -> nn.Module:
    return tiny("llama", dropout=dropout).float().train()


def distillation_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> DistillationTrainer:
    args = DistillationConfig(output_dir=str(folder), max_completion_length=5, **(COMMON | changes))
    return DistillationTrainer(
        model=trainer_student(dropout),
        teacher_model=tiny_base(seed=5).float(),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=word_tokenizer(),
    )


def chat_rows() -> Dataset:
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]}
            for row in ROWS
        ]
    )


def gkd_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> GKDTrainer:
    options = {"max_new_tokens": 5, "max_length": 32, "lmbda": 1.0}
    args = GKDConfig(output_dir=str(folder), **(COMMON | options | changes))
    return GKDTrainer(
        model=trainer_student(dropout),
        teacher_model=tiny_base(seed=5).float(),
        args=args,
        train_dataset=chat_rows(),
        processing_class=word_tokenizer(),
    )


def sft_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder), max_length=32, **(COMMON | changes))
    return SFTTrainer(
        model=trainer_student(dropout), args=args, train_dataset=chat_rows(), processing_class=word_tokenizer()
    )


def plain_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Trainer:
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}, {"input_ids": [1, 8, 9, 6], "labels": [1, 8, 9, 6]}]
    args = TrainingArguments(output_dir=str(folder), **(COMMON | changes))
    return Trainer(
        model=trainer_student(dropout),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )


def add_callback(trainer: Any, **changes: Any) -> GradientAlignmentTrainerCallback:
    arguments: dict[str, Any] = {"teachers": dict(TEACHERS), "prompts": ROWS, "reward": odd_length_reward}
    schedule_options = {
        "every_n_steps": 2,
        "max_overhead": None,
        "questions_per_probe": 2,
        "strict": True,
        "log": "all",
    }
    probe_options = {"rollouts_per_question": 2, "max_new_tokens": 4, "continuations": 2}
    callback = GradientAlignmentTrainerCallback(trainer, **(arguments | schedule_options | probe_options | changes))
    trainer.add_callback(callback)
    return callback


def trainer_end_state(trainer: Any) -> dict[str, Any]:
    """Weights, optimizer and random streams when training is over."""
    state = {f"weight {name}": weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for index, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer {index} {name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    state["torch"] = torch.get_rng_state()
    state["numpy"] = torch.tensor(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    state["python"] = torch.tensor(random.getstate()[1])
    state["training"] = torch.tensor([module.training for module in trainer.model.modules()])
    return state
