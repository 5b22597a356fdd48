"""The rollouts that TRL's trainers sample for their own training, and their update gain."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from odp_callbacks import BaseTeacher, IncorrectRolloutGate, Teacher, gate_trainer
from odp_callbacks.callbacks.trl_rollouts import RECORDERS, rollout_recorder, sampling_options, truncated_sampling
from odp_callbacks.engine.training_rollouts import TrainingRollout
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import word_tokenizer
from tests.helpers.trainers import add_callback, plain_trainer, sft_trainer, trainer_end_state
from tests.helpers.training import ROWS
from tests.helpers.trl_trainers import (
    MESSAGE_ROWS,
    SAMPLING_TRAINERS,
    distillation_trainer,
    gkd_trainer,
    grpo_trainer,
    length_reward,
    sdpo_trainer,
    student,
    words_reward,
)
from tests.helpers.two_processes import run_in_two_processes

pytestmark = [
    # Issued by transformers and TRL themselves.
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
]
FAST = ("DistillationTrainer", "GKDTrainer", "GRPOTrainer")
EACH_TRAINER = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SAMPLING_TRAINERS]
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def watch(trainer: Any, **changes: Any) -> Any:
    """Add a callback that measures the training's rollouts after every step, and nothing else."""
    options = {
        "prompts": MESSAGE_ROWS,
        "reward": words_reward,
        "every_n_steps": 1000,
        "update_every_n_steps": 1,
        "step_gain_every_n_steps": None,
    }
    return add_callback(trainer, **(options | changes))


class RolloutLog(TrainerCallback):  # type: ignore[misc]
    """Keeps what a callback would measure after each step."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.rollouts_of_step = callback, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollouts_of_step[state.global_step] = self.callback.rollouts()


def log_rollouts(trainer: Any, **changes: Any) -> dict[int, list[TrainingRollout]]:
    """Train with a callback; the rollouts that it had after each step."""
    log = RolloutLog(watch(trainer, **changes))
    trainer.add_callback(log)
    trainer.train()
    return log.rollouts_of_step


def own_state(trainer: Any) -> dict[str, Any]:
    """The trainer's state, with only what the trainer itself logged."""
    state = {name: value for name, value in vars(trainer.state).items() if name != "stateful_callbacks"}
    entries = [
        {name: value for name, value in entry.items() if not name.startswith("odp/") and name not in TIMES}
        for entry in state.pop("log_history")
    ]
    return {**state, "own log": [entry for entry in entries if entry.keys() > {"step", "epoch"}]}


def measured_steps(trainer: Any) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "odp/training/questions" in entry]


@pytest.mark.parametrize("name", EACH_TRAINER)
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"gradient_accumulation_steps": 2, "bf16": True}, marks=pytest.mark.slow)],
    ids=["plain", "accumulation and bf16"],
)
def test_training_is_the_same_with_and_without_the_callback(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    end_states, states, attributes = [], [], []
    for watched in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        trainer = SAMPLING_TRAINERS[name](tmp_path, dropout=0.2, **changes)
        if watched:
            watch(trainer)
        trainer.train()
        end_states.append(trainer_end_state(trainer))
        states.append(own_state(trainer))
        attributes.append(vars(trainer).keys())
    assert measured_steps(trainer) == [1, 2, 3, 4]
    assert end_states[0].keys() == end_states[1].keys()
    for entry, value in end_states[0].items():
        assert torch.equal(value, end_states[1][entry]), entry
    assert str(states[0]) == str(states[1])
    assert attributes[0] == attributes[1], "the hooks are gone"


def test_every_trainer_of_the_table_is_tested() -> None:
    assert RECORDERS.keys() <= SAMPLING_TRAINERS.keys()


@pytest.mark.parametrize("name", EACH_TRAINER)
def test_rollouts_are_those_that_the_training_is_computed_on(name: str, tmp_path: Path) -> None:
    """Compared with the token ids that the student's own forward passes see in the training step."""
    trainer = SAMPLING_TRAINERS[name](tmp_path, max_steps=2)
    seen: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set()}

    def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and model.training:
            for token_ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
                seen[trainer.state.global_step + 1].add(tuple(token_ids[mask.bool()].tolist()))

    decoder = trainer.model.get_base_model().model  # TRL's DistillationTrainer calls it without the head
    hook = decoder.register_forward_pre_hook(observe, with_kwargs=True)
    rollouts_of_step = log_rollouts(trainer)
    hook.remove()
    tokenizer = word_tokenizer()
    for step, rollouts in rollouts_of_step.items():
        assert rollouts
        for rollout in rollouts:
            prompt = rollout.row["prompt"]
            if isinstance(prompt, str):
                prompt_ids = tokenizer(prompt)["input_ids"]
            else:
                prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            assert (*prompt_ids, *rollout.response_ids) in seen[step]
            assert rollout.row["answer"] in "abcd"
        assert len({(str(rollout.row), tuple(rollout.response_ids)) for rollout in rollouts}) == len(seen[step])


