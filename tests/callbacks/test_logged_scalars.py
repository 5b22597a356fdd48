"""What each kind of logger gets of a training: few scalars, no NaN, and one table from the first row on."""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from transformers import TrainerCallback

from odp_callbacks import BaseTeacher, Teacher
from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.visualization.loggers import ReportLogger
from tests.helpers.tensorboard import read_events, read_runs
from tests.helpers.trainers import add_callback, plain_trainer
from tests.helpers.training import make_callback, make_loader, make_module, make_trainer, odd_length_reward

THREE = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher(), "wrong": Teacher("d c {prompt}")}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and is tested by itself."""
    monkeypatch.setattr("odp_callbacks.visualization.tensorboard.pictures", lambda analysis: iter(()))


def of_update(**changes: Any) -> Any:
    """A callback that measures updates alone, of three teachers."""
    options: dict[str, Any] = {"teachers": dict(THREE), "budget": 0, "reward": odd_length_reward, "every_n_steps": 1}
    return make_callback(**(options | changes))


class Tracker(DummyLogger):
    """Stands for Weights & Biases and the like, which are told each scalar by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    @property
    def experiment(self) -> Any:
        return object()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append({name: value for name, value in metrics.items() if name.startswith("odp")})


class SavesAtOnce(Callback):
    """Writes the table at every step, so that a new column would rewrite it."""

    def __init__(self, logger: CSVLogger) -> None:
        self.logger, self.headers = logger, list[list[str]]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.logger.save()
        path = Path(self.logger.log_dir) / "metrics.csv"
        names = path.read_text().splitlines()[0].split(",")
        self.headers.append([name for name in names if name.startswith("odp")])


def test_loggers_of_a_training_with_three_teachers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, tensorboard, table = Tracker(), TensorBoardLogger(str(tmp_path / "tb")), CSVLogger(tmp_path / "csv")
    saving = SavesAtOnce(table)
    trainer = make_trainer(callbacks=[of_update(), saving], logger=[tracker, tensorboard, table], max_steps=3)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(reward=odd_length_reward), make_loader())
    names = {name for row in tracker.logged for name in row}
    assert {"odp/update_gain/answer/all", "odp/probe/success_rate"} <= names
    assert len(names) <= 40
    assert all(math.isfinite(value) for row in tracker.logged for value in row.values())
    assert saving.headers[0] == saving.headers[-1]
    assert len(saving.headers[0]) == 40
    table.save()
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert not any(value == "nan" for row in rows for value in row.values())
    assert not any(value for name, value in rows[0].items() if name.startswith("odp")), "a row that names the columns"
    runs = read_runs(tensorboard.log_dir)
    assert {f"odp/{teacher}" for teacher in THREE} <= set(runs)
    assert [step for step, _ in runs["odp/base"]["odp/update_gain"]][-1] == 3
    said = [record.getMessage() for record in caplog.records if "pinned on top" in record.getMessage()]
    assert len(said) == 1
    assert "http://localhost:6006/?pinnedCards=" in said[0]


def test_log_adds_figures_and_what_is_monitored_is_logged(tmp_path: Path) -> None:
    tracker = Tracker()
    checkpoints = ModelCheckpoint(tmp_path, monitor="odp/update_contribution/answer/all", mode="max")
    callback = of_update(log=["probe/seconds", "alinment"], name="hard", strict=False)
    checkpoints.monitor = "odp-hard/update_contribution/answer/all"
    trainer = make_trainer(callbacks=[callback, checkpoints], logger=[tracker], enable_checkpointing=True, max_steps=2)
    with pytest.warns(UserWarning, match="`log` names 'alinment', but the probes have no figure"):
        trainer.fit(make_module(reward=odd_length_reward), make_loader())
    names = {name for row in tracker.logged for name in row}
    assert {"odp-hard/probe/seconds_rollouts", "odp-hard/update_contribution/answer/all"} <= names
    assert "odp-hard/update_contribution/base/all" not in names


def test_trackers_of_transformers_get_the_same(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, report_to=["tensorboard"], max_steps=2)
    seen: list[dict[str, float]] = []

    class Watching(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({name: value for name, value in logs.items() if name.startswith("odp")})

    trainer.add_callback(Watching())
    add_callback(trainer, teachers=dict(THREE), budget=0, every_n_steps=1, log="main")
    trainer.train()
    names = {name for row in seen for name in row}
    assert "odp/probe/success_rate" in names
    assert len(names) <= 40
    assert all(math.isfinite(value) for row in seen for value in row.values())
    (folder,) = tmp_path.rglob("runs/*")
    runs = read_runs(folder)
    assert [step for step, _ in runs["."]["odp/probe/success_rate"]] == [1, 2]
    assert set(runs) <= {".", *(f"odp/{teacher}" for teacher in THREE)}
    assert "train/loss" in runs["."], "the trainer's own scalars stay as they are"


def test_the_confidence_level_reaches_scalars_texts_and_report(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    callback = of_update(confidence=0.8, records=tmp_path / "records", log=["probe"])
    make_trainer(callback, logger=logger, max_steps=1).fit(make_module(reward=odd_length_reward), make_loader())
    report = callback.last_report
    assert report is not None
    assert report.confidence == 0.8
    asked, given = report.to_pandas(), report.to_pandas(confidence=0.8)
    assert asked.equals(given)
    text = read_events(logger.log_dir).Tensors("odp/table/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "80% intervals" in text
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "80%" in page
    assert "95%" not in page
    ends = [read_runs(logger.log_dir)["."][f"odp details/probe/success_rate_{end}"][0][1] for end in ("low", "high")]
    expected = success_rate(report, 0.8)
    assert ends == pytest.approx([expected.low, expected.high])


def test_a_process_that_does_not_log_opens_no_runs(tmp_path: Path) -> None:
    """In every process but the first, Lightning puts a stand-in in the place of TensorBoard's writer."""
    logger = DummyLogger()
    ReportLogger().log_scalars(logger, {"odp/update_gain/base/all": 0.1}, ["base"], 1)
    ReportLogger().announce(logger, ["odp/update_gain/base/all"], 0)
    assert not list(tmp_path.iterdir())
