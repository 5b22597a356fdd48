"""The step that training took, followed through real trainings of a tiny student."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import Tensor

from odp_callbacks import OnPolicyDistillation, Teacher, TrainingRollout
from odp_callbacks.analysis.run_curve import run_curve
from odp_callbacks.callbacks.step_gain import MAXIMUM_POINTS
from odp_callbacks.functional import lora_parameters
from odp_callbacks.storage import load, record_folders
from tests.helpers.models import randomise, tiny, word_tokenizer
from tests.helpers.training import (
    ManualOptimization,
    contains_answer_reward,
    end_state,
    make_callback,
    make_loader,
    make_module,
    make_trainer,
    states_equal,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
)
Logged = list[tuple[int, dict[str, float]]]


def quiet_callback(**changes: Any) -> Any:
    """A callback that does not probe."""
    return make_callback(**{"every_n_steps": 1000, "prompts": None, **changes})


def train(
    callback: Any, module: Any = None, *others: Callback, ckpt_path: Any = None, **changes: Any
) -> tuple[Trainer, Logged]:
    """Train, and return the trainer, and the figures of steps with the steps at which they were logged."""
    logged: Logged = []
    log = callback._log

    def recording_log(trainer: Trainer, metrics: dict[str, float], report: Any) -> None:
        figures = {name.removeprefix("odp/step/"): v for name, v in metrics.items() if name.startswith("odp/step/")}
        if figures:
            logged.append((trainer.global_step, figures))
        log(trainer, metrics, report)

    callback._log = recording_log
    module = module or make_module(rollouts_per_question=4)
    trainer = make_trainer(callback, **{"max_steps": 4, "max_epochs": 100, **changes})
    trainer.callbacks = [*others, *trainer.callbacks]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="odp-callbacks: the run ended without a probe")
        trainer.fit(module, make_loader(), ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, logged


def fit(*arguments: Any, **options: Any) -> Logged:
    return train(*arguments, **options)[1]


class Recorder(Callback):
    """Keeps the parameters from which each batch was sampled, and the rollouts."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []
        self.rollouts: list[list[TrainingRollout]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        values = lora_parameters(pl_module.student)
        self.parameters.append({name: value.detach().clone() for name, value in values.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.rollouts.append(list(pl_module.last_rollouts))


def log_probability(module: Any, parameters: dict[str, Tensor], rollout: TrainingRollout) -> float:
    """By a plain forward pass in float64 with these parameters."""
    student = tiny("llama").double().eval()
    for name, value in lora_parameters(student).items():
        value.data.copy_(parameters[name])
    prompt = module.tokenizer(rollout.row["prompt"])["input_ids"]
    ids = torch.tensor([[*prompt, *rollout.response_ids]])
    with torch.no_grad():
        logits = student(input_ids=ids).logits[0, len(prompt) - 1 : -1] / module.temperature
    chosen = torch.tensor(rollout.response_ids)[:, None]
    return float(torch.log_softmax(logits, dim=-1).gather(-1, chosen).sum())


def plain_gain(module: Any, rollouts: list[TrainingRollout], after: Any, before: Any) -> float:
    gains = []
    for rollout in rollouts:
        siblings = [o.reward for o in rollouts if o.row is rollout.row and o is not rollout]
        difference = log_probability(module, after, rollout) - log_probability(module, before, rollout)
        gains.append((rollout.reward - sum(siblings) / len(siblings)) * difference)  # type: ignore[operator]
    return sum(gains) / len(gains)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_gain_is_of_the_step_before_the_batch(temperature: float) -> None:
    seed_everything(1, verbose=False)
    recorder, module = Recorder(), make_module(rollouts_per_question=4, temperature=temperature)
    logged = fit(quiet_callback(), module, recorder)
    assert [step for step, _ in logged] == [2, 3, 4], "the first batch has no step before it"
    first_reward = sum(rollout.reward for rollout in recorder.rollouts[0]) / 8  # type: ignore[misc]
    expected_sum = 0.0
    for step, figures in logged:
        rollouts = recorder.rollouts[step - 1]
        expected = plain_gain(module, rollouts, recorder.parameters[step - 1], recorder.parameters[step - 2])
        expected_sum += expected
        reward = sum(rollout.reward for rollout in rollouts) / 8  # type: ignore[misc]
        assert figures["gain"] == pytest.approx(expected, abs=1e-5)
        assert figures["gain_sum"] == pytest.approx(expected_sum, abs=1e-5)
        assert figures["reward"] == pytest.approx(reward)
        assert figures["reward_change"] == pytest.approx(reward - first_reward)
        assert figures["gain_sum_low"] <= figures["gain_sum"] <= figures["gain_sum_high"]
        assert figures["steps"] == 1
    assert any(abs(figures["gain"]) > 1e-3 for _, figures in logged)


def test_loggers_and_other_callbacks_see_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, logged = train(quiet_callback(), logger=logger)
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    shown = trainer.callback_metrics
    for name in ("gain", "gain_sum", "reward", "reward_change"):
        assert (f"odp/step/{name}" in header) == (name != "reward_change"), "TensorBoard alone draws the change"
        assert float(shown[f"odp/step/{name}"]) == pytest.approx(logged[-1][1][name], abs=1e-6)


def test_records_of_the_probes_keep_the_curves(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    _, logged = train(make_callback(every_n_steps=3, prompts=None, records=tmp_path), max_steps=7)
    reports = [load(folder) for folder in record_folders(tmp_path)]
    curve = run_curve(reports)
    assert curve is not None
    assert curve.probe_steps.tolist() == [3, 6]
    before_the_last_probe = [(step, figures) for step, figures in logged if step < 6]
    # What is logged at a step is of the parameters before it.
    assert curve.steps.tolist() == [step - 1 for step, _ in before_the_last_probe]
    for column in ("gain_sum", "reward_change"):
        expected = [figures[column] for _, figures in before_the_last_probe]
        assert getattr(curve, column).tolist() == pytest.approx(expected)


def test_points_without_a_record_are_thinned() -> None:
    step_gain = quiet_callback().monitor.step_gain
    for step in range(2 * MAXIMUM_POINTS):
        step_gain._keep_point({"step": float(step)})
    assert len(step_gain.points) <= MAXIMUM_POINTS
    assert step_gain.take_points()[-1]["step"] == 2 * MAXIMUM_POINTS - 1
    assert step_gain.points == []


def test_a_figure_every_n_steps_is_of_all_steps_since_the_last() -> None:
    seed_everything(1, verbose=False)
    recorder, module = Recorder(), make_module(rollouts_per_question=4)
    logged = fit(quiet_callback(step_gain_every_n_steps=3), module, recorder, max_steps=7)
    assert [(step, figures["steps"]) for step, figures in logged] == [(3, 2), (6, 3)]
    expected = plain_gain(module, recorder.rollouts[5], recorder.parameters[5], recorder.parameters[2])
    assert logged[1][1]["gain"] == pytest.approx(expected, abs=1e-5)


def forwards_of(callback: Any, module: Any, **changes: Any) -> list[tuple[int, int]]:
    """Sizes of the batches that went through the student's first layer in evaluation mode and outside sampling."""
    seen: list[tuple[int, int]] = []
    layer = module.student.get_base_model().model.layers[0]
    measure = callback.monitor.step_gain.follow

    def counting(*arguments: Any, **options: Any) -> Any:
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        try:
            return measure(*arguments, **options)
        finally:
            handle.remove()

    callback.monitor.step_gain.follow = counting
    fit(callback, module, **changes)
    return [shape for shape in seen if shape not in ((2, 3), (1, 2))]  # not the trials of a new model


def test_a_step_takes_one_forward_pass() -> None:
    seen = forwards_of(quiet_callback(), make_module(rollouts_per_question=4), max_steps=6)
    assert len(seen) == 6  # at the first batch it compares the training's log-probabilities with the student's
    assert all(rows == 8 for rows, _ in seen)


def test_without_log_probabilities_it_takes_two() -> None:
    module = make_module(rollouts_per_question=4, dropout=0.1)
    seen = forwards_of(quiet_callback(), module, max_steps=4)
    assert all(rollout.log_probs is None for rollout in module.last_rollouts)
    assert len(seen) == 2 * 3


class WithOtherLogProbs(OnPolicyDistillation):
    """Its log-probabilities are not those of the student."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last_rollouts = [
            replace(rollout, log_probs=[p - 0.5 for p in rollout.log_probs or ()]) for rollout in self.last_rollouts
        ]
        return loss


def other_module(kind: type[OnPolicyDistillation], **changes: Any) -> OnPolicyDistillation:
    options = {"max_new_tokens": 5, "learning_rate": 1e-2, "reward": contains_answer_reward, "rollouts_per_question": 4}
    student = tiny("llama").float().train()
    return kind(student, word_tokenizer(), Teacher("{answer} {prompt}"), **(options | changes))


def test_log_probabilities_that_are_not_the_student_s_are_noticed() -> None:
    seed_everything(1, verbose=False)
    expected = fit(quiet_callback())
    seed_everything(1, verbose=False)
    with pytest.warns(UserWarning, match=r"differ by 0\.5 nats per token") as caught:
        logged = fit(quiet_callback(), other_module(WithOtherLogProbs))
    assert len([warning for warning in caught if "nats per token" in str(warning.message)]) == 1
    for (_, figures), (_, right) in zip(logged, expected, strict=True):
        assert figures["gain"] == pytest.approx(right["gain"], abs=1e-6)


def test_all_batches_of_an_optimizer_step_count() -> None:
    seed_everything(1, verbose=False)
    recorder, module = Recorder(), make_module(rollouts_per_question=4)
    logged = fit(quiet_callback(), module, recorder, accumulate_grad_batches=2, max_steps=3)
    assert [step for step, _ in logged] == [2, 3]
    rollouts = recorder.rollouts[2] + recorder.rollouts[3]
    expected = plain_gain(module, rollouts, recorder.parameters[2], recorder.parameters[0])
    assert logged[0][1]["gain"] == pytest.approx(expected, abs=1e-5)


class TwoOptimizers(ManualOptimization):
    """Two optimizer steps in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.last_rollouts = self._training_rollouts(self.score_again(batch), None)

    def score_again(self, batch: Any) -> Any:
        return self.sample(batch)


def test_several_optimizer_steps_in_a_batch_are_one_move() -> None:
    logged = fit(quiet_callback(), other_module(TwoOptimizers), max_steps=8)
    assert [(step, figures["steps"]) for step, figures in logged] == [(4, 2), (6, 2), (8, 2)]


def test_rollouts_without_reward_are_scored_if_the_training_s_rollouts_are_measured_anyway() -> None:
    calls: list[int] = []

    def counting_reward(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
        calls.append(len(completions))
        return contains_answer_reward(prompts, completions, answer)

    assert fit(quiet_callback(reward=counting_reward), make_module(reward=None, rollouts_per_question=4)) == []
    assert not calls
    callback = quiet_callback(reward=counting_reward, update_every_n_steps=2)
    logged = fit(callback, make_module(reward=None, rollouts_per_question=4))
    assert [step for step, figures in logged if "gain" in figures] == [2, 3, 4]
    assert sum(calls) == 4 * 8, "each rollout once, also at the steps that both figures are measured at"


def test_rollouts_whose_reward_failed_are_left_out() -> None:
    def sometimes_none(prompts: Any, completions: list[str], answer: list[str]) -> list[float | None]:
        rewards = contains_answer_reward(prompts, completions, answer)
        return [None if i % 4 == 0 else reward for i, reward in enumerate(rewards)]

    def always_none(prompts: Any, completions: list[str], answer: list[str]) -> list[None]:
        return [None] * len(completions)

    logged = fit(quiet_callback(), make_module(reward=sometimes_none, rollouts_per_question=4))
    assert [step for step, _ in logged] == [2, 3, 4]
    assert all(math.isfinite(value) for _, figures in logged for value in figures.values())
    assert fit(quiet_callback(), make_module(reward=always_none, rollouts_per_question=4)) == []


def test_rollouts_that_a_module_did_not_replace_are_not_measured_twice() -> None:
    class EverySecond(OnPolicyDistillation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = self.last_rollouts
            loss = super().training_step(batch, batch_idx)
            if self.global_step % 2:
                self.last_rollouts = before
            return loss

    logged = fit(quiet_callback(), other_module(EverySecond), max_steps=6)
    assert [(step, figures["steps"]) for step, figures in logged] == [(3, 2), (5, 2)]


def test_rollouts_that_several_batches_of_a_step_share_count_once() -> None:
    """Counted twice, a rollout would be a sibling of itself, and half of its advantage would be gone."""

    class EverySecondBatch(OnPolicyDistillation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = self.last_rollouts
            loss = super().training_step(batch, batch_idx)
            if batch_idx % 2:
                self.last_rollouts = before
            return loss

    seed_everything(1, verbose=False)
    recorder, module = Recorder(), other_module(EverySecondBatch)
    logged = fit(quiet_callback(), module, recorder, accumulate_grad_batches=2, max_steps=3)
    assert [step for step, _ in logged] == [2, 3]
    for step, figures in logged:
        last = 2 * step - 1
        before = recorder.parameters[last - 2]
        expected = plain_gain(module, recorder.rollouts[last], recorder.parameters[last], before)
        assert figures["gain"] == pytest.approx(expected, abs=1e-5)


def test_a_run_that_is_resumed_goes_on_with_its_sum(tmp_path: Path) -> None:
    trainer, logged = train(quiet_callback(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    later = fit(quiet_callback(), max_steps=6, ckpt_path=tmp_path / "three.ckpt")
    assert [step for step, _ in later] == [5, 6]
    _, figures = later[0]
    assert figures["gain_sum"] == pytest.approx(logged[-1][1]["gain_sum"] + figures["gain"])
    first_reward = logged[0][1]["reward"] - logged[0][1]["reward_change"]
    assert figures["reward"] - figures["reward_change"] == pytest.approx(first_reward)


def test_another_run_starts_at_0_and_without_the_directions_of_the_last_one() -> None:
    callback, module = quiet_callback(update_every_n_steps=3, max_new_tokens=5), make_module(rollouts_per_question=4)
    fit(callback, module)
    assert callback.monitor.step_gain.directions
    logged = fit(callback, module)
    figures = dict(logged)
    assert figures[2]["gain_sum"] == figures[2]["gain"]
    assert [step for step, of_step in logged if "cosine/answer" in of_step] == [3, 4]


def test_a_student_whose_adapter_is_replaced_starts_anew() -> None:
    class Replacing(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # peft's own, about the active adapter
                    pl_module.student.delete_adapter("default")
                pl_module.student.add_adapter("default", LoraConfig(r=3, target_modules=["v_proj"]))
                pl_module.student.set_adapter("default")
                randomise(pl_module.student, "default", 0.3, 1).float()

    logged = fit(quiet_callback(), None, Replacing(), max_steps=7)
    assert [step for step, _ in logged] == [2, 3, 6, 7]
    assert logged[2][1]["gain_sum"] == logged[2][1]["gain"]


def test_it_can_be_left_out() -> None:
    callback = quiet_callback(step_gain_every_n_steps=None)
    assert fit(callback) == []
    assert callback.monitor.step_gain._sampled is None


def test_it_keeps_to_the_overhead() -> None:
    """A tiny step takes about as long as its measurement; a hundredth of the time allows none but the first."""
    callback = quiet_callback(max_overhead=0.01)
    logged = fit(callback, max_steps=8)
    assert len(logged) < 4
    budget = callback.monitor.time_budget
    assert budget.probe_seconds == pytest.approx(callback.monitor.step_gain.seconds)


def test_a_failure_is_warned_about_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no forward today")

    monkeypatch.setattr("odp_callbacks.callbacks.batch_gains.response_log_probs", fail)
    with pytest.warns(UserWarning, match="the step that training took was not measured") as caught:
        assert fit(quiet_callback(strict=False)) == []
    assert len([warning for warning in caught if "no forward today" in str(warning.message)]) == 1
    with pytest.raises(RuntimeError, match="no forward today"):
        fit(quiet_callback(strict=True))


# --- the cosine with the teachers' updates


def test_the_cosine_is_that_of_the_last_step_and_the_last_measured_update() -> None:
    seed_everything(1, verbose=False)
    recorder, module = Recorder(), make_module(rollouts_per_question=4)
    callback = quiet_callback(update_every_n_steps=1, max_new_tokens=5)
    logged = fit(callback, module, recorder, max_steps=4)
    assert all({"cosine/answer", "cosine/base"} <= figures.keys() for _, figures in logged)
    after = lora_parameters(module.student)
    step = torch.cat([(after[name].detach() - value).flatten() for name, value in recorder.parameters[3].items()])
    direction = callback.monitor.step_gain.directions["answer"]
    expected = torch.nn.functional.cosine_similarity(step, direction, dim=0)
    assert logged[-1][1]["cosine/answer"] == pytest.approx(float(expected), abs=1e-5)
    assert logged[-1][1]["cosine/answer"] > 0.2, "the teacher that is distilled"


@pytest.mark.filterwarnings("ignore:odp-callbacks. `reward` gave 0.0 to every rollout:UserWarning")
def test_the_cosine_needs_no_rollouts_of_the_training() -> None:
    class Hiding(OnPolicyDistillation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            del self.last_rollouts
            return loss

    callback = make_callback(every_n_steps=2, budget=0, questions_per_probe=3)
    logged = fit(callback, other_module(Hiding))
    assert [(step, sorted(figures)) for step, figures in logged] == [
        (step, ["cosine/answer", "cosine/base"]) for step in (2, 3, 4)
    ]


# --- the training is not changed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"precision": "bf16-true", "dropout": 0.2},
        {"precision": "32-true", "dropout": 0.2, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_training_ends_in_the_same_bits(options: dict[str, Any]) -> None:
    def run(callback: Any) -> tuple[Any, ...]:
        seed_everything(3, verbose=False)
        changes = dict(options)
        module = make_module(rollouts_per_question=2, dropout=changes.pop("dropout", 0.0))
        trainer = make_trainer(callback, max_steps=4, max_epochs=100, **changes)
        trainer.fit(module, make_loader())
        return end_state(trainer)

    callback = quiet_callback()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="odp-callbacks: the run ended without a probe")
        with_callback = run(callback)
    assert callback.monitor.step_gain.seconds > 0
    assert callback.monitor.step_gain._reference is not None
    equal = [states_equal(part, expected) for part, expected in zip(with_callback, run(None), strict=True)]
    assert equal == [True] * len(equal)