def rewarded(texts: Any, calls: list[Any]) -> Any:
    def reward(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **columns: Any) -> Any:
        values = texts(prompts, completions)
        for entry in zip(prompts, completion_ids, values, strict=True):
            calls.append((trainer_state.global_step, *entry))
        return values

    reward.__name__ = texts.__name__
    return reward


@pytest.mark.parametrize("make_trainer", [grpo_trainer, pytest.param(sdpo_trainer, marks=pytest.mark.slow)])
def test_rewards_are_the_weighted_sum_of_the_trainer_s_and_are_not_computed_again(
    make_trainer: Any, tmp_path: Path
) -> None:
    def unwanted(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert set(completions) <= {""}, "only the check before the training calls the callback's reward"
        return [0.0] * len(completions)

    words, lengths = [], []
    rewards = [rewarded(words_reward, words), rewarded(length_reward, lengths)]
    trainer = make_trainer(tmp_path, rewards=rewards, reward_weights=[0.5, 3.0])
    prompts = ROWS if make_trainer is grpo_trainer else MESSAGE_ROWS

    def verifier(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        return unwanted(prompts, texts)

    for step, rollouts in log_rollouts(trainer, reward=verifier, prompts=prompts).items():
        expected = [
            (prompt, tuple(token_ids), 0.5 * first + 3 * (second or 0))
            for (at, prompt, token_ids, first), (_, _, _, second) in zip(words, lengths, strict=True)
            if at == step - 1
        ]
        assert [(one.row["prompt"], tuple(one.response_ids), one.reward) for one in rollouts] == expected
        assert [one.row["prompt"] for one in rollouts[::2]] == [one.row["prompt"] for one in rollouts[1::2]]
        assert all(first.row is second.row for first, second in zip(rollouts[::2], rollouts[1::2], strict=True))
    assert measured_steps(trainer) == [1, 2, 3, 4]


def test_completions_without_any_reward_are_left_out(tmp_path: Path) -> None:
    calls: list[Any] = []
    trainer = grpo_trainer(tmp_path, rewards=rewarded(length_reward, calls))
    rollouts_of_step = log_rollouts(trainer, prompts=ROWS)
    rewards = [rollout.reward for rollouts in rollouts_of_step.values() for rollout in rollouts]
    assert any(np.isnan(reward) for reward in rewards)
    assert [str(reward) for reward in rewards] == [str(float("nan" if call[3] is None else call[3])) for call in calls]
    for entry in trainer.state.log_history:
        if "odp/training/success_rate" in entry:
            scored = [one.reward for one in rollouts_of_step[entry["step"]] if not np.isnan(one.reward)]
            assert scored
            assert entry["odp/training/success_rate"] == pytest.approx(np.mean(scored)), "also above 1"


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Keeps a copy of the student after each step."""

    def __init__(self) -> None:
        self.student_of_step: dict[int, nn.Module] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        copied = student()  # TRL ties the forward method to the model, so that a copy would run the original
        copied.load_state_dict(model.state_dict())
        self.student_of_step[state.global_step] = copied.double().eval()


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([one.flatten() for one in torch.autograd.grad(value, list(lora_parameters(model).values()))])


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
def test_update_gain_is_that_of_autograd_for_rewards_of_any_range(temperature: float, tmp_path: Path) -> None:
    """The teacher is the base model, and the loss is the reverse KL divergence; rewards are numbers of words."""
    calls: list[Any] = []
    snapshots = Snapshots()
    trainer = grpo_trainer(
        tmp_path,
        rewards=rewarded(lambda prompts, completions: [3.0 * len(one.split()) - 5 for one in completions], calls),
        per_device_train_batch_size=8,
        num_generations=2,
        temperature=temperature,
    )
    trainer.add_callback(snapshots)
    watch(trainer, prompts=ROWS, teachers={"base": BaseTeacher()})
    trainer.train()
    tokenizer = word_tokenizer()
    for step, snapshot in snapshots.student_of_step.items():
        questions: dict[str, list[Any]] = {}
        for _, prompt, token_ids, reward in (call for call in calls if call[0] == step - 1):
            questions.setdefault(prompt, []).append((token_ids, reward))
        success, directions, correct_directions = [], [], []
        for prompt, rollouts in questions.items():
            prompt_ids = tokenizer(prompt)["input_ids"]
            own_success, own_directions = 0, {True: 0, False: 0}
            for token_ids, reward in rollouts:
                sequence = torch.tensor([[*prompt_ids, *token_ids]])
                start = len(prompt_ids) - 1
                with torch.no_grad(), snapshot.disable_adapter():
                    teacher = snapshot(input_ids=sequence).logits[0, start:-1] / temperature
                log_policy = (snapshot(input_ids=sequence).logits[0, start:-1] / temperature).log_softmax(-1)
                others = [value for _, value in rollouts]
                baseline = (sum(others) - reward) / (len(others) - 1)
                chosen = log_policy[range(len(token_ids)), token_ids].sum()
                own_success += (reward - baseline) / len(rollouts) * gradient(snapshot, chosen)
                log_policy = (snapshot(input_ids=sequence).logits[0, start:-1] / temperature).log_softmax(-1)
                divergence = (log_policy.exp() * (log_policy - teacher.log_softmax(-1))).sum()
                own_directions[reward >= 1] += -gradient(snapshot, divergence)
            success.append(own_success)
            directions.append(own_directions[True] + own_directions[False])
            correct_directions.append(own_directions[True])
        (entry,) = (
            one
            for one in trainer.state.log_history
            if one["step"] == step and "odp/training/update_gain/base/all" in one
        )
        assert len(success) == 4
        total = sum(directions)
        gains = [g @ (total - own) / (total - own).norm() for g, own in zip(success, directions, strict=True)]
        expected = float(torch.stack(gains).mean())
        assert entry["odp/training/update_gain/base/all"] == pytest.approx(expected, rel=2e-3, abs=1e-4), step


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_iterations": 2}, [1, 3]),
        pytest.param({"steps_per_generation": 2}, [1, 3], marks=pytest.mark.slow),
        pytest.param(
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1}, [1, 2, 3, 4], marks=pytest.mark.slow
        ),
    ],
    ids=["iterations", "buffer of two steps", "two generations a step"],
)
def test_only_rollouts_of_the_present_student_are_measured(
    options: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    calls: list[Any] = []
    trainer = grpo_trainer(tmp_path, rewards=rewarded(words_reward, calls), **options)
    rollouts_of_step = log_rollouts(trainer, prompts=ROWS)
    assert measured_steps(trainer) == steps
    for step, rollouts in rollouts_of_step.items():
        sampled_now = [call for call in calls if call[0] == step - 1]
        assert [tuple(one.response_ids) for one in rollouts] == [tuple(call[2]) for call in sampled_now]
        assert bool(rollouts) == (step in steps)


def test_a_measurement_that_finds_no_new_rollouts_waits_for_the_next(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, num_iterations=2, max_steps=6)
    watch(trainer, prompts=ROWS, update_every_n_steps=2)
    trainer.train()
    assert measured_steps(trainer) == [3, 5], "due after 2 and 4 steps; after 6, the training is over"


def test_evaluations_between_steps_do_not_count(tmp_path: Path) -> None:
    rows = [{"prompt": "f f f", "answer": "x"}] * 4
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = grpo_trainer(tmp_path, eval_rows=rows, **options)
    for rollouts in log_rollouts(trainer, prompts=ROWS).values():
        assert len(rollouts) == 4
        assert all(rollout.row["answer"] != "x" for rollout in rollouts)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("seq_kd", [pytest.param(False, marks=pytest.mark.slow), True])
def test_only_what_the_student_sampled_counts_in_gkd(seq_kd: bool, tmp_path: Path) -> None:
    trainer = gkd_trainer(tmp_path, lmbda=0.5, seq_kd=seq_kd, max_steps=8)
    draws: list[bool] = []
    original = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        state = random.getstate()
        draws.append(random.random() <= 0.5)
        random.setstate(state)
        return original(*args, **kwargs)

    trainer.training_step = training_step
    rollouts_of_step = log_rollouts(trainer)
    assert {True, False} == set(draws)
    assert [bool(rollouts) for rollouts in rollouts_of_step.values()] == draws


def test_a_run_that_never_samples_says_so(tmp_path: Path) -> None:
    trainer = gkd_trainer(tmp_path, lmbda=0.0)
    watch(trainer, strict=False)
    with pytest.warns(UserWarning, match="GKDTrainer sampled no response from the student"):
        trainer.train()
    assert measured_steps(trainer) == []


def test_prompts_that_are_not_among_the_rows_are_warned_about_once(tmp_path: Path) -> None:
    trainer = gkd_trainer(tmp_path, max_steps=2)
    watch(trainer, prompts=ROWS)  # texts, which this trainer does not render so
    with pytest.warns(UserWarning, match="their prompts are not among `prompts`") as caught:
        trainer.train()
    assert len([one for one in caught if "not among" in str(one.message)]) == 1
    assert trainer.state.global_step == 2
    partly = gkd_trainer(tmp_path, per_device_train_batch_size=4, max_steps=2)
    with pytest.warns(UserWarning, match="their prompts are not among `prompts`"):
        rollouts_of_step = log_rollouts(partly, prompts=MESSAGE_ROWS[:3])
    assert all(len(rollouts) == 3 for rollouts in rollouts_of_step.values())


@pytest.mark.slow
def test_prompts_that_the_training_cuts_are_left_out(tmp_path: Path) -> None:
    trainer = SAMPLING_TRAINERS["SDFTTrainer"](tmp_path, max_prompt_length=5)
    with pytest.warns(UserWarning, match="the training made another prompt of the row"):
        rollouts_of_step = log_rollouts(trainer)
    assert {str(one.row["prompt"]) for rollouts in rollouts_of_step.values() for one in rollouts} <= {
        str(row["prompt"]) for row in MESSAGE_ROWS if len(row["prompt"][0]["content"].split()) == 1
    }


@pytest.mark.parametrize("make_trainer", [plain_trainer, sft_trainer])
def test_trainers_that_do_not_sample_are_refused(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not sample from the student; leave it out, or train with one of"):
        watch(make_trainer(tmp_path))


def made_up(base: str, **attributes: Any) -> Any:
    """An object of a class that looks like one of TRL's."""
    kind = type(base, (), {"__module__": "trl.trainer", **attributes})
    return type("MyTrainer", (kind,), {})()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (made_up("AsyncGRPOTrainer"), "MyTrainer samples in another process"),
        (made_up("AsyncDistillationTrainer"), "MyTrainer samples in another process"),
        (made_up("GRPOTrainer"), "has no `_generate_and_score_completions`, where they are read; use trl>=1.16"),
        (made_up("GKDTrainer", generate_on_policy_outputs=None, tools=[print]), "mixes them with what tools return"),
        (made_up("GKDTrainer", generate_on_policy_outputs=None, rollout_func=print), "gets them from a `rollout_func`"),
        (made_up("SDFTTrainer", generate_from_teacher=True), "set `generate_from_teacher=False`"),
        (
            made_up("GOLDTrainer", _fill_buffer=None, use_vllm=True, vllm_sync_frequency=4),
            "set `vllm_sync_frequency=1`",
        ),
        (made_up("GOLDTrainer", _fill_buffer=None, _vlm_collator=print), "trains on images"),
    ],
)
def test_rollouts_that_cannot_be_read_are_refused(trainer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`update_every_n_steps` needs the training's own rollouts, but .*{message}"):
        rollout_recorder(trainer)


def test_columns_that_a_teacher_needs_are_checked_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"measures the rows of the trainer's `train_dataset`, and .*hint"):
        watch(
            distillation_trainer(tmp_path),
            prompts=[{**row, "hint": "b"} for row in ROWS],
            teachers={"hint": Teacher("{hint} {prompt}")},
        )


