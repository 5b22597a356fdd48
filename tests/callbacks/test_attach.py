"""Attached to LightningModules as people write them, in both packages that Lightning comes in."""

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
from odp_callbacks.analysis.summaries import scalars
from odp_callbacks.engine.gradients.optimizer_geometry import adam_preconditioner
from odp_callbacks.engine.student import uncompiled
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.training import ROWS, Manual, end_state, loader, make_module, make_trainer, odd, same, watcher

IDS = torch.tensor([[1, 5, 6, 9, 7, 8]])


def plain(package: str, place: str, student: nn.Module, **changes: Any) -> Any:
    """A module that has nothing of this library, with the student at ``place``."""
    lightning = import_module(package)

    class Plain(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            *path, last = place.split(".")
            holder: Any = self
            for name in path:
                setattr(holder, name, nn.Module())
                holder = getattr(holder, name)
            setattr(holder, last, student)
            self.tokenizer = word_tokenizer()
            self.place = place
            self.automatic_optimization = changes.get("automatic", True)

        def loss(self) -> torch.Tensor:
            model: Any = self.get_submodule(self.place)
            found: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
            return found

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss()
            if not self.automatic_optimization:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            if self.automatic_optimization:
                return torch.optim.AdamW(trained, lr=1e-2)
            return [torch.optim.AdamW(trained[::2], lr=1e-2), torch.optim.AdamW(trained[1::2], lr=1e-2)]

    return Plain()


def fitted(package: str, module: Any, callback: Any = None, **changes: Any) -> Any:
    import_module(package).seed_everything(0, verbose=False)
    options = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_model_summary": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = import_module(package).Trainer(**(options | changes), callbacks=[] if callback is None else [callback])
    trainer.fit(module, loader())
    return trainer


def lora(**options: Any) -> nn.Module:
    return tiny("llama", **options).float().train()


def two_adapters() -> nn.Module:
    student: Any = lora()
    torch.manual_seed(1)
    student.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in student.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(p)
    student.set_adapter("default")
    return student  # type: ignore[no-any-return]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SHAPES: dict[str, Any] = {
    "any name": {"place": "pupil"},
    "nested": {"place": "one.two.pupil"},
    "compiled": {"student": lambda: torch.compile(lora(), backend="eager")},
    "manual, two optimizers": {"automatic": False},
    "two adapters": {"student": two_adapters, "teachers": {"other": AdapterTeacher("other"), "base": BaseTeacher()}},
    "shared with the base": {"teachers": {"base": BaseTeacher()}},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_measures_and_changes_no_bit(shape: dict[str, Any], package: str) -> None:
    ends = []
    for watched in (False, True):
        make = shape.get("student", lora)
        module = plain(package, shape.get("place", "student"), make(), automatic=shape.get("automatic", True))
        callback = watcher(teachers=shape.get("teachers", {"hint": Teacher("a {prompt}")})) if watched else None
        # Found without being told where, but for a compiled one, whose wrapper holds the peft model.
        trainer = fitted(package, module, callback)
        ends.append(end_state(trainer))
        if callback is not None:
            assert callback.last_report is not None
            assert callback.monitor.probe is not None
            assert callback.monitor.probe.student is uncompiled(module.get_submodule(shape.get("place", "student")))
            assert callback.monitor.probes == 2
            assert np.isfinite(float(trainer.callback_metrics["odp/probe/seconds"]))
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, in its compiler
def test_a_student_that_inductor_compiled() -> None:
    module = plain("lightning.pytorch", "student", torch.compile(lora()))
    callback = watcher()
    fitted("lightning.pytorch", module, callback)
    assert callback.last_report is not None


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
def test_pytorch_lightning_resumes_and_logs(tmp_path: Path) -> None:
    lightning = import_module("pytorch_lightning")
    loggers = import_module("pytorch_lightning.loggers")
    saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    whole = watcher()
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=loggers.CSVLogger(str(tmp_path)), callbacks=[whole, saving],
        enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(plain("pytorch_lightning", "student", lora()), loader())
    assert "odp/alignment/answer/all" in (Path(trainer.logger.log_dir) / "metrics.csv").read_text()
    resumed = watcher()
    again = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, callbacks=[resumed], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
    )  # fmt: skip
    (kept,) = (tmp_path / "kept").glob("*step=2.ckpt")
    again.fit(plain("pytorch_lightning", "student", lora()), loader(), ckpt_path=kept)
    assert resumed.monitor.probes == 2
    assert resumed.monitor.order == whole.monitor.order


VARIANTS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.student. also trains 192 parameters:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_lora_in_a_live_run(variant: dict[str, Any]) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], **variant}
        student = get_peft_model(tiny_base().float(), LoraConfig(**options)).train()
        callback = watcher() if watched else None
        ends.append(end_state(fitted("lightning.pytorch", plain("lightning.pytorch", "student", student), callback)))
        assert callback is None or callback.last_report is not None
    assert same(*ends)


def test_adam_s_geometry_in_a_live_run(tmp_path: Path) -> None:
    module, callback = make_module(reward=odd), watcher(optimizer_geometry=True, at_start=True, records=tmp_path / "r")
    seen: list[Any] = []
    original = callback.monitor.run

    def run(host: Any, batch: Any) -> None:
        seen.append(adam_preconditioner(host.optimizers, module.student))
        original(host, batch)

    callback.monitor.run = run  # type: ignore[method-assign]
    trainer = make_trainer(callback, logger=CSVLogger(str(tmp_path)))
    trainer.fit(module, loader())
    assert seen[0] is None, "no step was taken yet"
    assert seen[1] is not None
    report = callback.last_report
    assert report is not None
    assert report.preconditioned is not None
    assert report.preconditioned.settings["geometry"] == "adam"
    for figure in ("alignment", "predicted_gain_low", "step_alignment"):
        logged = float(trainer.callback_metrics[f"odp/adam/{figure}/answer/all"])
        np.testing.assert_allclose(logged, scalars(report.preconditioned)[f"odp/{figure}/answer/all"], rtol=1e-5)
    assert not any(name.startswith("odp/adam/reverse_kl") for name in trainer.callback_metrics)
    assert (tmp_path / "r" / "step-00000004" / "preconditioned").exists()
    assert not (tmp_path / "r" / "step-00000000" / "preconditioned").exists()


def test_its_figures_are_those_of_a_probe_in_that_metric() -> None:
    """Euclidean figures are what they are without it, and training ends in the same bits."""
    ends, reports = [], []
    for geometry in (False, True):
        torch.manual_seed(0)
        callback = watcher(optimizer_geometry=geometry)
        ends.append(end_state(fitted("lightning.pytorch", make_module(reward=odd), callback)))
        assert callback.last_report is not None
        reports.append(callback.last_report)
    assert same(*ends)
    assert reports[0].preconditioned is None
    for a, b in zip(reports[0].nodes, reports[1].nodes, strict=True):
        np.testing.assert_array_equal(a.gram, b.gram)


def test_other_optimizers_are_refused_before_the_first_step() -> None:
    torch.manual_seed(0)
    module = Manual(lora(), word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5)
    with pytest.raises(ValueError, match="is trained by SGD; leave `optimizer_geometry` off"):
        make_trainer(watcher(optimizer_geometry=True)).fit(module, loader(ROWS))
    assert module.trainer.global_step == 0
