"""Several runs with one callback, stages without probes, and students that change while they are trained."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from odp_callbacks import AlignmentGate, BaseTeacher, EMATeacher, OnPolicyDistillation
from odp_callbacks.engine import AdapterTeacher
from odp_callbacks.functional import lora_parameters
from odp_callbacks.storage import load
from tests.helpers.models import randomise, tiny, word_tokenizer
from tests.helpers.probes import ALL_GRADIENTS
from tests.helpers.training import (
    ROWS,
    TEACHERS,
    LearningGate,
    contains_answer_reward,
    make_callback,
    make_loader,
    make_trainer,
)

# Issued by Lightning itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning"),
]


class Evaluated(OnPolicyDistillation):
    """A distillation with all stages that Lightning has."""

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return len(batch)


def evaluated_module(seed: int = 0, **changes: Any) -> Evaluated:
    options = {"max_new_tokens": 5, "learning_rate": 1e-2}
    return Evaluated(tiny("llama", seed=seed).float().train(), word_tokenizer(), "base", **(options | changes))


def evaluation_loader() -> DataLoader[Any]:
    return DataLoader(ROWS[:1], collate_fn=list)  # type: ignore[arg-type]


def replace_adapter(student: Any, rank: int) -> None:
    """Delete the adapter of a student, and add another one of the same name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about the active adapter
        student.delete_adapter("default")
    student.add_adapter("default", LoraConfig(r=rank, target_modules=["v_proj"]))
    student.set_adapter("default")
    randomise(student, "default", 0.3, 1).float()


def average_distance(callback: Any) -> float:
    """How far an average of the teacher "ema" is from its student, at most."""
    student = lora_parameters(callback.monitor.probe.student)
    average = callback.teachers["ema"].average
    assert student.keys() <= average.keys()
    return max(float((average[name] - parameter.detach()).abs().max()) for name, parameter in student.items())


# --- validation outside a training


def test_every_checkpoint_that_is_validated_is_probed(tmp_path: Path) -> None:
    checkpoints = []
    for seed in range(3):
        trainer = make_trainer(max_steps=1)
        trainer.fit(evaluated_module(seed), make_loader())
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
        checkpoints.append(tmp_path / f"{seed}.ckpt")
    callback, module = make_callback(on_validation=True, max_overhead=0.1), evaluated_module()
    trainer = make_trainer(callback)
    reports = []
    for checkpoint in checkpoints:
        trainer.validate(module, evaluation_loader(), ckpt_path=checkpoint, verbose=False, weights_only=False)
        reports.append(callback.last_report)
    assert callback.monitor.probe_count == 3
    assert len({id(report) for report in reports}) == 3
    assert len({report.nodes[0].gram.sum() for report in reports}) == 3, "of three students"


def test_a_checkpoint_that_is_validated_gives_its_average_and_nothing_else(tmp_path: Path) -> None:
    averages, probe_counts = [], []
    for seed in range(2):
        trained = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1, at_start=True)
        trainer = make_trainer(trained, max_steps=2)
        trainer.fit(evaluated_module(seed), make_loader())
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
        averages.append(trained.teachers["ema"].average)
    callback, module = make_callback(teachers={"ema": EMATeacher(0.5)}, on_validation=True), evaluated_module()
    trainer = make_trainer(callback)
    for seed in range(2):
        path = tmp_path / f"{seed}.ckpt"
        trainer.validate(module, evaluation_loader(), ckpt_path=path, verbose=False, weights_only=False)
        probe_counts.append(callback.monitor.probe_count)
        for name, average in callback.teachers["ema"].average.items():
            torch.testing.assert_close(average, averages[seed][name])
    assert probe_counts == [1, 2]
    assert callback.monitor.time_budget.probe_seconds == 0
    assert callback.monitor.last_step == -1


def test_another_trainer_and_another_model_are_probed_in_a_validation() -> None:
    callback = make_callback(on_validation=True, max_overhead=0.1)
    first, second = evaluated_module(0), evaluated_module(1)
    for count, module in enumerate((first, first, second), start=1):
        make_trainer(callback).validate(module, evaluation_loader(), verbose=False)
        assert callback.monitor.probe_count == count
        assert callback.monitor.probe is not None
        assert callback.monitor.probe.student is module.student


