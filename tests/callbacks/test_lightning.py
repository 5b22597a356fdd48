"""The callback as a guest in a real training run, on a tiny student."""

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
from tests.helpers.training import (
    ROWS,
    TEACHERS,
    Manual,
    end_state,
    loader,
    make_callback,
    make_module,
    make_trainer,
    same,
    starts_right,
)


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_thirty_steps_end_in_the_same_bits_with_and_without_the_callback(optimizer: str) -> None:
    class Chosen(OnPolicyDistillation):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = [p for p in self.parameters() if p.requires_grad]
            if optimizer == "adamw":
                return torch.optim.AdamW(parameters, lr=1e-2)
            return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)

    def train(callback: Any) -> tuple[Any, ...]:
        seed_everything(5, verbose=False)
        student = tiny("llama", dropout=0.2).float().train()
        module = Chosen(student, word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5, reward=starts_right)
        trainer = make_trainer(callback, max_steps=30, accumulate_grad_batches=2, max_epochs=100)
        trainer.fit(module, loader())
        assert trainer.global_step == 30
        return end_state(trainer)

    callback = make_callback(
        every_n_steps=7,
        at_start=True,
        teachers={**TEACHERS, "ema": EMATeacher(0.5)},
        budget=300,
        free_every_n_steps=1,
    )
    with_callback, without = train(callback), train(None)
    assert callback.monitor.probes == 5
    assert callback.last_report is not None
    assert callback.last_report.nodes
    for ours, theirs in zip(with_callback, without, strict=True):
        assert same(ours, theirs)


def test_it_logs_every_teacher_and_split_at_optimizer_steps(tmp_path: Path) -> None:
    callback = make_callback(at_start=True)
    loggers = [TensorBoardLogger(str(tmp_path / "tb")), CSVLogger(str(tmp_path / "csv"))]
    trainer = make_trainer(callback, logger=loggers, accumulate_grad_batches=2, max_epochs=100)
    trainer.fit(make_module(), loader())
    logged = scalars(loggers[0].log_dir)
    for figure in ("alignment", "predicted_gain", "logit_alignment", "teacher_advantage", "reverse_kl"):
        for teacher in TEACHERS:
            for split in ("all", "correct", "incorrect"):
                for end in ("", "_low", "_high"):
                    steps = [step for step, _ in logged[f"odp/{figure}{end}/{teacher}/{split}"]]
                    assert steps == [0, 2, 4]
    for name in ("success_rate", "undefined_share", "truncated_share", "nodes", "generated_tokens", "seconds"):
        assert all(np.isfinite(value) for _, value in logged[f"odp/probe/{name}"])
    assert all(0 < value < 1 for _, value in logged["odp/probe/time_share"])
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    assert any(tag.startswith("odp/rollout/") for tag in events.Tags()["images"])
    assert any(tag.startswith("odp/alignment_histogram/answer") for tag in events.Tags()["histograms"])
    assert "odp/alignment/answer/all" in (Path(loggers[1].log_dir) / "metrics.csv").read_text()
    assert "odp/alignment/answer/all" in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision: Any) -> None:
    callback = make_callback()
    make_trainer(callback, precision=precision, max_steps=2).fit(make_module(), loader())
    assert callback.last_report is not None
    gains = [n.gram.sum(0).diagonal() for n in callback.last_report.nodes]
    assert all(np.isfinite(g).all() for g in gains)
    assert any((g > 0).any() for g in gains)


def test_manual_optimization_with_two_optimizers_probes_by_optimizer_steps() -> None:
    module = Manual(tiny("llama").float().train(), word_tokenizer(), Teacher("{answer} {prompt}"), max_new_tokens=5)
    callback = make_callback(every_n_steps=3)
    trainer = make_trainer(callback, max_steps=8, max_epochs=100)
    trainer.fit(module, loader())
    # Two steps a batch: 2, 4, 6, 8; the multiples 3 and 6 of three are passed at 4 and 6.
    assert callback.monitor.probes == 2
    assert callback.monitor.last_probe == 6


def test_gradient_checkpointing_stays_on() -> None:
    module = make_module()
    base = module.student.get_base_model()
    enable = "activation_checkpointing_enable" if hasattr(base, "activation_checkpointing_enable") else None
    getattr(base, enable or "gradient_checkpointing_enable")()
    module.student.enable_input_require_grads()
    callback = make_callback()
    make_trainer(callback, max_steps=2).fit(module, loader())
    assert callback.monitor.probes == 1
    assert base.model.layers[0].gradient_checkpointing


def test_probes_at_validation(tmp_path: Path) -> None:
    callback = make_callback(on_validation=True)

    class Validated(OnPolicyDistillation):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    module = Validated(tiny("llama").float().train(), word_tokenizer(), "base", max_new_tokens=5)
    logger = TensorBoardLogger(str(tmp_path))
    make_trainer(callback, logger=logger).validate(module, DataLoader(ROWS, collate_fn=list), verbose=False)
    assert callback.monitor.probes == 1
    logger.finalize("success")
    assert "odp/alignment/answer/all" in scalars(logger.log_dir)


