"""The callback in a configuration of LightningCLI."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation
from odp_callbacks.engine.teachers import BaseTeacher, EMATeacher, ModelTeacher
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.training import make_loader, odd_length_reward

# Lightning itself uses what jsonargparse has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
REWARD = "tests.helpers.training.odd_length_reward"


class ConfiguredModule(OnPolicyDistillation):
    """A module that a configuration can build."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        student = tiny("llama").float().train()
        super().__init__(student, word_tokenizer(), "base", max_new_tokens=5, learning_rate=learning_rate)


class ConfiguredData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return make_loader()


def run_cli(
    folder: Path, monkeypatch: pytest.MonkeyPatch, init_args: dict[str, Any], *flags: str, run: bool = False
) -> Any:
    """Run LightningCLI on a YAML file with one callback."""
    callback = {
        "class_path": "odp_callbacks.GradientAlignmentCallback",
        "init_args": {"teachers": "base", "prompts": None, "reward": REWARD, **init_args},
    }
    trainer = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    config = {"seed_everything": 0, "trainer": {**trainer, "callbacks": [callback]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["cli.py", *(["fit"] if run else []), f"--config={folder}/config.yaml", *flags])
    return LightningCLI(ConfiguredModule, ConfiguredData, run=run, save_config_callback=None)


def callback_of(cli: Any) -> GradientAlignmentCallback:
    (callback,) = [one for one in cli.trainer.callbacks if isinstance(one, GradientAlignmentCallback)]
    return callback


def test_options_of_schedule_and_probe_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = run_cli(
        tmp_path,
        monkeypatch,
        {
            "teachers": {"answer": "The answer is {answer}. {prompt}", "base": "base"},
            "prompts": [{"prompt": "a b", "answer": "a"}],
            "max_new_tokens": 5,
            "every_n_steps": 7,
            "name": "hard",
            "records": "records",
            "max_overhead": None,
            "divergence": "forward_kl",
            "eos_token_ids": [5, 6],
        },
    )
    callback = callback_of(cli)
    assert callback.config.max_new_tokens == 5
    assert callback.config.divergence == "forward_kl"
    assert callback.config.eos_token_ids == (5, 6)
    assert callback.monitor.schedule.every_n_steps == 7
    assert callback.monitor.schedule.name == "hard"
    assert callback.monitor.schedule.max_overhead is None
    assert callback.monitor.reward is odd_length_reward
    assert callback.teachers["answer"].context == "The answer is {answer}. {prompt}"
    assert isinstance(callback.teachers["base"], BaseTeacher)


def test_max_new_tokens_alone_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callback_of(run_cli(tmp_path, monkeypatch, {"max_new_tokens": 5})).config.max_new_tokens == 5
    cli = run_cli(tmp_path, monkeypatch, {"max_new_tokens": 5}, "--trainer.callbacks.budget=500")
    assert callback_of(cli).config.budget == 500
    assert callback_of(cli).config.max_new_tokens == 5


def test_functions_are_named_by_their_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "odp_callbacks.engine.every_node"
    assert callback_of(run_cli(tmp_path, monkeypatch, {"nodes": path})).config.selector.__name__ == "every_node"
    assert callback_of(run_cli(tmp_path, monkeypatch, {"nodes": "entropy"})).config.nodes == "entropy"


def test_a_wrong_option_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_cli(tmp_path, monkeypatch, {"max_tokens": 5})
    assert "max_tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_cli(tmp_path, monkeypatch, {"max_new_tokens": "five"})
    assert "max_new_tokens" in capsys.readouterr().err


def test_a_fit_from_a_configuration_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"every_n_steps": 2, "max_new_tokens": 4, "questions_per_probe": 2, "strict": True}
    cli = run_cli(tmp_path, monkeypatch, options, run=True)
    assert callback_of(cli).monitor.probe_count == 1


def test_teachers_of_all_kinds_come_from_class_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_base(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    teachers = {
        "answer": "The answer is {answer}. {prompt}",
        "average": {"class_path": "odp_callbacks.EMATeacher", "init_args": {"decay": 0.9}},
        "larger": {"class_path": "odp_callbacks.ModelTeacher", "init_args": {"model": str(tmp_path / "model")}},
    }
    options = {"teachers": teachers, "every_n_steps": 2, "max_new_tokens": 4, "questions_per_probe": 2, "strict": True}
    callback = callback_of(run_cli(tmp_path, monkeypatch, options, run=True))
    assert callback.monitor.probe_count == 1
    assert isinstance(callback.teachers["average"], EMATeacher)
    assert isinstance(callback.teachers["larger"], ModelTeacher)
    assert callback.last_report is not None
    assert callback.last_report.teachers == ("answer", "average", "larger")
