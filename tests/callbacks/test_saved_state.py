"""States from checkpoints that do not fit what is there now."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from odp_callbacks import AlignmentGate, BaseTeacher, EMATeacher, Teacher
from odp_callbacks.engine.teachers.saved_states import load_or_keep, restore_teachers
from tests.helpers.trainers import add_callback, plain_trainer
from tests.helpers.training import (
    ROWS,
    LearningGate,
    contains_answer_reward,
    make_callback,
    make_loader,
    make_module,
    make_trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
]
HINT = Teacher("{answer} {prompt}")


def sentences(run: Any) -> list[str]:
    """What a run warns about its checkpoint."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [
        str(warning.message)
        for warning in caught
        if "checkpoint" in str(warning.message) and "odp" in str(warning.message)
    ]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "renamed": (
        {"teachers": {"answer": HINT, "base": BaseTeacher()}},
        {"teachers": {"hint": HINT, "base": BaseTeacher()}},
        ["the checkpoint has a state of the teacher 'answer', but the teachers are ['hint', 'base'] now; dropped it."],
    ),
    "removed": (
        {"teachers": {"answer": HINT, "ema": EMATeacher(0.5)}},
        {"teachers": {"answer": HINT}},
        ["the checkpoint has a state of the teacher 'ema', but the teachers are ['answer'] now; dropped it."],
    ),
    "added": (
        {"teachers": {"answer": HINT}},
        {"teachers": {"answer": HINT, "ema": EMATeacher(0.5)}},
        ["the checkpoint has no state of the teacher 'ema', which starts anew."],
    ),
    "another kind": (
        {"teachers": {"answer": EMATeacher(0.5)}},
        {"teachers": {"answer": HINT}},
        ["the checkpoint's state of the teacher 'answer' is that of another kind; dropped it."],
    ),
    "fewer prompts": (
        {},
        {"prompts": ROWS[:3]},
        [
            "the checkpoint's `questions` does not fit (ValueError: it was saved for 4 `prompts`, but there are 3 "
            "now); dropped it."
        ],
    ),
    "no gate": (
        {"gate": LearningGate()},
        {},
        ["the checkpoint has the state of a gate, but there is none now; dropped it."],
    ),
    "nothing changed but the schedule": ({"every_n_steps": 1}, {"every_n_steps": 2, "seed": 5}, []),
}


@pytest.mark.parametrize(("before", "after", "expected"), CHANGES.values(), ids=CHANGES)
def test_lightning_drops_what_does_not_fit_with_a_sentence(
    before: dict[str, Any], after: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    trainer = make_trainer(make_callback(**before), max_steps=2)
    trainer.fit(make_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = make_callback(**after)
    resumed = make_trainer(callback, max_steps=4, max_epochs=-1)
    found = sentences(
        lambda: resumed.fit(make_module(), make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    )
    assert found == [f"odp-callbacks: {sentence}" for sentence in expected]
    assert callback.monitor.probe_count == (3 if "every_n_steps" in before else 2)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "expected"), CHANGES.values(), ids=CHANGES)
def test_transformers_drops_it_too(
    before: dict[str, Any], after: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    trainer = plain_trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    add_callback(trainer, **before)
    trainer.train()
    resumed = plain_trainer(tmp_path / "resumed")
    callback = add_callback(resumed, **after)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    found = sentences(lambda: resumed.train(resume_from_checkpoint=checkpoint))
    assert found == [f"odp-callbacks: {sentence}" for sentence in expected]
    assert resumed.state.global_step == 4
    assert callback.monitor.probe_count == (3 if "every_n_steps" in before else 2)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "not base64!", "AAAA", None])
