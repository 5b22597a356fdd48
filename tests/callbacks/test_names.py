"""Several callbacks in one trainer."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from odp_callbacks import EMATeacher, Teacher
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.callbacks.names import check_name
from odp_callbacks.storage import load
from tests.helpers.tensorboard import read_events, read_runs
from tests.helpers.trainers import add_callback, plain_trainer
from tests.helpers.training import (
    LearningGate,
    make_callback,
    make_loader,
    make_module,
    make_trainer,
    odd_length_reward,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


def two_callbacks(**changes: Any) -> list[Any]:
    """One measures the answer as a hint; the other has another reward, and a gate that logs."""
    options = {"teachers": {"answer": Teacher("{answer} {prompt}")}, **changes}
    return [
        make_callback(name="first", **options),
        make_callback(name="second", reward=odd_length_reward, seed=3, **options),
    ]


def test_each_logs_under_its_own_names(tmp_path: Path) -> None:
    callbacks = two_callbacks(records=tmp_path / "records", log=["predicted_gain"])
    loggers = [TensorBoardLogger(str(tmp_path / "tb")), CSVLogger(tmp_path / "csv")]
    make_trainer(callbacks=callbacks, max_steps=2, logger=loggers).fit(make_module(), make_loader())
    tags, runs = read_events(loggers[0].log_dir).Tags(), read_runs(loggers[0].log_dir)
    for callback in callbacks:
        root = f"odp-{callback.monitor.schedule.name}"
        expected = scalars(callback.last_report)["odp/predicted_gain/answer/all"]
        run = f"{root}/answer"
        np.testing.assert_allclose(runs[run][f"{root}/predicted_gain"][-1][1], expected, rtol=1e-6)
        assert any(tag.startswith(f"{root} pictures/rollout/") for tag in tags["images"])
        of_teacher = read_events(Path(loggers[0].log_dir) / run).Tags()
        assert any(tag.startswith(f"{root} histograms/alignment/") for tag in of_teacher["histograms"])
        assert f"{root}/table/text_summary" in tags["tensors"]
        folder = tmp_path / "records" / callback.monitor.schedule.name
        assert load(next(folder.iterdir())).rollouts == callback.last_report.rollouts
    for kind in ("scalars", "images", "histograms"):
        assert not any(tag.startswith(("odp/", "odp ")) for tag in tags[kind])
    header = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    assert {"odp-first/update_gain/answer/all", "odp-second/update_gain/answer/all"} <= set(header)


def test_what_a_gate_logs_has_the_callback_s_name_too(tmp_path: Path) -> None:
    class LoggingGate(LearningGate):
        def scalars(self) -> dict[str, float]:
            return {"threshold": 0.5, "odp/gate/answer/all": 1.0}

    callbacks = [make_callback(name=name, gate=LoggingGate()) for name in ("first", "second")]
    logger = CSVLogger(tmp_path)
    make_trainer(callbacks=callbacks, max_steps=2, logger=logger).fit(make_module(), make_loader())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("first", "second"):
        assert {f"odp-{name}/threshold", f"odp-{name}/gate/answer/all"} <= set(header)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
def test_both_states_are_in_one_checkpoint(tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> tuple[list[Any], Trainer]:
        callbacks = [
            make_callback(name="every", every_n_steps=1, teachers={"ema": EMATeacher(0.5)}),
            make_callback(name="some", every_n_steps=2, teachers={"ema": EMATeacher(0.5)}),
        ]
        trainer = make_trainer(callbacks=callbacks, max_steps=steps, max_epochs=-1)
        trainer.fit(make_module(), make_loader(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return callbacks, trainer

    stopped, trainer = fit(4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(6, tmp_path / "half.ckpt")
    assert [callback.monitor.probe_count for callback in stopped] == [4, 2]
    assert [callback.monitor.probe_count for callback in resumed] == [6, 3]


@pytest.mark.parametrize("name", [None, "same"])
@pytest.mark.parametrize("changes", [{}, {"every_n_steps": 3, "teachers": {"other": Teacher("a {prompt}")}}])
def test_equal_names_are_refused_before_training(name: str | None, changes: dict[str, Any]) -> None:
    trainer = make_trainer(callbacks=[make_callback(name=name), make_callback(name=name, **changes)])
    with pytest.raises(ValueError, match='give each a `name` of its own, such as `name="hard"`'):
        trainer.fit(make_module(), make_loader())
    assert trainer.global_step == 0


def test_a_copy_of_a_used_callback_needs_another_name() -> None:
    callback = make_callback()
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    with pytest.raises(ValueError, match="give each a `name`"):
        make_trainer(callbacks=[deepcopy(callback), make_callback()]).fit(make_module(), make_loader())


def test_one_callback_with_and_one_without_a_name() -> None:
    callbacks = [make_callback(), make_callback(name="hard")]
    trainer = make_trainer(callbacks=callbacks, max_steps=2)
    trainer.fit(make_module(), make_loader())
    assert [callback.monitor.probe_count for callback in callbacks] == [1, 1]
    assert len(trainer._checkpoint_connector.dump_checkpoint()["callbacks"]) >= 2


def test_the_state_s_key_outlives_changes_of_teachers_and_schedule() -> None:
    keys = set()
    for changes in ({}, {"every_n_steps": 3, "seed": 4, "teachers": {"other": Teacher("a {prompt}")}}):
        callback = make_callback(**changes)
        callback.setup(make_trainer(), make_module(), "fit")
        keys.add(callback.state_key)
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "step-1", "a b", 3, "-a"])
def test_names_that_cannot_be_used_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="`name` must be None, or letters"):
        make_callback(name=name)


@pytest.mark.parametrize("name", [None, "a", "hard_2", "größer", "7B", "v1.5-x"])
def test_names_that_can_be_used(name: str | None) -> None:
    check_name(name)


@pytest.mark.slow
def test_two_callbacks_in_a_transformers_trainer(tmp_path: Path) -> None:
    def trainer_with_two(folder: Path, **changes: Any) -> tuple[Any, list[Any]]:
        trainer = plain_trainer(folder, save_strategy="steps", save_steps=2, report_to=["tensorboard"], **changes)
        names = (("every", 1), ("some", 2))
        return trainer, [add_callback(trainer, name=name, every_n_steps=steps) for name, steps in names]

    trainer, _ = trainer_with_two(tmp_path / "whole")
    trainer.train()
    resumed_trainer, resumed = trainer_with_two(tmp_path / "resumed")
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [callback.monitor.probe_count for callback in resumed] == [4, 2]
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("odp")}
    assert {name.split("/")[0] for name in names} == {"odp-every", "odp-some"}
    (folder,) = (tmp_path / "whole").rglob("runs/*")
    assert "odp-some/predicted_gain" in read_runs(folder)["odp-some/answer"]
    images = read_events(folder).Tags()["images"]
    assert {tag.split("/")[0] for tag in images} == {"odp-every pictures", "odp-some pictures"}


def test_equal_names_in_a_transformers_trainer_are_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    add_callback(trainer)
    with pytest.raises(ValueError, match="give each a `name` of its own"):
        add_callback(trainer, every_n_steps=1)
