"""The Lightning callback in a real training run of a tiny student."""

import csv
import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pyarrow import parquet
from torch import nn
from torch.utils.data import DataLoader

from odp_callbacks import (
    BaseTeacher,
    EMATeacher,
    ModelTeacher,
    OnPolicyDistillation,
    Teacher,
)
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.storage import load
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.tensorboard import read_events, read_runs
from tests.helpers.training import (
    ROWS,
    TEACHERS,
    ManualOptimization,
    contains_answer_reward,
    end_state,
    make_callback,
    make_loader,
    make_module,
    make_trainer,
    states_equal,
)


def csv_scalars(logger: CSVLogger) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each scalar, where it has a number."""
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in rows[0]}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_thirty_steps_end_in_the_same_bits_with_and_without_the_callback(optimizer: str) -> None:
    class WithOptimizer(OnPolicyDistillation):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if optimizer == "adamw":
                return torch.optim.AdamW(parameters, lr=1e-2)
            return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)

    def train(callback: Any) -> tuple[Any, ...]:
        seed_everything(5, verbose=False)
        student = tiny("llama", dropout=0.2).float().train()
        module = WithOptimizer(
            student, word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5, reward=contains_answer_reward
        )
        trainer = make_trainer(callback, max_steps=30, accumulate_grad_batches=2, max_epochs=100)
        trainer.fit(module, make_loader())
        assert trainer.global_step == 30
        return end_state(trainer)

    callback = make_callback(
        every_n_steps=7,
        at_start=True,
        teachers={**TEACHERS, "ema": EMATeacher(0.5)},
        budget=300,
        update_every_n_steps=1,
    )
    with_callback, without = train(callback), train(None)
    assert callback.monitor.probe_count == 5
    assert callback.last_report is not None
    assert callback.last_report.nodes
    for part, expected in zip(with_callback, without, strict=True):
        assert states_equal(part, expected)


def test_it_logs_every_teacher_and_split_at_optimizer_steps(tmp_path: Path) -> None:
    callback = make_callback(at_start=True, log="all")
    loggers = [TensorBoardLogger(str(tmp_path / "tb")), CSVLogger(str(tmp_path / "csv"))]
    trainer = make_trainer(callback, logger=loggers, accumulate_grad_batches=2, max_epochs=100)
    trainer.fit(make_module(), make_loader())
    runs, written = read_runs(loggers[0].log_dir), csv_scalars(loggers[1])
    for figure in ("alignment", "predicted_gain", "logit_alignment", "teacher_advantage", "reverse_kl"):
        for teacher in TEACHERS:
            for split in ("all", "correct", "incorrect"):
                for suffix in ("", "_low", "_high"):
                    name = f"odp/{figure}{suffix}/{teacher}/{split}"
                    assert {step for step, _ in written[name]} <= {0, 2, 4}
                    assert np.isfinite([value for _, value in written[name]]).all()
                    group = "odp" if (figure, suffix) == ("predicted_gain", "") else "odp details"
                    tag = f"{group}/{figure}{suffix}" + (f"/{split}" if split != "all" else "")
                    assert runs[f"odp/{teacher}"].get(tag, []) == [
                        (step, pytest.approx(value, rel=1e-6)) for step, value in written[name]
                    ]
    for name in ("undefined_share", "truncated_share", "nodes", "generated_tokens", "seconds"):
        assert [step for step, _ in runs["."][f"odp details/probe/{name}"]] == [0, 2, 4]
    assert all(0 < value < 1 for _, value in runs["."]["odp details/probe/time_share"])
    assert any(tag.startswith("odp pictures/rollout/") for tag in read_events(loggers[0].log_dir).Tags()["images"])
    of_teacher = read_events(Path(loggers[0].log_dir) / "odp" / "answer")
    assert any(tag.startswith("odp histograms/alignment/") for tag in of_teacher.Tags()["histograms"])
    assert "odp/alignment/answer/all" in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_it_measures_in_any_precision(precision: Any) -> None:
    callback = make_callback()
    make_trainer(callback, precision=precision, max_steps=2).fit(make_module(), make_loader())
    assert callback.last_report is not None
    squared_norms = [node.gram.sum(0).diagonal() for node in callback.last_report.nodes if node.has_gradients]
    assert squared_norms
    assert all(np.isfinite(of_node).all() for of_node in squared_norms)
    assert any((of_node > 0).any() for of_node in squared_norms)


def test_manual_optimization_with_two_optimizers_probes_by_optimizer_steps() -> None:
    module = ManualOptimization(
        tiny("llama").float().train(), word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5
    )
    callback = make_callback(every_n_steps=3)
    trainer = make_trainer(callback, max_steps=8, max_epochs=100)
    trainer.fit(module, make_loader())
    # Each batch takes two steps, to 2, 4, 6 and 8; the multiples 3 and 6 of three are passed at 4 and 6.
    assert callback.monitor.probe_count == 2
    assert callback.monitor.last_probe_step == 6


def test_gradient_checkpointing_stays_on() -> None:
    module = make_module()
    base = module.student.get_base_model()
    enable = "activation_checkpointing_enable" if hasattr(base, "activation_checkpointing_enable") else None
    getattr(base, enable or "gradient_checkpointing_enable")()
    module.student.enable_input_require_grads()
    callback = make_callback()
    make_trainer(callback, max_steps=2).fit(module, make_loader())
    assert callback.monitor.probe_count == 1
    assert base.model.layers[0].gradient_checkpointing


def test_probes_at_validation(tmp_path: Path) -> None:
    callback = make_callback(on_validation=True)

    class Validated(OnPolicyDistillation):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    module = Validated(tiny("llama").float().train(), word_tokenizer(), "base", max_new_tokens=5)
    logger = TensorBoardLogger(str(tmp_path))
    make_trainer(callback, logger=logger).validate(module, DataLoader(ROWS, collate_fn=list), verbose=False)
    assert callback.monitor.probe_count == 1
    logger.finalize("success")
    assert "odp/update_gain" in read_runs(logger.log_dir)["odp/answer"]


def test_questions_from_the_current_batch() -> None:
    callback = make_callback(prompts=None)
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert callback.last_report is not None
    assert len({rollout.question for rollout in callback.last_report.rollouts}) == 2


def test_every_question_comes_once_before_any_comes_twice() -> None:
    callback = make_callback(questions_per_probe=1)
    question_ids = [callback.monitor.questions.next_questions(Processes())[0][0] for _ in range(8)]
    assert sorted(question_ids[:4]) == sorted(question_ids[4:]) == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
def test_a_resumed_run_continues_where_it_stopped(tmp_path: Path) -> None:
    def fit(callback: Any, steps: int, checkpoint: Path | None = None) -> Trainer:
        seed_everything(1, verbose=False)
        trainer = make_trainer(callback, max_steps=steps, max_epochs=100)
        trainer.fit(make_module(), make_loader(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return trainer

    uninterrupted = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(uninterrupted, 9)
    stopped = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(stopped, 5).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(resumed, 9, tmp_path / "half.ckpt")
    assert resumed.monitor.probe_count == uninterrupted.monitor.probe_count == 3
    assert resumed.monitor.questions.state_dict() == uninterrupted.monitor.questions.state_dict()
    assert torch.equal(resumed.monitor.random_stream.get_state(), uninterrupted.monitor.random_stream.get_state())
    assert resumed.teachers["ema"].average.keys() == uninterrupted.teachers["ema"].average.keys()
    assert resumed.teachers["ema"].step == 9


def test_a_second_run_with_the_same_callback_is_probed_like_the_first() -> None:
    callback = make_callback(every_n_steps=3)
    for probe_count in (1, 2):
        make_trainer(callback, max_steps=4).fit(make_module(), make_loader())
        assert callback.monitor.probe_count == probe_count


class NestedStudents(LightningModule):
    """A user's own module, with the student somewhere inside and no tokenizer."""

    def __init__(self, students: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"s{index}": tiny("gpt2").float().train() for index in range(students)})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = torch.tensor([[1, 7, 8, 9]])
        return sum(part(input_ids=ids, labels=ids).loss for part in self.parts.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)


