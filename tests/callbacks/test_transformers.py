"""The callback as a guest of the trainers of transformers and TRL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from odp_callbacks import GradientAlignmentTrainerCallback
from odp_callbacks.engine import EMATeacher
from tests.helpers.models import tiny_base, word_tokenizer
from tests.helpers.trainers import (
    COMMON,
    add_callback,
    distillation_trainer,
    gkd_trainer,
    plain_trainer,
    sft_trainer,
    trainer_end_state,
    trainer_student,
)
from tests.helpers.training import ROWS, TEACHERS, Gate, odd

# Of transformers itself, in every run of its trainer.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


TRAINERS = {
    "Trainer": plain_trainer,
    "SFTTrainer": sft_trainer,
    "DistillationTrainer": distillation_trainer,
    "GKDTrainer": gkd_trainer,
}


@pytest.fixture(params=TRAINERS.values(), ids=TRAINERS)
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def of_the_trainer(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer itself logged, less what a clock says."""
    clocks = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    own = [{k: v for k, v in row.items() if k not in clocks} for row in trainer.state.log_history]
    return [row for row in own if not any(name.startswith("odp/") for name in row)]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"logging_steps": 3}])
def test_training_is_what_it_would_have_been(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    ends, logs = [], []
    for watched in (False, True):
        trainer = make(tmp_path, dropout=0.2, **changes)
        callback = add_callback(trainer, at_start=True) if watched else None
        trainer.train()
        ends.append(trainer_end_state(trainer))
        logs.append(of_the_trainer(trainer))
        if callback is not None:
            assert callback.last_report is not None
            assert callback.monitor.probes == 3
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    assert logs[0] == logs[1]


def test_figures_reach_log_history_and_tensorboard(make: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, report_to=["tensorboard"])
    add_callback(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "odp/alignment/answer/all" in row]
    assert [row["step"] for row in rows] == [2, 4]
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert "train/odp/alignment/answer/all" in tags["scalars"]
    assert [e.step for e in events.Scalars("train/odp/probe/time_share")] == [2, 4]
    assert any(tag.startswith("odp/alignment_histogram/") for tag in tags["histograms"])
    assert any(tag.startswith("odp/rollout/") for tag in tags["images"])


def test_adam_s_geometry(make: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    add_callback(trainer, optimizer_geometry=True)
    trainer.train()
    assert any("odp/adam/alignment/answer/all" in row for row in trainer.state.log_history)
    other = make(tmp_path, optim="sgd")
    add_callback(other, optimizer_geometry=True)
    with pytest.raises(ValueError, match="trained by SGD; leave `optimizer_geometry` off"):
        other.train()


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_screen_gets_the_headlines(disable_tqdm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = plain_trainer(tmp_path, disable_tqdm=disable_tqdm)
    add_callback(trainer)
    trainer.train()
    shown = capsys.readouterr().out
    assert "odp/predicted_gain/answer/incorrect" in shown
    assert "odp/reverse_kl" not in shown
    assert "'loss'" in shown


def test_a_resumed_run_goes_on_where_it_was(make: Any, tmp_path: Path) -> None:
    def ingredients(folder: Path) -> tuple[Any, Any, Gate]:
        trainer, gate = make(folder, save_strategy="steps", save_steps=2, max_steps=4), Gate()
        teachers = {**TEACHERS, "average": EMATeacher(decay=0.5)}
        return trainer, add_callback(trainer, gate=gate, teachers=teachers), gate

    trainer, whole, _ = ingredients(tmp_path / "whole")
    trainer.train()
    again, resumed, gate = ingredients(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert gate.count == 2
    assert resumed.monitor.probes == whole.monitor.probes == 2
    assert resumed.monitor.order == whole.monitor.order
    assert torch.equal(resumed.monitor.stream.get_state(), whole.monitor.stream.get_state())
    assert whole.last_report is not None
    assert resumed.last_report is not None
    assert [r.question for r in resumed.last_report.rollouts] == [r.question for r in whole.last_report.rollouts]
    if make is distillation_trainer:
        return  # TRL's own resumed run goes another way, with or without a callback: 1.16 samples other responses
    for a, b in zip(whole.last_report.nodes, resumed.last_report.nodes, strict=True):
        np.testing.assert_array_equal(a.total, b.total)
        np.testing.assert_array_equal(a.gram, b.gram)


def test_the_train_dataset_s_rows_are_the_questions_where_none_are_given(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)
    callback = add_callback(trainer, prompts=None)
    trainer.train()
    assert callback.last_report is not None
    with pytest.raises(ValueError, match="no column 'prompt'"):
        add_callback(gkd_trainer(tmp_path), prompts=None)


def test_a_failing_reward_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)

    def broken(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if trainer.state.global_step:
            raise RuntimeError("no verifier")
        return odd(prompts, completions)

    add_callback(trainer, reward=broken, strict=False)
    with pytest.warns(UserWarning, match="no verifier") as said:
        trainer.train()
    assert len([w for w in said if "no verifier" in str(w.message)]) == 1
    assert trainer.state.global_step == 4
    assert np.isnan(next(r["odp/alignment/answer/all"] for r in trainer.state.log_history if "odp/probe/left_out" in r))


def test_on_evaluation(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    add_callback(trainer, on_validation=True, every_n_steps=100)
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "odp/probe/left_out" in r] == [3, 4]  # and at the end


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"trainer": None}, TypeError, "`trainer` must be a transformers.Trainer"),
        ({"free_every_n_steps": 2}, ValueError, "`free_every_n_steps` needs the training's own rollouts"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps`"),
        ({"teachers": {"other": 3}}, (TypeError, ValueError), "teacher"),
        ({"taught": ("other",)}, ValueError, "name them alike"),
    ],
)
def test_bad_input_is_refused_before_training(change: dict[str, Any], kind: Any, message: str, tmp_path: Path) -> None:
    trainer = change.pop("trainer", plain_trainer(tmp_path))
    if "taught" in change:
        trainer.gate, trainer.gate_teachers = Gate(), change.pop("taught")
    with pytest.raises(kind, match=message):
        add_callback(trainer, **change) if trainer is not None else GradientAlignmentTrainerCallback(
            None,  # type: ignore[arg-type]
            TEACHERS,
            ROWS,
            odd,
        )


def test_a_student_without_lora_and_a_trainer_without_tokenizer_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="LoRA"):
        add_callback(Trainer(model=tiny_base(), args=args, processing_class=word_tokenizer()))
    with pytest.raises(ValueError, match="no `processing_class`"):
        add_callback(Trainer(model=trainer_student(), args=args))