def test_the_probe_of_the_rollouts_samples_as_the_training_does(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, temperature=0.7, top_k=3, max_completion_length=9, max_steps=1)
    assert sampling_options(trainer) == {"temperature": 0.7, "max_new_tokens": 9}
    callback = watch(trainer, prompts=ROWS)
    assert callback.monitor.training_updates.probe.config.temperature == 0.7
    assert callback.config.temperature == 1.0
    assert truncated_sampling(trainer) == "top_k=3"
    with pytest.warns(UserWarning, match="the training samples with top_k=3"):
        trainer.train()
    assert truncated_sampling(distillation_trainer(tmp_path)) == ""
    assert sampling_options(gkd_trainer(tmp_path)) == {"temperature": 0.9, "max_new_tokens": 5}


def test_data_that_cannot_be_read_cost_the_figures_and_not_the_training(tmp_path: Path) -> None:
    end_states = []
    for broken in (False, True):
        trainer = grpo_trainer(tmp_path, max_steps=2)
        callback = watch(trainer, prompts=ROWS, strict=False)
        if broken:
            callback.rollouts.recorder.observe_batch = lambda *arguments: 1 / 0
            with pytest.warns(UserWarning, match="the training's rollouts could not be read") as caught:
                trainer.train()
            assert len([one for one in caught if "could not be read" in str(one.message)]) == 1
        else:
            trainer.train()
        end_states.append(trainer_end_state(trainer))
    assert all(torch.equal(value, end_states[1][name]) for name, value in end_states[0].items())
    strict = grpo_trainer(tmp_path)
    watch(strict, prompts=ROWS).rollouts.recorder.observe_batch = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        strict.train()


