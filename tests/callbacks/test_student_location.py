"""Modules that build their student, tokenizer or gate only when a trainer runs them."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import (
    LearningGate,
    make_callback,
    make_loader,
    make_watching_callback,
    odd_length_reward,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
IDS = torch.tensor([[1, 5, 6, 9, 7, 8]])
STUDENTS: dict[str, Any] = {"found": None, "path": "parts.pupil", "function": lambda module: module.parts.pupil}


def late_module(package: str, hook: str, *, tokenizer_in_hook: bool = False, student: bool = True) -> Any:
    """A module that builds its student in ``hook``."""
    lightning = import_module(package)

    class LateModule(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            if not tokenizer_in_hook:
                self.tokenizer = word_tokenizer()

        def build(self) -> None:
            if hasattr(self, "parts"):
                return
            self.parts = nn.Module()
            self.parts.pupil = tiny("llama").float().train() if student else nn.Linear(2, 2)
            self.tokenizer = word_tokenizer()
            self.gate = LearningGate()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not student:
                return self.parts.pupil(torch.ones(1, 2)).sum()
            loss: torch.Tensor = self.parts.pupil(input_ids=IDS, labels=IDS).loss
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    setattr(LateModule, hook, lambda self, stage=None: self.build())
    return LateModule()


def make_trainer(package: str, callback: Any) -> Any:
    options = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_model_summary": False, "enable_progress_bar": False}
    return import_module(package).Trainer(**options, callbacks=[callback])


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("hook", ["setup", "configure_model", "prepare_data"])
def test_a_student_that_is_built_in_a_hook(hook: str, student: Any) -> None:
    callback = make_watching_callback(student=student)
    module = late_module("lightning.pytorch", hook, tokenizer_in_hook=True)
    make_trainer("lightning.pytorch", callback).fit(module, make_loader())
    assert callback.monitor.probe_count == module.gate.count == 1


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_the_same_in_pytorch_lightning(hook: str) -> None:
    callback = make_watching_callback()
    make_trainer("pytorch_lightning", callback).fit(late_module("pytorch_lightning", hook), make_loader())
    assert callback.monitor.probe_count == 1


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_validation_alone_finds_it_too(hook: str) -> None:
    callback = make_watching_callback(on_validation=True, student="parts.pupil")
    module = late_module("lightning.pytorch", hook)
    make_trainer("lightning.pytorch", callback).validate(module, DataLoader([1]), verbose=False)
    assert callback.monitor.probe_count == 1


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_hook_that_builds_no_student_is_refused_before_the_first_step(hook: str) -> None:
    trainer = make_trainer("lightning.pytorch", make_callback())
    with pytest.raises(ValueError, match="`student` must be one peft model, but 0 were found in LateModule"):
        trainer.fit(late_module("lightning.pytorch", hook, student=False), make_loader())
    assert trainer.global_step == 0
    trainer = make_trainer("lightning.pytorch", make_callback(student="other"))
    with pytest.raises(ValueError, match="LateModule has no such submodule"):
        trainer.fit(late_module("lightning.pytorch", hook), make_loader())
    assert trainer.global_step == 0


def test_bad_rows_are_refused_although_the_student_is_built_later() -> None:
    rows = [{"prompt": "a " * 60, "answer": "a"}]
    trainer = make_trainer("lightning.pytorch", make_callback(prompts=rows, reward=odd_length_reward))
    with pytest.raises(ValueError, match="more than the model's context of 64"):
        trainer.fit(late_module("lightning.pytorch", "setup"), make_loader())
