"""The callback is a guest: training ends in the same bits with and without it, over the matrix of ways to train."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from odp_callbacks import EMATeacher, OnPolicyDistillation, Teacher
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import ROWS, TEACHERS, end_state, make_callback, make_trainer, same, starts_right

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class ByHand(OnPolicyDistillation):
    """Manual optimization, with its own accumulation."""

    every = 1

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx) / self.every)
        if (batch_idx + 1) % self.every == 0:
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
    """A seeded training of a tiny student; everything random in it hangs on the seed."""
    seed_everything(3, verbose=False)
    student = tiny("llama", dropout=dropout).float().train()
    if checkpointing:
        base = student.get_base_model()
        enable = "activation_checkpointing_enable"
        getattr(base, enable if hasattr(base, enable) else "gradient_checkpointing_enable")()
        student.enable_input_require_grads()
    kind = type("ByHandEvery", (ByHand,), {"every": accumulate}) if manual else OnPolicyDistillation
    module = kind(
        student, word_tokenizer(), Teacher("{answer} {prompt}"),
        max_new_tokens=5, learning_rate=1e-2, reward=starts_right,
    )  # fmt: skip
    rows = DataLoader(ROWS, batch_size=1, shuffle=True, collate_fn=list, num_workers=workers)  # type: ignore[arg-type]
    trainer = make_trainer(
        callback, precision=precision, max_steps=steps, max_epochs=100,
        **({} if manual else {"accumulate_grad_batches": accumulate}), **options,
    )  # fmt: skip
    trainer.fit(module, rows, ckpt_path=resume, weights_only=False if resume else None)
    assert trainer.global_step == steps
    return trainer


def check(probes: int, **options: Any) -> None:
    callback = make_callback(teachers={**TEACHERS, "ema": EMATeacher(0.5)}, at_start=True, questions_per_probe=2)
    with_callback = end_state(train(callback, **options))
    without = end_state(train(None, **options))
    assert callback.last_report is not None
    assert callback.last_report.nodes
    assert [same(ours, theirs) for ours, theirs in zip(with_callback, without, strict=True)] == [True] * len(without)
    assert callback.monitor.probes == probes


@pytest.mark.parametrize(
    ("number", "options"),
    list(
        enumerate(
            {"precision": p, "accumulate": a, "checkpointing": c, "dropout": d, "manual": m}
            for p, a, c, d, m in product(PRECISIONS, (1, 2), (False, True), (0.0, 0.2), (False, True))
        )
    ),
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_training_ends_in_the_same_bits_however_one_trains(number: int, options: dict[str, Any]) -> None:
    # Worker processes cost a second: every sixth combination has them.
    check(3, **options, workers=2 if number % 6 == 5 else 0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_stopped_and_resumed_it_ends_in_the_same_bits_and_probes_as_if_it_had_not_stopped(
    precision: Any, tmp_path: Path
) -> None:
    def interrupted(callback: Any, again: Any, name: str) -> Trainer:
        train(callback, precision=precision, dropout=0.2, steps=3).save_checkpoint(tmp_path / name)
        return train(again, precision=precision, dropout=0.2, steps=7, resume=tmp_path / name)

    callbacks = [make_callback(teachers={"ema": EMATeacher(0.5)}) for _ in range(3)]
    whole, first, second = callbacks
    train(whole, precision=precision, dropout=0.2, steps=7)
    ours, theirs = end_state(interrupted(first, second, "with")), end_state(interrupted(None, None, "without"))
    assert [same(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)
    for name in ("probes", "last_step", "last_probe", "order"):
        assert second.state_dict()[name] == whole.state_dict()[name]
    assert torch.equal(second.state_dict()["stream"], whole.state_dict()["stream"])
