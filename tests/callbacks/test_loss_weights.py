"""The callback that adds a gate's weights to the batch."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from odp_callbacks import IncorrectRolloutGate, LossWeightCallback
from odp_callbacks.gates.rules import pass_rate

ROWS = [
    {"completion_mask": torch.tensor([1, 1, 0]), "rewards": torch.tensor(1.0), "question": 0},
    {"completion_mask": torch.tensor([1, 1, 1]), "rewards": torch.tensor(0.0), "question": 0},
    {"completion_mask": torch.tensor([1, 0, 0]), "rewards": torch.tensor(0.0), "question": 1},
    {"completion_mask": torch.tensor([1, 0, 0]), "rewards": torch.tensor(0.0), "question": 1},
]


class UserModule(LightningModule):
    """A user's module, whose per-token losses are multiplied by the batch's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.weights: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.weights.append(batch["loss_weights"])
        return (batch["loss_weights"] * self.scale).sum() / batch["completion_mask"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: LossWeightCallback, rows: Any = ROWS, **options: Any) -> tuple[UserModule, Trainer]:
    module = UserModule()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, log_every_n_steps=1, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=4, **options))
    return module, trainer


def test_the_batch_gets_weights_with_a_mean_of_one() -> None:
    module, trainer = fit(LossWeightCallback(IncorrectRolloutGate()))
    (weights,) = module.weights
    assert weights.flatten().tolist() == pytest.approx([0, 0, 0, *[7 / 5] * 3, 7 / 5, 0, 0, 7 / 5, 0, 0])
    assert weights.dtype == torch.float32
    assert float(trainer.callback_metrics["train/gate/rollout_share"]) == pytest.approx(3 / 4)


def test_pass_rates_use_the_questions_of_the_batch() -> None:
    module, _ = fit(LossWeightCallback(pass_rate, questions="question"))
    assert module.weights[0][0].tolist() == pytest.approx([7 / 5, 7 / 5, 0])
    assert module.weights[0][2:].sum() == 0


def test_an_unusable_batch_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"`mask` is 'mask', but the batch has no such entry; it has \['completion"):
        fit(LossWeightCallback(IncorrectRolloutGate(), mask="mask"))
    with pytest.raises(ValueError, match="`batch` must be a mapping to which weights can be added, but is list"):
        fit(LossWeightCallback(IncorrectRolloutGate()), collate_fn=list)
    with pytest.raises(ValueError, match="`gate` needs 'correct'"):
        fit(LossWeightCallback(IncorrectRolloutGate(), rewards="scores"))
    with pytest.raises(ValueError, match="`gate` must be a function"):
        LossWeightCallback(3)  # type: ignore[arg-type]


class BreakingGate:
    """A gate that fails from the second batch on."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, tokens: Any) -> Tensor:
        self.batches += 1
        if self.batches > 1:
            raise RuntimeError("no gate today")
        return torch.ones(len(tokens))


def test_a_gate_that_fails_later_costs_the_gating_and_not_the_training() -> None:
    with pytest.warns(UserWarning, match="a batch was not gated: RuntimeError: no gate today") as caught:
        module, trainer = fit(LossWeightCallback(BreakingGate()), ROWS * 3)
    assert trainer.global_step == 3
    assert sum("no gate today" in str(warning.message) for warning in caught) == 1
    assert torch.equal(module.weights[1], torch.stack([row["completion_mask"] for row in ROWS]).float())
    with pytest.raises(RuntimeError, match="no gate today"):
        fit(LossWeightCallback(BreakingGate(), strict=True), ROWS * 3)


def test_a_gate_that_fails_at_once_is_refused() -> None:
    gate = BreakingGate()
    gate.batches = 1
    with pytest.raises(RuntimeError, match="no gate today"):
        fit(LossWeightCallback(gate))