@pytest.mark.parametrize("student", [None, "parts.s0", lambda module: module.parts["s0"]])
def test_it_finds_the_student_in_any_module(student: Any) -> None:
    callback = make_callback(student=student, tokenizer=word_tokenizer())
    make_trainer(callback, max_steps=2).fit(NestedStudents(), make_loader())
    assert callback.monitor.probe_count == 1


def check_refusal(match: str, module: LightningModule | None = None, **changes: Any) -> None:
    """Check that the error is raised before the first training step."""
    module = module or make_module()
    started_batches = []
    module.on_train_batch_start = lambda *_: started_batches.append(1)  # type: ignore[method-assign]

    def train() -> None:
        make_trainer(make_callback(**changes)).fit(module, make_loader())

    with pytest.raises((ValueError, TypeError), match=match):
        train()
    assert not started_batches


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("`every_n_steps` must be a positive integer, but 0", {"every_n_steps": 0}),
        ("`questions_per_probe`", {"questions_per_probe": -1}),
        ("`confidence`", {"confidence": 1.0}),
        ("`teachers` is empty", {"teachers": {}}),
        ("no '/'", {"teachers": {"a/b": BaseTeacher()}}),
        ("unknown option `max_tokens`", {"max_tokens": 3}),
        ("`max_new_tokens` must be a positive integer", {"max_new_tokens": 0}),
        ("`temperature` must be a positive number", {"temperature": 0.0}),
        ("`divergence` must be one of", {"divergence": "kl"}),
        ("`beta` must lie in", {"divergence": "jsd", "beta": 2.0}),
        ("`prompts` has no rows", {"prompts": []}),
        ("needs a column 'prompt'", {"prompts": [{"question": "a"}]}),
        ("names the column 'hint'", {"teachers": {"x": Teacher("{hint} {prompt}")}}),
        ("one number for each of the 2 completions", {"reward": lambda prompts, completions, **_: [1.0]}),
        ("numbers in \\[0, 1\\], but 2.0", {"reward": lambda prompts, completions, **_: [2.0] * len(prompts)}),
        ("more than the model's context of 64", {"prompts": [{"prompt": "a " * 60, "answer": "a"}]}),
        ("student has 12 logits and this teacher 20", {"teachers": {"m": ModelTeacher(tiny(vocabulary=20))}}),
        ("`reward` must be a function", {"reward": "exact"}),
    ],
)
def test_bad_input_is_refused_before_training(match: str, changes: dict[str, Any]) -> None:
    check_refusal(match, **changes)


