"""Options of Lightning's trainer that change what a callback meets, and copies of a callback."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from odp_callbacks import EMATeacher
from odp_callbacks.visualization.loggers import ReportLogger
from tests.helpers.training import ROWS, TEACHERS, make_callback, make_loader, make_module, make_trainer

BAREBONES: dict[str, Any] = {
    "barebones": True,
    "logger": None,
    "enable_checkpointing": None,
    "enable_model_summary": None,
    "enable_progress_bar": None,
    "log_every_n_steps": None,
}


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger, "both", None])
def test_fast_dev_run_with_any_logger(kind: Any, tmp_path: Path) -> None:
    loggers: Any = False
    if kind is not None:
        loggers = [each(str(tmp_path)) for each in (TensorBoardLogger, CSVLogger) if kind in (each, "both")]
    callback = make_callback(every_n_steps=1, at_start=True)
    make_trainer(callback, fast_dev_run=True, logger=loggers).fit(make_module(), make_loader())
    assert callback.monitor.probe_count == 2
    assert not list(tmp_path.iterdir())


def test_a_stand_in_for_a_logger_receives_nothing() -> None:
    callback = make_callback()
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert callback.last_report is not None
    ReportLogger().log(DummyLogger(), callback.last_report, 2)


@pytest.mark.parametrize(
    ("changes", "probes"),
    [
        (BAREBONES, 2),
        ({"limit_train_batches": 0}, 0),
        ({"limit_train_batches": 1, "max_steps": 3, "max_epochs": -1}, 3),
        ({"max_steps": -1, "max_epochs": 1}, 2),
        ({"overfit_batches": 1, "max_steps": 3, "max_epochs": -1}, 3),
        ({"accumulate_grad_batches": 5, "max_steps": 2, "max_epochs": 2}, 2),
        ({"limit_train_batches": 0.5}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but `Trainer.barebones=True:UserWarning")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
def test_every_optimizer_step_is_seen(changes: dict[str, Any], probes: int) -> None:
    callback = make_callback(every_n_steps=1)
    make_trainer(callback, **{"max_epochs": 1, "max_steps": -1, **changes}).fit(make_module(), make_loader())
    assert callback.monitor.probe_count == probes


@pytest.mark.parametrize("copy", [deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_callback_can_be_copied_before_and_after_a_fit(copy: Any) -> None:
    teachers = {**TEACHERS, "ema": EMATeacher(0.5)}
    unused = copy(make_callback(teachers=teachers))
    used = make_callback(teachers=teachers, update_every_n_steps=2, update=True)
    make_trainer(used, max_steps=2).fit(make_module(), make_loader())
    copied = copy(used)
    assert copied.last_report is not None
    assert used.last_report is not None
    assert copied.last_report.rollouts == used.last_report.rollouts
    for callback in (unused, copied, used):
        probe_count = callback.monitor.probe_count
        make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
        assert callback.monitor.probe_count == probe_count + 1


def test_a_copy_in_the_middle_of_a_fit_does_not_disturb_it() -> None:
    copies = []

    class Copied(type(make_callback())):  # type: ignore[misc]
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            copies.append(pickle.loads(pickle.dumps(self.monitor)))

    options = {"max_overhead": None, "questions_per_probe": 2, "max_new_tokens": 4, "strict": True, "every_n_steps": 1}
    callback = Copied({"ema": EMATeacher(0.5)}, ROWS, make_callback().monitor.reward, **options)
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert [monitor.probe_count for monitor in copies] == [1, 2]
    assert callback.monitor.probe_count == 2
