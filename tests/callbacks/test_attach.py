"""The callback with LightningModules as people write them, in both packages of Lightning."""

import csv
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks import AdapterTeacher, BaseTeacher, Teacher
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.engine.gradients.adam import adam_preconditioner
from odp_callbacks.engine.student import uncompiled
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.training import (
    ROWS,
    ManualOptimization,
    end_state,
    make_loader,
    make_module,
    make_trainer,
    make_watching_callback,
    odd_length_reward,
    states_equal,
)

IDS = torch.tensor([[1, 5, 6, 9, 7, 8]])


def user_module(package: str, student_path: str, student: nn.Module, automatic: bool = True) -> Any:
    """A module that uses nothing of this library, with the student at ``student_path``."""
    lightning = import_module(package)

    class UserModule(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            *parents, attribute = student_path.split(".")
            holder: Any = self
            for parent in parents:
                setattr(holder, parent, nn.Module())
                holder = getattr(holder, parent)
            setattr(holder, attribute, student)
            self.tokenizer = word_tokenizer()
            self.automatic_optimization = automatic

        def loss(self) -> torch.Tensor:
            model: Any = self.get_submodule(student_path)
            loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss()
            if not self.automatic_optimization:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if self.automatic_optimization:
                return torch.optim.AdamW(trained, lr=1e-2)
            return [torch.optim.AdamW(trained[::2], lr=1e-2), torch.optim.AdamW(trained[1::2], lr=1e-2)]

    return UserModule()


def fit(package: str, module: Any, callback: Any = None, **changes: Any) -> Any:
    import_module(package).seed_everything(0, verbose=False)
    options = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_model_summary": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = import_module(package).Trainer(**(options | changes), callbacks=[] if callback is None else [callback])
    trainer.fit(module, make_loader())
    return trainer


def lora_student(**options: Any) -> nn.Module:
    return tiny("llama", **options).float().train()


def student_with_two_adapters() -> nn.Module:
    student: Any = lora_student()
    torch.manual_seed(1)
    student.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in student.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter)
    student.set_adapter("default")
    return student  # type: ignore[no-any-return]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


MODULES: dict[str, Any] = {
    "any name": {"student_path": "pupil"},
    "nested": {"student_path": "one.two.pupil"},
    "compiled": {"student": lambda: torch.compile(lora_student(), backend="eager")},
    "manual, two optimizers": {"automatic": False},
    "two adapters": {
        "student": student_with_two_adapters,
        "teachers": {"other": AdapterTeacher("other"), "base": BaseTeacher()},
    },
    "shared with the base": {"teachers": {"base": BaseTeacher()}},
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_it_measures_and_changes_no_bit(options: dict[str, Any], package: str) -> None:
    end_states = []
    student_path = options.get("student_path", "student")
    teachers = options.get("teachers", {"hint": Teacher("a {prompt}")})
    for watched in (False, True):
        student = options.get("student", lora_student)()
        module = user_module(package, student_path, student, automatic=options.get("automatic", True))
        callback = make_watching_callback(teachers=teachers) if watched else None
        # The student is found without its path, also inside the wrapper of a compiled one.
        trainer = fit(package, module, callback)
        end_states.append(end_state(trainer))
        if callback is not None:
            assert callback.last_report is not None
            assert callback.monitor.probe is not None
            assert callback.monitor.probe.student is uncompiled(module.get_submodule(student_path))
            assert callback.monitor.probe_count == 2
            assert np.isfinite(float(trainer.callback_metrics["odp/probe/seconds"]))
    assert states_equal(*end_states)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, in its compiler
def test_a_student_that_inductor_compiled() -> None:
    module = user_module("lightning.pytorch", "student", torch.compile(lora_student()))
    callback = make_watching_callback()
    fit("lightning.pytorch", module, callback)
    assert callback.last_report is not None


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
def test_pytorch_lightning_resumes_and_logs(tmp_path: Path) -> None:
    lightning = import_module("pytorch_lightning")
    loggers = import_module("pytorch_lightning.loggers")
    checkpoints = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    uninterrupted = make_watching_callback(log=["alignment"])
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=loggers.CSVLogger(str(tmp_path)), callbacks=[uninterrupted, checkpoints],
        enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(user_module("pytorch_lightning", "student", lora_student()), make_loader())
    assert "odp/alignment/answer/all" in (Path(trainer.logger.log_dir) / "metrics.csv").read_text()
    resumed = make_watching_callback()
    resumed_trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, callbacks=[resumed], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
    )  # fmt: skip
    (checkpoint,) = (tmp_path / "saved").glob("*step=2.ckpt")
    resumed_trainer.fit(
        user_module("pytorch_lightning", "student", lora_student()), make_loader(), ckpt_path=checkpoint
    )
    assert resumed.monitor.probe_count == 2
    assert resumed.monitor.questions.state_dict() == uninterrupted.monitor.questions.state_dict()


