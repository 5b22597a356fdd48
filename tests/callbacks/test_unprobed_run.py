"""A run that ends without a probe says so."""

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from odp_callbacks import OnPolicyDistillation, Teacher
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.trainers import add_callback, plain_trainer
from tests.helpers.training import ROWS, make_callback, make_loader, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


class RawOptimizer(OnPolicyDistillation):
    """Steps an optimizer of torch itself, whose steps Lightning does not count."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        batch_losses = self.token_losses(self.sample(batch))
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(batch_losses.losses.sum())
        optimizer.step()
        optimizer.zero_grad()


class Validated(OnPolicyDistillation):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def complaints(run: Any) -> list[str]:
    """What a run warns about probes that it did not have."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "ended without a probe" in str(warning.message)]


def fit(callback: Any, module: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(callback, **{"max_epochs": 1, "max_steps": -1, **changes})
    trainer.fit(module or make_module(), make_loader())
    return trainer


def distillation(kind: type[OnPolicyDistillation]) -> OnPolicyDistillation:
    return kind(tiny("llama").float().train(), word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5)


def test_raw_optimizers_are_named_as_the_reason() -> None:
    (sentence,) = complaints(lambda: fit(make_callback(), distillation(RawOptimizer), max_epochs=3))
    assert "the trainer counted no optimizer step in 6 batches" in sentence
    assert "`self.optimizers(use_pl_optimizer=False)`" in sentence


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 2),
        ({"max_steps": 1}, 1),
        ({"overfit_batches": 1, "max_epochs": 3}, 3),
        ({"limit_train_batches": 1, "max_epochs": 4}, 4),
        ({"accumulate_grad_batches": 2}, 1),
        ({"fast_dev_run": True}, 1),
        ({"barebones": True}, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
def test_a_run_that_is_too_short_says_how_long_it_was(changes: dict[str, Any], steps: int) -> None:
    if "barebones" in changes:
        changes = {**changes, "logger": None, "enable_checkpointing": None, "enable_model_summary": None}
        changes |= {"enable_progress_bar": None, "log_every_n_steps": None}
    (sentence,) = complaints(lambda: fit(make_callback(every_n_steps=100), **changes))
    assert f"it took {steps} optimizer steps, and `every_n_steps` is 100; lower it." in sentence


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"every_n_steps": 1}, {}),
        ({"at_start": True}, {}),
        ({"on_validation": True}, {}),
        ({"update_every_n_steps": 1}, {}),
        ({"every_n_steps": 2, "max_overhead": 0.01}, {}),
        ({}, {"limit_train_batches": 0}),
        ({"every_n_steps": 1}, {"fast_dev_run": True}),
        ({"every_n_steps": 1}, {"accumulate_grad_batches": 5}),  # the last window is not full
        ({"every_n_steps": 3}, {"overfit_batches": 1, "max_epochs": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
def test_a_run_with_a_probe_or_without_batches_says_nothing(options: dict[str, Any], changes: dict[str, Any]) -> None:
    def run() -> None:
        trainer = make_trainer(
            make_callback(**{"every_n_steps": 100, **options}), **{"max_epochs": 1, "max_steps": -1, **changes}
        )
        trainer.fit(distillation(Validated), make_loader(), DataLoader(ROWS, collate_fn=list))

    assert not complaints(run)


def test_a_resumed_run_that_stops_before_the_next_probe_says_so(tmp_path: Any) -> None:
    trainer = fit(make_callback(every_n_steps=4), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    resumed = make_callback(every_n_steps=4)

    def run() -> None:
        make_trainer(resumed, max_epochs=3, max_steps=-1).fit(
            make_module(), make_loader(), ckpt_path=tmp_path / "four.ckpt", weights_only=False
        )

    (sentence,) = complaints(run)
    assert "it took 2 optimizer steps" in sentence


def test_transformers_says_it_too(tmp_path: Any) -> None:
    trainer = plain_trainer(tmp_path, max_steps=3)
    add_callback(trainer, every_n_steps=100)
    (sentence,) = complaints(trainer.train)
    assert "it took 3 optimizer steps, and `every_n_steps` is 100" in sentence


def test_two_optimizers_with_raw_steps_in_one_of_them() -> None:
    """Steps of one optimizer are counted, so probes are due."""

    class Half(RawOptimizer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            counted, raw = self.optimizers()[0], self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
            batch_losses = self.token_losses(self.sample(batch))
            self.manual_backward(batch_losses.losses.sum())
            for optimizer in (counted, raw):
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return [torch.optim.SGD(parameters[::2], lr=1e-2), torch.optim.SGD(parameters[1::2], lr=1e-2)]

    callback = make_callback(every_n_steps=2)
    assert not complaints(lambda: fit(callback, distillation(Half)))
    assert callback.monitor.probe_count == 1
