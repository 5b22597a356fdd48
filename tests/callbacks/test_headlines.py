"""What stands in Lightning's ``callback_metrics``: little, finite, and of one training."""

import io
import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from odp_callbacks import OnPolicyDistillation, Teacher
from odp_callbacks.callbacks.headlines import Headlines
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import ROWS, make_callback, make_loader, make_module, make_trainer

PIPE = 64 * 1024
"""Bytes that a pipe holds on Linux. Lightning's launchers hand the metrics over through one that nobody empties yet."""
ALIGNMENT, GAIN = "odp/alignment/answer/all", "odp/predicted_gain/answer/all"

# Issued by Lightning itself.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Validated(OnPolicyDistillation):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def validated_module() -> Validated:
    return Validated(tiny("llama").float().train(), word_tokenizer(), "base", max_new_tokens=5, learning_rate=1e-2)


def fit(callbacks: list[Any], checkpoint: Path | None = None, **changes: Any) -> Any:
    options = {"max_steps": 4, "max_epochs": 9, "val_check_interval": 1}
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(callbacks=callbacks, **{**options, "enable_checkpointing": saving, **changes})
    loader = DataLoader(ROWS[:1], collate_fn=list)  # type: ignore[arg-type]
    resumed = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": False}
    trainer.fit(validated_module(), make_loader(), loader, **resumed)
    return trainer


def handed_over(metrics: dict[str, Any]) -> int:
    """How many bytes Lightning sends to the main process."""
    buffer = io.BytesIO()
    torch.save(metrics, buffer)
    return len(buffer.getvalue())


@pytest.mark.parametrize("teachers", [2, 10])
def test_what_lightning_hands_back_is_small(teachers: int) -> None:
    named = {f"a teacher with a long name {index}": Teacher("{answer} {prompt}") for index in range(teachers)}
    callback = make_callback(teachers=named, optimizer_geometry=True)
    trainer = fit([callback], max_steps=2, val_check_interval=None)
    own = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("odp/")}
    assert f"odp/predicted_gain/{next(iter(named))}/all" in own
    assert handed_over(trainer.callback_metrics) < PIPE / 4


def test_a_hundred_teachers_fit_into_the_pipe() -> None:
    teachers = [f"{index:0100d}" for index in range(100)]
    headlines = Headlines(teachers, "odp")
    headlines.update(dict.fromkeys(headlines.names, 1.0))
    assert handed_over(headlines.shown({})) < PIPE


def constant_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.filterwarnings("ignore:odp-callbacks. the reward function gave:UserWarning")
@pytest.mark.filterwarnings("ignore:.*to every rollout.*:UserWarning")
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("on_validation", [False, True])
def test_early_stopping_does_not_stop_at_a_figure_that_is_withheld(mode: str, on_validation: bool) -> None:
    """The reward is constant, so that no alignment exists; validation also comes before the first probe."""
    stopping = EarlyStopping(ALIGNMENT, mode=mode, patience=10)
    callback = make_callback(reward=constant_reward, every_n_steps=3, on_validation=on_validation)
    trainer = fit([callback, stopping])
    assert trainer.global_step == 4
    assert callback.monitor.probe_count == (4 if on_validation else 1)
    assert stopping.wait_count > 0
    assert isfinite(float(trainer.callback_metrics[ALIGNMENT]))


def test_early_stopping_reads_the_figures_that_exist() -> None:
    stopping = EarlyStopping(GAIN, mode="max", patience=10, divergence_threshold=-0.999)
    callback = make_callback(every_n_steps=3)
    fit([callback, stopping])
    assert callback.last_report is not None
    assert float(stopping.best_score) == pytest.approx(callback.headlines.values[GAIN])


@pytest.mark.parametrize("name", [GAIN, "odp/predicted_gain_low/answer/all", "odp/reverse_kl/answer/all"])
def test_a_checkpoint_before_the_first_probe(name: str, tmp_path: Path) -> None:
    """Figures that are no headlines stand there, too, if something monitors them."""
    checkpoints = ModelCheckpoint(tmp_path, monitor=name, mode="max", save_top_k=1, every_n_train_steps=1)
    callback = make_callback(every_n_steps=3)
    trainer = fit([callback, checkpoints])
    assert checkpoints.best_model_score is not None
    assert float(checkpoints.best_model_score) == pytest.approx(callback.headlines.values[name])
    assert float(trainer.callback_metrics[name]) == pytest.approx(callback.headlines.values[name])
    assert "step=3" in checkpoints.best_model_path