VARIANTS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.student. also trains 192 parameters:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_lora_in_a_live_run(variant: dict[str, Any]) -> None:
    end_states = []
    for watched in (False, True):
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], **variant}
        student = get_peft_model(tiny_base().float(), LoraConfig(**options)).train()
        callback = make_watching_callback() if watched else None
        module = user_module("lightning.pytorch", "student", student)
        end_states.append(end_state(fit("lightning.pytorch", module, callback)))
        assert callback is None or callback.last_report is not None
    assert states_equal(*end_states)


def test_adam_s_geometry_in_a_live_run(tmp_path: Path) -> None:
    module = make_module(reward=odd_length_reward)
    callback = make_watching_callback(optimizer_geometry=True, at_start=True, records=tmp_path / "r", log="all")
    preconditioners: list[Any] = []
    run_probe = callback.monitor.run_probe

    def run_probe_and_keep_the_preconditioner(context: Any, batch: Any = None) -> None:
        preconditioners.append(adam_preconditioner(context.optimizers, module.student))
        run_probe(context, batch)

    callback.monitor.run_probe = run_probe_and_keep_the_preconditioner  # type: ignore[method-assign]
    trainer = make_trainer(callback, logger=CSVLogger(str(tmp_path)))
    trainer.fit(module, make_loader())
    assert preconditioners[0] is None, "no step was taken yet"
    assert preconditioners[1] is not None
    report = callback.last_report
    assert report is not None
    assert report.preconditioned is not None
    assert report.preconditioned.settings["geometry"] == "adam"
    trainer.logger.save()
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["step"] == "4" and row["odp/probe/seconds"]][-1]
    for figure in ("alignment", "predicted_gain_low", "step_alignment"):
        found = float(logged[f"odp/adam/{figure}/answer/all"] or "nan")
        np.testing.assert_allclose(found, scalars(report.preconditioned)[f"odp/{figure}/answer/all"], rtol=1e-5)
    assert not any(name.startswith("odp/adam/reverse_kl") for name in logged)
    assert (tmp_path / "r" / "step-00000004" / "preconditioned").exists()
    assert not (tmp_path / "r" / "step-00000000" / "preconditioned").exists()


def test_adam_s_geometry_changes_neither_the_euclidean_figures_nor_the_training() -> None:
    end_states, reports = [], []
    for geometry in (False, True):
        torch.manual_seed(0)
        callback = make_watching_callback(optimizer_geometry=geometry)
        trainer = fit("lightning.pytorch", make_module(reward=odd_length_reward), callback)
        end_states.append(end_state(trainer))
        assert callback.last_report is not None
        reports.append(callback.last_report)
    assert states_equal(*end_states)
    assert reports[0].preconditioned is None
    for without, with_geometry in zip(reports[0].nodes, reports[1].nodes, strict=True):
        np.testing.assert_array_equal(without.gram, with_geometry.gram)


def test_other_optimizers_are_refused_before_the_first_step() -> None:
    torch.manual_seed(0)
    module = ManualOptimization(lora_student(), word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5)
    with pytest.raises(ValueError, match="is trained by SGD; leave `optimizer_geometry` off"):
        make_trainer(make_watching_callback(optimizer_geometry=True)).fit(module, make_loader(ROWS))
    assert module.trainer.global_step == 0