def test_two_callbacks_and_a_gate_share_a_trainer(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, max_steps=2)
    watch(trainer, prompts=ROWS)
    watch(trainer, prompts=ROWS, name="second")
    gate_trainer(trainer, IncorrectRolloutGate(), words_reward)
    gated_method = trainer._generate_and_score_completions
    trainer.train()
    for root in ("odp", "odp-second"):
        entries = [entry for entry in trainer.state.log_history if f"{root}/training/questions" in entry]
        assert [entry["step"] for entry in entries] == [1, 2]
    assert any("gate/token_share" in entry for entry in trainer.state.log_history)
    assert trainer._generate_and_score_completions == gated_method, "the gate stays, and the hooks are gone"


def test_a_training_that_fails_and_starts_again_is_observed_once(tmp_path: Path) -> None:
    class Failing(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    trainer, failing = grpo_trainer(tmp_path, max_steps=2), Failing()
    trainer.add_callback(failing)
    callback = watch(trainer, prompts=ROWS)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert measured_steps(trainer) == [1, 2]
    assert not callback.rollouts.recorder.completions
    assert "_generate_and_score_completions" not in vars(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_resumed_run_measures_on(name: str, tmp_path: Path) -> None:
    trainer = SAMPLING_TRAINERS[name](tmp_path, save_strategy="steps", save_steps=2)
    watch(trainer)
    trainer.train()
    resumed = SAMPLING_TRAINERS[name](tmp_path)
    watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert measured_steps(resumed) == [1, 2, 3, 4], "the log of the first two steps is in the checkpoint"
    if name == "GKDTrainer":  # TRL 1.16's other trainers sample other responses in a resumed run, also without callback
        whole, rest = trainer.state.log_history, resumed.state.log_history
        figure = "odp/training/update_gain/base/all"
        assert str([entry.get(figure) for entry in rest]) == str([entry.get(figure) for entry in whole])


def test_the_figures_have_the_names_that_lightning_s_have(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, per_device_train_batch_size=4, max_steps=1)
    watch(trainer, prompts=ROWS)
    trainer.train()
    entry = next(one for one in trainer.state.log_history if "odp/training/questions" in one)
    for teacher in ("answer", "base", "answer - base"):
        assert f"odp/training/update_gain/{teacher}/all" in entry
    assert entry["odp/training/questions"] == 4


def _train_in_a_process(rank: int, folder: Path, watched: bool) -> None:
    trainer = grpo_trainer(folder / str(rank), max_steps=2)
    rollouts_of_step = log_rollouts(trainer, prompts=ROWS) if watched else trainer.train() and {}
    torch.save((trainer_end_state(trainer), trainer.state.log_history, rollouts_of_step), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_each_measure_their_own_rollouts(tmp_path: Path) -> None:
    plain = run_in_two_processes(_train_in_a_process, tmp_path, False)
    watched = run_in_two_processes(_train_in_a_process, tmp_path, True)
    for (expected, _, _), (end_state, _, _) in zip(plain, watched, strict=True):
        assert all(torch.equal(value, end_state[name]) for name, value in expected.items())
    log = watched[0][1]
    for step in (1, 2):
        rollouts = [one for _, _, rollouts_of_step in watched for one in rollouts_of_step[step]]
        assert len(rollouts) == 8
        assert {one.row["prompt"] for one in rollouts} == {row["prompt"] for row in ROWS}
        (own,) = (entry["reward"] for entry in log if entry["step"] == step and "reward" in entry)
        (ours,) = (entry for entry in log if entry["step"] == step and "odp/training/questions" in entry)
        assert np.mean([one.reward for one in rollouts]) == pytest.approx(own)
        assert ours["odp/training/success_rate"] == pytest.approx(own)
        assert ours["odp/training/questions"] == 4