def test_a_step_of_a_training_is_probed_once_although_it_is_validated() -> None:
    callback = make_callback(on_validation=True, every_n_steps=2)
    trainer = make_trainer(callback, max_steps=4, val_check_interval=1, num_sanity_val_steps=1)
    trainer.fit(evaluated_module(), make_loader(), evaluation_loader())
    assert callback.monitor.probe_count == 4, "after every step, and not in the sanity check"


def test_a_validation_before_a_fit_costs_the_fit_nothing() -> None:
    callback, module = make_callback(on_validation=True, every_n_steps=1, max_overhead=0.5), evaluated_module()
    trainer = make_trainer(callback, max_steps=2)
    trainer.validate(module, evaluation_loader(), verbose=False)
    before = callback.monitor.time_budget
    assert (before.run_seconds, before.probe_seconds, before.costs) == (0.0, 0.0, {})
    trainer.fit(module, make_loader())
    assert callback.monitor.probe_count >= 2, "the first probe of a training always runs"
    assert 0 < callback.monitor.time_budget.time_share <= 1


def test_a_validation_after_a_fit_is_never_left_out() -> None:
    callback, module = make_callback(on_validation=True, every_n_steps=2, max_overhead=0.01), evaluated_module()
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(module, make_loader())
    share = callback.monitor.time_budget.time_share
    for count in (2, 3):
        trainer.validate(module, evaluation_loader(), verbose=False)
        assert callback.monitor.probe_count == count
    assert callback.monitor.time_budget.time_share == share


def test_records_of_several_validations_do_not_replace_each_other(tmp_path: Path) -> None:
    callback = make_callback(on_validation=True, records=tmp_path / "records")
    reports = []
    for seed in range(3):
        make_trainer(callback).validate(evaluated_module(seed), evaluation_loader(), verbose=False)
        reports.append(callback.last_report)
    saved = [load(folder) for folder in sorted((tmp_path / "records").iterdir())]
    assert [report.rollouts for report in saved] == [report.rollouts for report in reports]


# --- one callback in several trainings


@pytest.mark.parametrize("rank", [2, 3])
def test_an_average_belongs_to_the_student_that_is_trained(rank: int) -> None:
    callback = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1)
    make_trainer(callback, max_steps=4).fit(evaluated_module(0), make_loader())
    module = evaluated_module(1)
    if rank != 2:
        replace_adapter(module.student, rank)
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(module.student).items()}
    make_trainer(callback, max_steps=1).fit(module, make_loader())
    average, after = callback.teachers["ema"].average, lora_parameters(module.student)
    assert average.keys() == after.keys()
    for name, parameter in after.items():
        torch.testing.assert_close(average[name], (before[name] + parameter.detach()) / 2)


def test_the_same_student_in_a_second_training_has_a_new_average() -> None:
    callback, module = make_callback(teachers={"ema": EMATeacher(0.9)}, every_n_steps=1), evaluated_module()
    make_trainer(callback, max_steps=4).fit(module, make_loader())
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(module.student).items()}
    make_trainer(callback, max_steps=1).fit(module, make_loader())
    average = callback.teachers["ema"].average
    for name, parameter in lora_parameters(module.student).items():
        torch.testing.assert_close(average[name], 0.9 * before[name] + 0.1 * parameter.detach())


def test_a_training_that_is_continued_keeps_its_average() -> None:
    callback, module = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1), evaluated_module()
    trainer = make_trainer(callback, max_steps=2, max_epochs=-1)
    trainer.fit(module, make_loader())
    average = {name: value.clone() for name, value in callback.teachers["ema"].average.items()}
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(module, make_loader())
    assert callback.teachers["ema"].step == 3
    for name, parameter in lora_parameters(module.student).items():
        expected = (average[name] + parameter.detach()) / 2
        torch.testing.assert_close(callback.teachers["ema"].average[name], expected)


def test_a_second_training_starts_with_a_time_budget_and_a_report_of_its_own() -> None:
    callback = make_callback(every_n_steps=2, at_start=True, max_overhead=0.001)
    for probe_count in (1, 2):
        make_trainer(callback, max_steps=4).fit(evaluated_module(probe_count), make_loader())
        assert callback.monitor.probe_count == probe_count, "the first probe of a training always runs"
        assert callback.monitor.time_budget.skipped_probes == 2
    callback.setup(make_trainer(), evaluated_module(3), "fit")
    assert callback.last_report is None