def test_a_module_without_or_with_several_students_is_refused() -> None:
    check_refusal("`student` must be one peft model, but 0", NestedStudents(0), tokenizer=word_tokenizer())
    check_refusal("`student` must be one peft model, but 2", NestedStudents(2), tokenizer=word_tokenizer())
    check_refusal("no such submodule", student="model.student")
    check_refusal("`tokenizer` was not given", NestedStudents())


def test_a_failing_verifier_causes_one_warning_and_training_continues(tmp_path: Path) -> None:
    def failing_reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        if any(completions):
            raise ConnectionError("no verifier today")
        return [0.0] * len(prompts)

    logger = TensorBoardLogger(str(tmp_path))
    trainer = make_trainer(make_callback(reward=failing_reward, strict=False), max_steps=6, logger=logger, max_epochs=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(reward=None), make_loader())
    assert trainer.global_step == 6
    messages = [str(warning.message) for warning in caught if "no verifier today" in str(warning.message)]
    assert len(messages) == 1
    logger.finalize("success")
    assert list(read_runs(logger.log_dir)) == ["."], "no run without a number"
    with pytest.raises(ConnectionError, match="no verifier today"):
        make_trainer(make_callback(reward=failing_reward)).fit(make_module(reward=None), make_loader())


def test_a_constant_reward_causes_one_warning_and_leaves_figures_empty(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = make_callback(log="all", reward=lambda prompts, completions, **_: [0.0] * len(prompts))
    with pytest.warns(UserWarning, match=r"gave 0\.0 to every rollout") as caught:
        make_trainer(callback, logger=logger).fit(make_module(), make_loader())
    assert len([warning for warning in caught if "to every rollout" in str(warning.message)]) == 1
    logged = csv_scalars(logger)
    assert logged["odp/undefined_share/base/all"]
    assert logged["odp/alignment/answer/correct"] == []
    for figure in ("alignment", "predicted_gain", "teacher_advantage", "predicted_gain_low"):
        assert logged[f"odp/{figure}/answer/all"] == [], "a column without a number"


def test_the_update_of_the_training_s_own_rollouts_is_measured_at_every_step(tmp_path: Path) -> None:
    callback = make_callback(every_n_steps=100, update_every_n_steps=1)
    logger = CSVLogger(tmp_path)
    module = make_module(rollouts_per_question=2)
    make_trainer(callback, logger=logger).fit(module, make_loader())
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    column = names.index("odp/training/success_rate")
    assert sum(row[column] != "" for row in rows) == 4
    assert "odp/training/update_gain/answer/all" in names
    assert len(module.last_rollouts) == 4
    assert not any(name.startswith("odp/alignment") for name in names)


def test_the_training_s_update_needs_the_rollouts() -> None:
    class WithoutRollouts(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tokenizer = tiny("llama").float(), word_tokenizer()

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        ValueError, match="`update_every_n_steps` was given, but WithoutRollouts has no `last_rollouts`"
    ):
        make_trainer(make_callback(update_every_n_steps=1)).fit(WithoutRollouts(), make_loader())


def test_the_records_of_every_probe_are_saved(tmp_path: Path) -> None:
    callback = make_callback(records=tmp_path / "records")
    make_trainer(callback).fit(make_module(), make_loader())
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["step-00000002", "step-00000004"]
    report = load(tmp_path / "records" / "step-00000004")
    assert callback.last_report is not None
    assert report.rollouts == callback.last_report.rollouts


def test_a_disk_that_is_full_causes_a_warning_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(table: Any, file: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", fill_disk)
    trainer = make_trainer(make_callback(records=tmp_path / "records", strict=False))
    with pytest.warns(UserWarning, match="failed to save the records of a probe: OSError.*No space left on device"):
        trainer.fit(make_module(), make_loader())
    assert trainer.global_step == 4
    assert not list((tmp_path / "records").iterdir())


def live_tensor_shapes() -> list[tuple[int, ...]]:
    """Shapes of all live tensors except logged numbers."""
    gc.collect()
    return [tuple(item.shape) for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.dim()]


def test_no_tensor_of_a_probe_stays_in_memory() -> None:
    """Counted before and after a probe in the middle of a training run; the records hold arrays only."""
    seed_everything(0, verbose=False)  # some batches have no reward but 0, which is warned about
    counts: list[tuple[int, int]] = []
    callback = make_callback(every_n_steps=100, budget=60, update_every_n_steps=1)
    run_probe = callback.monitor.run_probe

    class CountingTensors(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            callback._prepare(trainer.lightning_module)
            run_probe(callback.trainer_context(trainer))  # sets up what is set up once
            before = live_tensor_shapes()
            run_probe(callback.trainer_context(trainer))
            counts.append((len(before), len(live_tensor_shapes())))

    make_trainer(max_steps=3, callbacks=[CountingTensors(), callback]).fit(make_module(), make_loader())
    assert len(counts) == 3
    assert callback.last_report is not None
    assert all(before == after for before, after in counts)


def test_probes_that_would_exceed_the_overhead_are_skipped(tmp_path: Path) -> None:
    """A probe takes many times as long as a step here, so the first one uses up the share of the whole run."""
    logger = CSVLogger(tmp_path)
    callback = make_callback(every_n_steps=1, max_overhead=0.2)
    trainer = make_trainer(callback, max_steps=6, max_epochs=100, logger=logger)
    trainer.fit(make_module(), make_loader())
    assert 1 <= callback.monitor.probe_count < 6
    assert callback.monitor.time_budget.skipped_probes == 6 - callback.monitor.probe_count
    unlimited = make_callback(every_n_steps=1)
    make_trainer(unlimited, max_steps=6, max_epochs=100).fit(make_module(), make_loader())
    assert unlimited.monitor.probe_count == 6


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_an_overhead_that_is_not_a_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"`max_overhead` must lie in \(0, 1\) or be None"):
        make_callback(max_overhead=share)


class RefusingLogger(CSVLogger):
    """A logger that refuses some names, as MLflow refuses parentheses."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any("(" in name for name in metrics):
            raise ValueError("invalid metric name")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_metrics_stops_neither_the_run_nor_other_loggers(tmp_path: Path) -> None:
    callback = make_callback(teachers={"large (7B)": BaseTeacher()}, strict=False)
    other_logger = CSVLogger(tmp_path, name="other")
    trainer = make_trainer(callback, logger=[RefusingLogger(tmp_path, name="refusing"), other_logger])
    expected = "RefusingLogger refused the metrics of a probe: ValueError: invalid metric name"
    with pytest.warns(UserWarning, match=expected) as caught:
        trainer.fit(make_module(), make_loader())
    assert trainer.global_step == 4
    assert sum("refused the metrics" in str(warning.message) for warning in caught) == 1
    other_logger.save()
    assert "odp/update_gain/large (7B)/all" in (Path(other_logger.log_dir) / "metrics.csv").read_text()
    strict = make_callback(teachers={"large (7B)": BaseTeacher()})
    with pytest.raises(ValueError, match="invalid metric name"):
        make_trainer(strict, logger=[RefusingLogger(tmp_path, name="strict")]).fit(make_module(), make_loader())