def test_a_figure_that_no_probe_has_is_named(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, monitor="odp/alignmnt/answer/all")
    with pytest.warns(UserWarning, match="'odp/alignmnt/answer/all' is monitored .* 'odp/alignment/answer/all'"):
        fit([make_callback(every_n_steps=1), checkpoints], max_steps=1)


def test_a_failed_probe_changes_no_figure() -> None:
    works = True

    def unreliable_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if not works and any(completions):
            raise RuntimeError("no verifier")
        return [float(len(completion.split()) % 2) for completion in completions]

    seen = []

    class Watching(EarlyStopping):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            nonlocal works
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                works = False  # after the first step
                own = {name: str(float(value)) for name, value in trainer.callback_metrics.items() if "odp/" in name}
                seen.append(own)

    callback = make_callback(reward=unreliable_reward, every_n_steps=1, strict=False)
    with pytest.warns(UserWarning, match="no verifier"):
        fit([callback, Watching(ALIGNMENT)], max_steps=3)
    assert len(seen) == 3
    assert seen[0].keys() == seen[-1].keys()
    about_time = {"odp/probe/time_share", "odp/probe/left_out"}
    for name, value in seen[-1].items():
        assert value == seen[0][name] or name in about_time, name


def test_a_resumed_training_has_the_figures_and_another_one_has_not(tmp_path: Path) -> None:
    callback = make_callback(every_n_steps=2)
    fit([callback], max_steps=3).save_checkpoint(tmp_path / "saved.ckpt")
    values = dict(callback.headlines.values)
    resumed, stopping = make_callback(every_n_steps=100), EarlyStopping(GAIN, mode="max", patience=10)
    with pytest.warns(UserWarning, match="the run ended without a probe"):
        trainer = fit([resumed, stopping], checkpoint=tmp_path / "saved.ckpt")
    assert resumed.headlines.values == values
    assert float(trainer.callback_metrics[GAIN]) == pytest.approx(values[GAIN])
    assert float(stopping.best_score) == pytest.approx(values[GAIN])
    callback.headlines.values["odp/of the first training"] = 1.0
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert GAIN in callback.headlines.values
    assert "odp/of the first training" not in callback.headlines.values


def test_a_validation_on_its_own_shows_only_its_own_figures() -> None:
    callback = make_callback(every_n_steps=2, on_validation=True)
    module = validated_module()
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(module, make_loader())
    values = dict(callback.headlines.values)
    trainer.validate(module, DataLoader(ROWS[:1], collate_fn=list), verbose=False)  # type: ignore[arg-type]
    assert callback.headlines.values == values, "those of the training"
    shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert shown["odp/probe/seconds"] != pytest.approx(values["odp/probe/seconds"])


def test_a_learning_rate_that_waits_for_a_figure() -> None:
    class Scheduled(Validated):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": GAIN}}

    module = Scheduled(tiny("llama").float().train(), word_tokenizer(), "base", max_new_tokens=5)
    callback = make_callback(every_n_steps=3)
    trainer = make_trainer(callback, max_steps=4, max_epochs=9)
    trainer.fit(module, make_loader())
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert float(scheduler.best) == pytest.approx(callback.headlines.values[GAIN])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_that_lightning_starts_itself_come_back(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        # Sandboxes refuse that processes share memory by file descriptors.
        "torch.multiprocessing.set_sharing_strategy('file_system')\n"
        "from tests.helpers.training import make_callback, make_loader, make_module, make_trainer\n"
        "if __name__ == '__main__':\n"
        "    callback = make_callback(every_n_steps=1)\n"
        f"    trainer = make_trainer(callback, max_steps=1, strategy={strategy!r}, devices=2)\n"
        "    trainer.fit(make_module(), make_loader())\n"
        "    print(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))\n"
    )
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    metrics = json.loads(finished.stdout.strip().splitlines()[-1])
    assert isfinite(metrics["odp/predicted_gain/answer/all"])