class Stopping(Callback):
    """Raises after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stop")


@pytest.mark.parametrize("step", [1, 3])
def test_a_training_after_one_that_raised(step: int) -> None:
    callback = make_callback(every_n_steps=2, teachers={"ema": EMATeacher(0.5)})
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callbacks=[callback, Stopping(step)]).fit(evaluated_module(), make_loader())
    probe_count, run_seconds = callback.monitor.probe_count, callback.monitor.time_budget.run_seconds
    callback.monitor.time_budget.update_run_time()
    assert callback.monitor.time_budget.run_seconds == run_seconds, "the clock has stopped"
    make_trainer(callback, max_steps=4).fit(evaluated_module(1), make_loader())
    assert callback.monitor.probe_count == probe_count + 2
    assert callback.teachers["ema"].step == 4


def test_a_gate_of_another_training_does_not_receive_an_old_state(tmp_path: Path) -> None:
    first = make_callback(gate=LearningGate())
    trainer = make_trainer(first, max_steps=2)
    trainer.fit(evaluated_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = make_callback()  # no gate: the checkpoint's gate state has no place
    with pytest.warns(UserWarning, match="the state of a gate, but there is none now; dropped it"):
        make_trainer(callback, max_steps=4, max_epochs=9).fit(
            evaluated_module(), make_loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=False
        )
    module, gate = evaluated_module(), LearningGate()
    module.gate = gate  # type: ignore[assignment]
    callback.setup(make_trainer(), module, "fit")
    assert gate.count == 0


# --- stages without probes


@pytest.mark.parametrize("prepare", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("stage", ["predict", "test", "validate"])
def test_stages_without_probes_check_nothing(stage: str, prepare: str) -> None:
    rewarded = []

    def counting_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        rewarded.append(1)
        return [0.0] * len(completions)

    module = evaluated_module()
    merged = getattr(module.student, prepare)()
    module.student = module.student if merged is None else merged
    callback = make_callback(reward=counting_reward)
    getattr(make_trainer(callback), stage)(module, evaluation_loader())
    assert not rewarded
    assert callback.monitor.probe is None


def test_a_merged_student_is_tested_after_its_training() -> None:
    callback, module = make_callback(on_validation=True), evaluated_module()
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(module, make_loader())
    module.student = module.student.merge_and_unload()
    trainer.test(module, evaluation_loader(), verbose=False)
    assert trainer.predict(module, evaluation_loader()) == [1]


def test_a_validation_that_probes_refuses_a_merged_student() -> None:
    module = evaluated_module()
    module.student.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        make_trainer(make_callback(on_validation=True)).validate(module, evaluation_loader(), verbose=False)


# --- students that change during the training


class Changing(Callback):
    """Changes the student before the second step."""

    def __init__(self, change: Callable[[Any], None], batch: int = 2) -> None:
        self.change, self.batch = change, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            self.change(pl_module)


def set_layer(trained: bool) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for name, parameter in module.student.named_parameters():
            if "lora_" in name and "layers.1" in name:
                parameter.requires_grad_(trained)

    return change


class Finetuning(BaseFinetuning):
    """Freezes the second layer's adapters at first, and trains them from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        set_layer(False)(pl_module)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            adapters = [p for n, p in pl_module.student.named_parameters() if "lora_" in n and "layers.1" in n]
            for parameter in adapters:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": adapters})


