"""The callback in the trainers of transformers and TRL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from odp_callbacks import GradientAlignmentTrainerCallback
from odp_callbacks.engine import EMATeacher
from odp_callbacks.functional import lora_parameters
from odp_callbacks.storage import load
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.tensorboard import read_events, read_runs
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
from tests.helpers.training import ROWS, TEACHERS, LearningGate, odd_length_reward

# Issued by transformers itself in every run of its trainer.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


TRAINERS = {
    "Trainer": plain_trainer,
    "SFTTrainer": sft_trainer,
    "DistillationTrainer": distillation_trainer,
    "GKDTrainer": gkd_trainer,
}


@pytest.fixture(params=TRAINERS.values(), ids=TRAINERS)
def make_trainer(request: pytest.FixtureRequest) -> Any:
    return request.param


def own_logs(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer itself logged, without measured times."""
    times = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    entries = [
        {name: value for name, value in entry.items() if name not in times} for entry in trainer.state.log_history
    ]
    return [entry for entry in entries if not any(name.startswith("odp/") for name in entry)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"logging_steps": 3}, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_and_without_the_callback(
    make_trainer: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    end_states, logs = [], []
    for watched in (False, True):
        trainer = make_trainer(tmp_path, dropout=0.2, **changes)
        callback = add_callback(trainer, at_start=True) if watched else None
        trainer.train()
        end_states.append(trainer_end_state(trainer))
        logs.append(own_logs(trainer))
        if callback is not None:
            assert callback.last_report is not None
            assert callback.monitor.probe_count == 3
    assert end_states[0].keys() == end_states[1].keys()
    for name, value in end_states[0].items():
        assert torch.equal(value, end_states[1][name]), name
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_log_history_and_tensorboard_get_the_figures(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, report_to=["tensorboard"])
    add_callback(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "odp/undefined_share/answer/all" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    (folder,) = (path for path in tmp_path.rglob("runs/*"))
    runs = read_runs(folder)
    assert set(runs) == {".", *(f"odp/{run}" for run in ("answer", "base", "answer - base"))}
    values = [value for scalars in runs.values() for events in scalars.values() for _, value in events]
    assert np.isfinite(values).all()
    assert [step for step, _ in runs["."]["odp/probe/success_rate"]] == [2, 4]
    assert {step for step, _ in runs["odp/base"]["odp/update_gain"]} <= {2, 4}
    assert not any(tag.startswith("train/odp") for tag in runs["."])
    assert any(tag.startswith("odp histograms/") for tag in read_events(folder / "odp/answer").Tags()["histograms"])
    assert any(tag.startswith("odp pictures/rollout/") for tag in read_events(folder).Tags()["images"])


@pytest.mark.slow
def test_adam_s_geometry(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    add_callback(trainer, optimizer_geometry=True)
    trainer.train()
    assert any("odp/adam/predicted_gain/answer/all" in entry for entry in trainer.state.log_history)
    sgd_trainer = make_trainer(tmp_path, optim="sgd")
    add_callback(sgd_trainer, optimizer_geometry=True)
    with pytest.raises(ValueError, match="trained by SGD; leave `optimizer_geometry` off"):
        sgd_trainer.train()


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_only_the_headlines_are_printed(disable_tqdm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = plain_trainer(tmp_path, disable_tqdm=disable_tqdm)
    add_callback(trainer)
    trainer.train()
    output = capsys.readouterr().out
    assert "odp/update_gain/answer/incorrect" in output
    assert "odp/predicted_gain" not in output
    assert "odp/reverse_kl" not in output
    assert "'loss'" in output


@pytest.mark.slow
def test_a_resumed_run_continues_where_it_stopped(make_trainer: Any, tmp_path: Path) -> None:
    def watched_trainer(folder: Path) -> tuple[Any, Any, LearningGate]:
        trainer, gate = make_trainer(folder, save_strategy="steps", save_steps=2, max_steps=4), LearningGate()
        teachers = {**TEACHERS, "average": EMATeacher(decay=0.5)}
        return trainer, add_callback(trainer, gate=gate, teachers=teachers), gate

    trainer, uninterrupted, _ = watched_trainer(tmp_path / "whole")
    trainer.train()
    resumed_trainer, resumed, gate = watched_trainer(tmp_path / "resumed")
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert gate.count == 2
    assert resumed.monitor.probe_count == uninterrupted.monitor.probe_count == 2
    assert resumed.monitor.questions.state_dict() == uninterrupted.monitor.questions.state_dict()
    assert torch.equal(resumed.monitor.random_stream.get_state(), uninterrupted.monitor.random_stream.get_state())
    assert uninterrupted.last_report is not None
    assert resumed.last_report is not None
    assert [rollout.question for rollout in resumed.last_report.rollouts] == [
        rollout.question for rollout in uninterrupted.last_report.rollouts
    ]
    if make_trainer is distillation_trainer:
        return  # TRL 1.16 itself samples other responses in a resumed run, with or without a callback
    for expected, node in zip(uninterrupted.last_report.nodes, resumed.last_report.nodes, strict=True):
        np.testing.assert_array_equal(expected.total, node.total)
        np.testing.assert_array_equal(expected.gram, node.gram)


def test_the_train_dataset_s_rows_are_the_questions_if_none_are_given(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)
    callback = add_callback(trainer, prompts=None)
    trainer.train()
    assert callback.last_report is not None
    with pytest.raises(ValueError, match="no column 'prompt'"):
        add_callback(gkd_trainer(tmp_path), prompts=None)


def test_a_failing_reward_causes_one_warning_and_training_continues(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)

    def failing_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if trainer.state.global_step:
            raise RuntimeError("no verifier")
        return odd_length_reward(prompts, completions)

    add_callback(trainer, reward=failing_reward, strict=False)
    with pytest.warns(UserWarning, match="no verifier") as caught:
        trainer.train()
    assert len([warning for warning in caught if "no verifier" in str(warning.message)]) == 1
    assert trainer.state.global_step == 4
    first_probe = next(entry for entry in trainer.state.log_history if "odp/probe/left_out" in entry)
    assert "odp/update_gain/answer/all" not in first_probe, "what is undefined is not logged"


def test_probes_after_an_evaluation(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    add_callback(trainer, on_validation=True, every_n_steps=100)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "odp/probe/left_out" in entry] == [3, 4], (
        "after 3 steps and at the end"
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"trainer": None}, TypeError, "`trainer` must be a transformers.Trainer"),
        ({"update_every_n_steps": 2}, ValueError, "`update_every_n_steps` needs the training's own rollouts"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps`"),
        ({"teachers": {"other": 3}}, (TypeError, ValueError), "teacher"),
        ({"distilled_teachers": ("other",)}, ValueError, "same names in training and in the callback"),
    ],
)
def test_bad_input_is_refused_before_training(change: dict[str, Any], kind: Any, message: str, tmp_path: Path) -> None:
    trainer = change.pop("trainer", plain_trainer(tmp_path))
    if "distilled_teachers" in change:
        trainer.gate, trainer.gate_teachers = LearningGate(), change.pop("distilled_teachers")
    with pytest.raises(kind, match=message):
        add_callback(trainer, **change) if trainer is not None else GradientAlignmentTrainerCallback(
            None,  # type: ignore[arg-type]
            TEACHERS,
            ROWS,
            odd_length_reward,
        )


def test_a_student_without_lora_and_a_trainer_without_tokenizer_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="LoRA"):
        add_callback(Trainer(model=tiny_base(), args=args, processing_class=word_tokenizer()))
    with pytest.raises(ValueError, match="no `processing_class`"):
        add_callback(Trainer(model=trainer_student(), args=args))


def test_every_evaluation_outside_a_training_is_probed(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    callback = add_callback(trainer, on_validation=True, max_overhead=0.1, every_n_steps=1)
    reports = []
    for count in (1, 2):
        trainer.evaluate()
        assert callback.monitor.probe_count == count
        reports.append(callback.last_report)
    assert reports[0] is not reports[1]
    assert callback.monitor.time_budget.probe_seconds == 0
    trainer.train()
    assert callback.monitor.probe_count >= 3, "the first probe of a training always runs"
    assert 0 < callback.monitor.time_budget.time_share <= 1
    count = callback.monitor.probe_count
    trainer.evaluate()
    trainer.evaluate()
    assert callback.monitor.probe_count == count + 2


def test_another_student_in_a_second_training_has_an_average_of_its_own(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    callback = add_callback(trainer, teachers={"ema": EMATeacher(decay=0.5)}, every_n_steps=1)
    trainer.train()
    trainer.model = trainer.model_wrapped = tiny("llama", seed=3).float().train()
    trainer.optimizer = trainer.lr_scheduler = None
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(trainer.model).items()}
    trainer.args.max_steps = 1
    trainer.train()
    assert callback.monitor.probe is not None
    assert callback.monitor.probe.student is trainer.model
    for name, parameter in lora_parameters(trainer.model).items():
        average = callback.teachers["ema"].average[name]
        torch.testing.assert_close(average, (before[name] + parameter.detach()) / 2)


def test_the_average_of_a_second_training_moves_again(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    callback = add_callback(trainer, teachers={"ema": EMATeacher(decay=0.5)}, every_n_steps=1)
    for _ in range(2):
        trainer.train()
        assert callback.teachers["ema"].step == 4
    average, student = callback.teachers["ema"].average, lora_parameters(trainer.model)
    distance = max(float((average[name] - parameter.detach()).abs().max()) for name, parameter in student.items())
    assert 0 < distance < 0.1


class UnsavableGate(LearningGate):
    """Has a state that no file can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "function": lambda: None}


def test_a_gate_whose_state_cannot_be_saved_costs_neither_the_training_nor_the_other_states(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, save_strategy="steps", save_steps=2)
    callback = add_callback(trainer, gate=UnsavableGate(), strict=False)
    with pytest.warns(UserWarning, match="without the state of `gate`"):
        trainer.train()
    assert trainer.state.global_step == 4
    resumed_trainer = plain_trainer(tmp_path, max_steps=4)
    resumed = add_callback(resumed_trainer, gate=LearningGate())
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.monitor.probe_count == callback.monitor.probe_count == 2


def test_layers_that_are_frozen_during_the_training_are_measured_no_more(tmp_path: Path) -> None:
    class Freezing(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                if state.global_step == 2 and "lora_" in name and "layers.1" in name:
                    parameter.requires_grad_(False)

    trainer = plain_trainer(tmp_path)
    callback = add_callback(trainer, teachers={"ema": EMATeacher(decay=0.5)}, every_n_steps=1, records=tmp_path / "r")
    trainer.add_callback(Freezing())
    trainer.train()
    module_counts = [len(load(folder).modules) for folder in sorted((tmp_path / "r").iterdir())]
    assert module_counts == [6, 6, 3, 3]
    assert callback.monitor.probe_count == 4


def test_a_trainer_that_flattens_parameters_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="shards the student by FSDP 1 or XLA"):
        add_callback(trainer)