def test_a_corrupt_state_in_transformers_costs_no_run(text: Any, tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    add_callback(trainer)
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    trainer_state = json.loads((checkpoint / "trainer_state.json").read_text())
    trainer_state["stateful_callbacks"]["odp_callbacks"]["attributes"]["state"] = text
    (checkpoint / "trainer_state.json").write_text(json.dumps(trainer_state))
    resumed = plain_trainer(tmp_path / "resumed")
    callback = add_callback(resumed)
    (sentence,) = sentences(lambda: resumed.train(resume_from_checkpoint=str(checkpoint)))
    assert sentence == "odp-callbacks: the checkpoint's state of this callback cannot be read; dropped it."
    assert callback.monitor.probe_count == 1


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("probe_count", "many"),
        ("last_step", None),
        ("last_probe_step", 1.5),
        ("questions", {"position": 3}),
        ("random_stream", torch.zeros(3)),
        ("time_budget", {"run_seconds": 1.0}),
        ("time_budget", {"run_seconds": 1.0, "probe_seconds": 1.0, "costs": {"probe": "a"}, "skipped_probes": 0}),
        ("teachers", [1]),
        ("teachers", {"ema": {"step": 3}}),
    ],
)
def test_each_part_of_a_state_that_is_corrupt_is_dropped_alone(part: str, value: Any) -> None:
    teachers = {"ema": EMATeacher(0.5)}
    saved = make_callback(teachers=teachers)
    make_trainer(saved, max_steps=2).fit(make_module(), make_loader())
    state = saved.state_dict()
    callback = make_callback(teachers={"ema": EMATeacher(0.5)})
    fresh = callback.state_dict()
    callback.load_state_dict({**state, part: value})
    loaded = callback.state_dict()
    assert len(callback.monitor._dropped_states) == 1
    for name in ("probe_count", "last_step", "last_probe_step", "questions", "time_budget"):
        assert loaded[name] == (fresh if name == part else state)[name]
    assert torch.equal(loaded["random_stream"], (fresh if part == "random_stream" else state)["random_stream"])
    assert bool(loaded["teachers"]["ema"]["average"]) == (part != "teachers")


def test_a_state_of_an_earlier_version_keeps_what_is_still_known() -> None:
    state = make_callback().state_dict()
    state["probe_count"], state["remaining_questions"] = 7, [3, 1]
    del state["questions"]
    callback = make_callback()
    callback.load_state_dict(state)
    assert callback.monitor.probe_count == 7
    assert callback.monitor._dropped_states == ["the checkpoint has no `questions`, which starts anew."]
    callback.load_state_dict("nothing")  # type: ignore[arg-type]
    assert callback.monitor._dropped_states[1:] == [
        "the checkpoint's state of this callback cannot be read; dropped it."
    ]


def test_the_state_of_another_gate_is_dropped_and_the_gate_is_as_it_was() -> None:
    class HalfLoading(LearningGate):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = 99
            if "evidence" not in state:
                raise KeyError("evidence")

    gate = HalfLoading()
    assert load_or_keep(gate, {"count": 3}) == "KeyError: 'evidence'"
    callback = make_callback(gate=AlignmentGate())
    state = make_callback(gate=LearningGate()).state_dict()
    callback.load_state_dict(state)
    (sentence,) = callback.monitor.gate_learning.dropped_states()
    assert sentence == "the checkpoint's state of `gate` does not fit (KeyError: 'evidence'); dropped it."


def test_a_gate_that_learned_from_other_teachers_starts_anew() -> None:
    gate = LearningGate()
    gate.count = 5
    state = make_callback(gate=gate, teachers={"answer": HINT}).state_dict()
    fresh = LearningGate()
    callback = make_callback(gate=fresh, teachers={"hint": HINT})
    callback.load_state_dict(state)
    assert fresh.count == 0
    assert (
        "the checkpoint's gate has learned from other teachers; dropped its state." in callback.monitor._dropped_states
    )


def test_a_teacher_that_is_the_user_s_own_keeps_its_state_if_the_saved_one_fails() -> None:
    class Counting(Teacher):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = count

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: Any) -> None:
            self.count = -1
            self.count = int(state["count"])

    teacher = Counting(4)
    (sentence,) = restore_teachers({"own": teacher}, {"own": {"count": "three"}})
    assert "state of the teacher 'own' does not fit (ValueError" in sentence
    assert teacher.count == 4
    assert restore_teachers({"own": teacher}, {"own": {"count": 9}}) == []
    assert teacher.count == 9


@pytest.mark.parametrize("change", ["renamed teacher", "another gate", "no state"])
def test_the_module_drops_what_does_not_fit_too(change: str, tmp_path: Path) -> None:
    def module(name: str, gate: Any) -> Any:
        built = make_module(reward=contains_answer_reward)
        built.teachers, built.gate = {name: EMATeacher(0.5)}, gate
        return built

    class GivesOnes(LearningGate):
        needs_rewards = False

        def __call__(self, tokens: Any) -> torch.Tensor:
            return torch.ones_like(tokens.counts)

    class Other(GivesOnes):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("weights")

    saved = GivesOnes()
    saved.count = 3
    checkpoint: dict[str, Any] = {}
    module("answer", saved).on_save_checkpoint(checkpoint)
    gate: Any = Other() if change == "another gate" else GivesOnes()
    resumed = module("hint" if change == "renamed teacher" else "answer", gate)
    found = sentences(lambda: resumed.on_load_checkpoint({} if change == "no state" else checkpoint))
    assert gate.count == 0
    assert any("`gate` starts anew" in sentence for sentence in found)
    assert any("'hint'" in sentence or "'answer'" in sentence for sentence in found) == (change != "another gate")