CHANGES: dict[str, Any] = {
    "frozen": lambda: [Changing(set_layer(False))],
    "unfrozen": lambda: [Changing(set_layer(False), 0), Changing(set_layer(True))],
    "finetuning": lambda: [Finetuning()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_may_be_frozen_and_unfrozen(change: Any, tmp_path: Path) -> None:
    callback = make_callback(
        teachers={"ema": EMATeacher(0.5), "base": BaseTeacher()}, every_n_steps=1, records=tmp_path
    )
    make_trainer(callbacks=[*change(), callback], max_steps=4).fit(evaluated_module(), make_loader())
    module_counts = []
    for folder in sorted(tmp_path.iterdir()):
        report = load(folder)
        assert all(len(node.gram) == len(report.modules) for node in report.nodes)
        module_counts.append(len(report.modules))
    frozen_first = change is not CHANGES["frozen"]
    assert module_counts == ([3, 3, 6, 6] if frozen_first else [6, 6, 3, 3])
    assert 0 < average_distance(callback) < 0.1


def with_second_adapter(module: Any) -> Any:
    torch.manual_seed(1)
    module.student.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    module.student.set_adapter("default")
    randomise(module.student, "second", 0.3, 7)
    return module


def activate(adapter: str) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.student.set_adapter(adapter)
        optimizer = module.trainer.optimizers[0]
        optimizer.param_groups[0]["params"] = list(lora_parameters(module.student).values())

    return change


def test_after_set_adapter_the_average_is_that_of_the_new_adapter(tmp_path: Path) -> None:
    callback = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1, records=tmp_path, **ALL_GRADIENTS)
    module = with_second_adapter(evaluated_module())
    make_trainer(callbacks=[Changing(activate("second")), callback], max_steps=4).fit(module, make_loader())
    folders = sorted(tmp_path.iterdir())
    assert [len(load(folder).modules) for folder in folders] == [6, 6, 2, 2]
    # The average of the new adapter starts as a copy of it at step 3, and differs from it at step 4.
    norms = [max(float(node.gram.sum(0)[-1, -1]) for node in load(folder).nodes) for folder in folders]
    assert norms[2] == 0 < norms[3]
    assert 0 < average_distance(callback) < 0.1


def test_an_adapter_is_deleted_and_another_one_added(tmp_path: Path) -> None:
    def change(module: Any) -> None:
        replace_adapter(module.student, 3)
        activate("default")(module)

    teachers = {"ema": EMATeacher(0.5), "other": AdapterTeacher("second")}
    callback = make_callback(teachers=teachers, every_n_steps=1, records=tmp_path)
    module = with_second_adapter(evaluated_module())
    make_trainer(callbacks=[Changing(change), callback], max_steps=4).fit(module, make_loader())
    assert [len(load(folder).modules) for folder in sorted(tmp_path.iterdir())] == [6, 6, 2, 2]
    assert 0 < average_distance(callback) < 0.1


def test_a_teacher_whose_adapter_was_deleted_costs_the_probes_and_not_the_training() -> None:
    callback = make_callback(teachers={"other": AdapterTeacher("second")}, every_n_steps=1, strict=False)
    module = with_second_adapter(evaluated_module())
    changing = Changing(lambda module: module.student.delete_adapter("second"))
    trainer = make_trainer(callbacks=[changing, callback], max_steps=4)
    with pytest.warns(UserWarning, match="a probe failed.*must be one of the student's adapters"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 4


def test_a_student_that_is_replaced_during_the_training_is_the_one_that_is_probed() -> None:
    callback = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1)

    def replace_student(module: Any) -> None:
        module.student = tiny("llama", seed=3).float().train()
        module.trainer.optimizers[0].param_groups[0]["params"] = list(lora_parameters(module.student).values())

    module = evaluated_module()
    make_trainer(callbacks=[Changing(replace_student), callback], max_steps=4).fit(module, make_loader())
    assert callback.monitor.probe is not None
    assert callback.monitor.probe.student is module.student
    assert 0 < average_distance(callback) < 0.1


def test_a_student_that_cannot_be_measured_any_more_costs_the_probes_and_not_the_training() -> None:
    class Unloading(Evaluated):
        unloaded = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if not self.unloaded else loss + 0 * next(self.parameters()).sum()

    def unload(module: Any) -> None:
        module.student = nn.ModuleList([module.student.unload()])[0]
        next(module.student.parameters()).requires_grad_(True)
        module.unloaded = True

    module = Unloading(tiny("llama").float().train(), word_tokenizer(), TEACHERS["answer"], max_new_tokens=5)
    callback = make_callback(teachers={"ema": EMATeacher(0.5)}, every_n_steps=1, strict=False)
    trainer = make_trainer(callbacks=[Changing(unload), callback], max_steps=4)
    with pytest.warns(UserWarning, match="`student` must be one peft model, but 0 were found"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 4
    assert callback.monitor.probe is None


# --- everything in a hook stands under the guard


class BrokenTeacher(EMATeacher):
    """Fails wherever a trainer's hook calls it."""

    def update(self, student: nn.Module, step: int) -> None:
        raise RuntimeError("no update")

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state")


class BrokenGate(LearningGate):
    """Fails wherever a checkpoint needs it."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no gate state")


def fit_and_save(callback: Any, folder: Path) -> Trainer:
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(evaluated_module(), make_loader())
    trainer.save_checkpoint(folder / "saved.ckpt")
    return trainer


def test_a_broken_teacher_or_gate_stops_neither_the_training_nor_a_checkpoint(tmp_path: Path) -> None:
    teachers = {"base": BaseTeacher(), "broken": BrokenTeacher()}
    with pytest.warns(UserWarning, match="odp-callbacks") as caught:
        fit_and_save(make_callback(teachers=teachers, gate=BrokenGate(), strict=False), tmp_path)
    messages = [str(warning.message) for warning in caught]
    for expected in ("no update", "no state", "no gate state"):
        assert sum(message.endswith(expected) for message in messages) == 1, expected
    state = next(iter(torch.load(tmp_path / "saved.ckpt", weights_only=False)["callbacks"].values()))
    assert "base" in state["teachers"], "the state of the others is saved"
    with pytest.raises(RuntimeError, match="no update"):
        fit_and_save(make_callback(teachers=teachers), tmp_path)
    with pytest.raises(RuntimeError, match="no gate state"):
        fit_and_save(make_callback(gate=BrokenGate()), tmp_path)


def test_a_module_whose_teacher_or_gate_has_no_state_saves_its_checkpoint(tmp_path: Path) -> None:
    class Unsavable(EMATeacher):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("no state")

    module = _module_with({"ema": Unsavable(0.5)})
    module.gate = BrokenGate()  # type: ignore[assignment]
    trainer = make_trainer(max_steps=1)
    trainer.strategy.connect(module)
    with pytest.warns(UserWarning, match="odp-callbacks") as caught:
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
    messages = [str(warning.message) for warning in caught]
    for owner, error in (("the teacher 'ema'", "no state"), ("`gate`", "no gate state")):
        assert any(f"saved without the state of {owner}: RuntimeError: {error}" in message for message in messages)


def test_a_schedule_of_the_user_that_fails_costs_the_probe(tmp_path: Path) -> None:
    callback = make_callback(strict=False)
    callback.should_probe = lambda step, last_step: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.warns(UserWarning, match="ZeroDivisionError") as caught:
        fit_and_save(callback, tmp_path)
    assert sum("ZeroDivisionError" in str(warning.message) for warning in caught) == 1
    assert callback.monitor.probe_count == 0


def test_a_gate_learned_with_other_teachers_is_not_restored(tmp_path: Path) -> None:
    gate = AlignmentGate()
    trainer = make_trainer(make_callback(gate=gate, teachers={"a": BaseTeacher()}), max_steps=2)
    trainer.fit(evaluated_module(), make_loader())
    assert gate.evidence.teachers == ("a",)
    state = trainer.callbacks[-1].state_dict()  # type: ignore[attr-defined]
    restored = AlignmentGate()
    callback = make_callback(gate=restored, teachers={"b": BaseTeacher()}, strict=False)
    callback.load_state_dict(state)
    with pytest.warns(UserWarning, match="odp-callbacks") as caught:
        make_trainer(callback, max_steps=2).fit(evaluated_module(), make_loader())
    assert any("gate has learned from other teachers" in str(warning.message) for warning in caught)
    assert restored.evidence.teachers == ("b",)


def test_a_module_s_state_of_other_teachers_is_dropped_with_a_sentence(tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.fit(_module_with({"ema": EMATeacher(0.5)}), make_loader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module = _module_with({"average": EMATeacher(0.5)})
    with pytest.warns(UserWarning, match="odp-callbacks") as caught:
        make_trainer(max_steps=3, max_epochs=9).fit(
            module, make_loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False
        )
    assert any("'ema'" in str(warning.message) for warning in caught)
    assert module.teachers["average"].step == 3  # type: ignore[attr-defined]


def _module_with(teachers: Any) -> Evaluated:
    student = tiny("llama").float().train()
    return Evaluated(student, word_tokenizer(), teachers, max_new_tokens=5, reward=contains_answer_reward)