def test_questions_from_the_current_batch() -> None:
    callback = make_callback(prompts=None)
    make_trainer(callback, max_steps=2).fit(make_module(), loader())
    assert callback.last_report is not None
    assert len({r.question for r in callback.last_report.rollouts}) == 2


def test_every_question_comes_once_before_any_comes_twice() -> None:
    callback = make_callback(questions_per_probe=1)
    seen = [callback.monitor.next_rows(None, Processes())[0][0] for _ in range(8)]
    assert sorted(seen[:4]) == sorted(seen[4:]) == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
def test_resumed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    def fit(callback: Any, steps: int, checkpoint: Path | None = None) -> Trainer:
        seed_everything(1, verbose=False)
        trainer = make_trainer(callback, max_steps=steps, max_epochs=100)
        trainer.fit(make_module(), loader(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return trainer

    whole = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(whole, 9)
    first = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(first, 5).save_checkpoint(tmp_path / "half.ckpt")
    second = make_callback(every_n_steps=3, teachers={"ema": EMATeacher(0.5)})
    fit(second, 9, tmp_path / "half.ckpt")
    assert second.monitor.probes == whole.monitor.probes == 3
    assert second.monitor.order == whole.monitor.order
    assert torch.equal(second.monitor.stream.get_state(), whole.monitor.stream.get_state())
    assert second.teachers["ema"].average.keys() == whole.teachers["ema"].average.keys()
    assert second.teachers["ema"].step == 9


def test_a_second_run_with_the_same_callback_is_probed_like_the_first() -> None:
    callback = make_callback(every_n_steps=3)
    for probes in (1, 2):
        make_trainer(callback, max_steps=4).fit(make_module(), loader())
        assert callback.monitor.probes == probes


class Nested(LightningModule):
    """A user's own module, with the student somewhere inside and no tokenizer."""

    def __init__(self, students: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"s{i}": tiny("gpt2").float().train() for i in range(students)})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = torch.tensor([[1, 7, 8, 9]])
        return sum(part(input_ids=ids, labels=ids).loss for part in self.parts.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("student", [None, "parts.s0", lambda module: module.parts["s0"]])
def test_it_finds_the_student_in_any_module(student: Any) -> None:
    callback = make_callback(student=student, tokenizer=word_tokenizer())
    make_trainer(callback, max_steps=2).fit(Nested(), loader())
    assert callback.monitor.probes == 1


def refuse(match: str, module: LightningModule | None = None, **changes: Any) -> None:
    """The error comes before the first training step."""
    module = module or make_module()
    steps = []
    module.on_train_batch_start = lambda *_: steps.append(1)  # type: ignore[method-assign]

    def attach() -> None:
        make_trainer(make_callback(**changes)).fit(module, loader())

    with pytest.raises((ValueError, TypeError), match=match):
        attach()
    assert not steps


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("`every_n_steps` must be a positive integer, but 0", {"every_n_steps": 0}),
        ("`questions_per_probe`", {"questions_per_probe": -1}),
        ("`confidence`", {"confidence": 1.0}),
        ("`teachers` is empty", {"teachers": {}}),
        ("no '/'", {"teachers": {"a/b": BaseTeacher()}}),
        ("unknown argument 'max_tokens'", {"max_tokens": 3}),
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
    refuse(match, **changes)


def test_a_module_without_or_with_several_students_is_refused() -> None:
    refuse("`student` must be one peft model, but 0", Nested(0), tokenizer=word_tokenizer())
    refuse("`student` must be one peft model, but 2", Nested(2), tokenizer=word_tokenizer())
    refuse("no such submodule", student="model.student")
    refuse("`tokenizer` was not given", Nested())


def test_a_failing_verifier_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    def fails_later(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        if any(completions):
            raise ConnectionError("no verifier today")
        return [0.0] * len(prompts)

    logger = TensorBoardLogger(str(tmp_path))
    trainer = make_trainer(make_callback(reward=fails_later, strict=False), max_steps=6, logger=logger, max_epochs=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(reward=None), loader())
    assert trainer.global_step == 6
    said = [str(w.message) for w in caught if "no verifier today" in str(w.message)]
    assert len(said) == 1
    logger.finalize("success")
    assert all(np.isnan(v) for _, v in scalars(logger.log_dir)["odp/alignment/answer/all"])
    with pytest.raises(ConnectionError, match="no verifier today"):
        make_trainer(make_callback(reward=fails_later)).fit(make_module(reward=None), loader())


def test_a_constant_reward_is_said_once_and_gives_nan(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    callback = make_callback(reward=lambda prompts, completions, **_: [0.0] * len(prompts))
    with pytest.warns(UserWarning, match=r"gave 0\.0 to every rollout") as caught:
        make_trainer(callback, logger=logger).fit(make_module(), loader())
    assert len([w for w in caught if "to every rollout" in str(w.message)]) == 1
    logger.finalize("success")
    logged = scalars(logger.log_dir)
    assert all(np.isnan(v) for _, v in logged["odp/alignment/answer/all"])
    assert [v for _, v in logged["odp/undefined_share/base/all"]]
    assert all(np.isnan(v) for _, v in logged["odp/alignment/answer/correct"])
    for figure in ("predicted_gain", "teacher_advantage", "predicted_gain_low"):
        assert all(np.isnan(v) for _, v in logged[f"odp/{figure}/answer/all"])


def test_the_free_mode_looks_at_the_trainings_own_rollouts_at_every_step(tmp_path: Path) -> None:
    callback = make_callback(every_n_steps=100, free_every_n_steps=1)
    logger = CSVLogger(tmp_path)
    module = make_module(rollouts_per_prompt=2)
    make_trainer(callback, logger=logger).fit(module, loader())
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    column = names.index("odp/free/predicted_gain/answer")
    assert sum(row[column] != "" for row in rows) == 4
    assert len(module.last_rollouts) == 4
    assert not any(name.startswith("odp/alignment") for name in names)


def test_the_free_mode_needs_the_rollouts() -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tokenizer = tiny("llama").float(), word_tokenizer()

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="`free_every_n_steps` was given, but Other has no `last_rollouts`"):
        make_trainer(make_callback(free_every_n_steps=1)).fit(Other(), loader())


def test_records_are_kept_of_every_probe(tmp_path: Path) -> None:
    callback = make_callback(records=tmp_path / "records")
    make_trainer(callback).fit(make_module(), loader())
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == ["step-00000002", "step-00000004"]
    report = load(tmp_path / "records" / "step-00000004")
    assert callback.last_report is not None
    assert report.rollouts == callback.last_report.rollouts


def test_a_folder_that_cannot_be_written_is_said_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(make_callback(records=tmp_path / "file" / "below", strict=False))
    with pytest.warns(UserWarning, match="records of a probe were not kept"):
        trainer.fit(make_module(), loader())
    assert trainer.global_step == 4


def tensors() -> list[tuple[int, ...]]:
    """Shapes of all that are alive, but for logged numbers."""
    gc.collect()
    return [tuple(x.shape) for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.dim()]


def test_no_tensor_of_a_probe_is_left(tmp_path):
    """Counted before and after a probe in the middle of a training run; the records hold arrays only."""
    counts: list[tuple[int, int]] = []
    callback = make_callback(every_n_steps=100, budget=60, free_every_n_steps=1)
    run = callback.monitor.run

    class Probing(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            callback._prepare(trainer.lightning_module)
            run(callback.host(trainer), None)  # whatever is set up once is there now
            before = tensors()
            run(callback.host(trainer), None)
            counts.append((len(before), len(tensors())))

    make_trainer(max_steps=3, callbacks=[Probing(), callback]).fit(make_module(), loader())
    assert len(counts) == 3
    assert callback.last_report is not None
    assert all(before == after for before, after in counts)


def test_probes_that_would_exceed_the_overhead_are_left_out(tmp_path, capsys):
    """Here a probe takes many times what a step takes, so the first one uses up the share of the whole run."""
    logger = CSVLogger(tmp_path)
    callback = make_callback(every_n_steps=1, max_overhead=0.2)
    trainer = make_trainer(callback, max_steps=6, max_epochs=100, logger=logger)
    trainer.fit(make_module(), loader())
    assert 1 <= callback.monitor.probes < 6
    assert callback.monitor.time_budget.skipped == 6 - callback.monitor.probes
    everything = make_callback(every_n_steps=1)
    make_trainer(everything, max_steps=6, max_epochs=100).fit(make_module(), loader())
    assert everything.monitor.probes == 6


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_an_overhead_that_is_no_share(share):
    with pytest.raises(ValueError, match=r"`max_overhead` must lie in \(0, 1\) or be None"):
        make_callback(max_overhead=share)


class Picky(CSVLogger):
    """A logger that refuses some names, as MLflow refuses brackets."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any("(" in name for name in metrics):
            raise ValueError("invalid metric name")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_costs_no_run_and_no_other_logger(tmp_path: Path) -> None:
    callback = make_callback(teachers={"large (7B)": BaseTeacher()}, strict=False)
    kept = CSVLogger(tmp_path, name="kept")
    trainer = make_trainer(callback, logger=[Picky(tmp_path, name="picky"), kept])
    with pytest.warns(UserWarning, match="Picky took no figures: ValueError: invalid metric name") as told:
        trainer.fit(make_module(), loader())
    assert trainer.global_step == 4
    assert sum("took no figures" in str(one.message) for one in told) == 1
    kept.save()
    assert "odp/predicted_gain/large (7B)/all" in (Path(kept.log_dir) / "metrics.csv").read_text()
    strict = make_callback(teachers={"large (7B)": BaseTeacher()})
    with pytest.raises(ValueError, match="invalid metric name"):
        make_trainer(strict, logger=[Picky(tmp_path, name="strict")]).fit(make_module(), loader())
