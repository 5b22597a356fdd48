"""Training ends in the same bits with and without the callback, for many combinations of training options."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from odp_callbacks import EMATeacher, OnPolicyDistillation, Teacher
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import (
    ROWS,
    TEACHERS,
    contains_answer_reward,
    end_state,
    make_callback,
    make_trainer,
    states_equal,
)

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class ManuallyAccumulating(OnPolicyDistillation):
    """Manual optimization, with its own gradient accumulation."""

    batches_per_step = 1

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx) / self.batches_per_step)
        if (batch_idx + 1) % self.batches_per_step == 0:
            optimizer = self.optimizers()
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]


def train(
    callback: Any,
    *,
    precision: Any = "32-true",
    accumulate: int = 1,
    checkpointing: bool = False,
    dropout: float = 0.0,
    manual: bool = False,
    workers: int = 0,
    steps: int = 4,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train a tiny student; everything random depends on the seed."""
    seed_everything(3, verbose=False)
    student = tiny("llama", dropout=dropout).float().train()
    if checkpointing:
        base = student.get_base_model()
        enable = "activation_checkpointing_enable"
        getattr(base, enable if hasattr(base, enable) else "gradient_checkpointing_enable")()
        student.enable_input_require_grads()
    module_class = OnPolicyDistillation
    if manual:
        module_class = type("ManualModule", (ManuallyAccumulating,), {"batches_per_step": accumulate})
    module = module_class(
        student, word_tokenizer(), Teacher("{answer} {prompt}"),
        max_new_tokens=5, learning_rate=1e-2, reward=contains_answer_reward,
    )  # fmt: skip
    loader = DataLoader(ROWS, batch_size=1, shuffle=True, collate_fn=list, num_workers=workers)  # type: ignore[arg-type]
    trainer = make_trainer(
        callback, precision=precision, max_steps=steps, max_epochs=100,
        **({} if manual else {"accumulate_grad_batches": accumulate}), **options,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False if resume else None)
    assert trainer.global_step == steps
    return trainer


def check_neutrality(probe_count: int, **options: Any) -> None:
    callback = make_callback(teachers={**TEACHERS, "ema": EMATeacher(0.5)}, at_start=True, questions_per_probe=2)
    with_callback = end_state(train(callback, **options))
    without = end_state(train(None, **options))
    assert callback.last_report is not None
    assert callback.last_report.nodes
    equal = [states_equal(part, expected) for part, expected in zip(with_callback, without, strict=True)]
    assert equal == [True] * len(without)
    assert callback.monitor.probe_count == probe_count


@pytest.mark.parametrize(
    ("number", "options"),
    [
        # Every fifth combination runs by default: each value occurs among them.
        pytest.param(
            number,
            dict(zip(("precision", "accumulate", "checkpointing", "dropout", "manual"), values, strict=True)),
            marks=() if number % 5 == 0 else pytest.mark.slow,
        )
        for number, values in enumerate(product(PRECISIONS, (1, 2), (False, True), (0.0, 0.2), (False, True)))
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_training_ends_in_the_same_bits(number: int, options: dict[str, Any]) -> None:
    # Worker processes cost a second: every sixth combination has them.
    check_neutrality(3, **options, workers=2 if number % 6 == 5 else 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_training_ends_in_the_same_bits_and_is_probed_as_if_it_had_not_stopped(
    precision: Any, tmp_path: Path
) -> None:
    def train_in_two_parts(first_callback: Any, second_callback: Any, name: str) -> Trainer:
        train(first_callback, precision=precision, dropout=0.2, steps=3).save_checkpoint(tmp_path / name)
        return train(second_callback, precision=precision, dropout=0.2, steps=7, resume=tmp_path / name)

    callbacks = [make_callback(teachers={"ema": EMATeacher(0.5)}) for _ in range(3)]
    uninterrupted, before_stop, after_stop = callbacks
    train(uninterrupted, precision=precision, dropout=0.2, steps=7)
    with_callback = end_state(train_in_two_parts(before_stop, after_stop, "with"))
    without = end_state(train_in_two_parts(None, None, "without"))
    equal = [states_equal(part, expected) for part, expected in zip(with_callback, without, strict=True)]
    assert equal == [True] * len(without)
    for name in ("probe_count", "last_step", "last_probe_step", "questions"):
        assert after_stop.state_dict()[name] == uninterrupted.state_dict()[name]
    assert torch.equal(after_stop.state_dict()["random_stream"], uninterrupted.state_dict()["random_stream"])
