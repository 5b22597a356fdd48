"""One row that cannot be measured does not cost the others."""

import math
from typing import Any

import pytest

from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.cli.diagnosis import run_diagnosis
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.rewards import RewardError, UnscoredError
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import merge
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.probes import ROWS, assert_same_measurements, word_reward

TOO_LONG = {"prompt": "a " * 80, "answer": "d"}
OPTIONS: dict[str, Any] = {"rollouts_per_question": 2, "max_new_tokens": 6, "continuations": 2}


def none_for(*answers: str) -> Any:
    """A reward function that has nothing to say about rows with these answers."""

    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]:
        rewards = word_reward(prompts, completions)
        return [None if one in answers else value for one, value in zip(answer, rewards, strict=True)]

    return reward


def make_probe(reward: Any = word_reward, teachers: Any = "base", **options: Any) -> Probe:
    return Probe(tiny("llama"), word_tokenizer(), reward, teachers, ProbeConfig(**(OPTIONS | options)))


@pytest.fixture
def expected() -> ProbeReport:
    """What the first and the last row give without the one between them."""
    return make_probe().run([ROWS[0], ROWS[2]], ids=["0", "2"])


def left_out(report: ProbeReport) -> tuple[float, float]:
    logged = scalars(report)
    return logged["odp/probe/unused_questions"], logged["odp/probe/unscored_responses"]


@pytest.mark.parametrize("options", [{}, {"budget": 200}], ids=["continuations", "budget"])
def test_a_row_whose_reward_is_none_is_left_out(options: dict[str, Any]) -> None:
    expected = make_probe(**options).run([ROWS[0], ROWS[2]], ids=["0", "2"])
    found = make_probe(none_for("e"), **options).run(ROWS)
    assert_same_measurements(found, expected, rtol=1e-9)
    assert left_out(found) == (1, 2)
    assert left_out(expected) == (0, 0)


def test_a_row_that_is_too_long_is_left_out(expected: ProbeReport) -> None:
    rows = [ROWS[0], TOO_LONG, ROWS[2]]
    probe = make_probe()
    with pytest.warns(UserWarning, match="left out 1 of 3 rows, because question 1 has 81 tokens"):
        questions = probe.validate(rows)
    assert [question.id for question in questions] == ["0", "2"]
    assert_same_measurements(probe.run(questions), expected, rtol=1e-9)
    found = probe.run(rows)  # without a second warning
    assert_same_measurements(found, expected, rtol=1e-9)
    assert left_out(found) == (1, 0)
    with pytest.raises(ValueError, match="question 0 has 81 tokens"):
        probe.run([TOO_LONG])


@pytest.mark.parametrize(
    "row",
    [{"prompt": None}, {"prompt": "a \ud83d"}, {"question": "a"}, {"prompt": "a", "answer": None}],
    ids=["no prompt", "surrogate", "no column", "no answer"],
)
def test_a_row_that_cannot_be_used_is_left_out_of_a_probe_and_refused_before(row: Any, recwarn: Any) -> None:
    teachers = {"answer": "{answer} {prompt}"}
    rows = [ROWS[0], row, ROWS[2]]
    with pytest.raises(ValueError, match=r"(question|row) 1 "):
        make_probe(teachers=teachers).validate(rows)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 rows, because .*(question|row) 1 "):
        found = make_probe(teachers=teachers).run(rows)
    assert left_out(found) == (1, 0)
    assert {rollout.question for rollout in found.rollouts} == {"0", "2"}


def test_the_responses_of_a_row_are_left_out_with_it() -> None:
    responses = [[[6, 7, 2]], [[8, 2]], [[9, 10, 2]]]
    with pytest.warns(UserWarning, match="left out 1 of 3 rows"):
        found = make_probe().run([ROWS[0], TOO_LONG, ROWS[2]], responses=responses)
    assert [rollout.text for rollout in found.rollouts] == ["a b", "d e"]


@pytest.mark.parametrize("options", [{}, {"budget": 300}, {"budget": 0}], ids=["continuations", "budget", "rollouts"])
def test_single_responses_without_a_reward_are_left_out(options: dict[str, Any]) -> None:
    """A judge that sometimes does not answer."""

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        rewards = word_reward(prompts, completions)
        return [None if len(text) % 5 == 3 else value for text, value in zip(completions, rewards, strict=True)]

    report = make_probe(reward, **options).run(ROWS)
    assert left_out(report)[1] > 0
    assert all(not math.isnan(rollout.reward) for rollout in report.rollouts)
    assert all(node.count.min() > 0 for node in report.nodes)
    assert bool(report.nodes) == (options.get("budget") != 0)
    assert not any(math.isnan(node.total.sum()) for node in report.nodes)
    report.summary()


def test_a_reward_function_with_nothing_to_say_is_refused() -> None:
    with pytest.raises(RewardError, match="`reward` gave None to all 6 responses"):
        make_probe(none_for("d", "e", "a")).run(ROWS)


def test_parts_of_a_probe_add_up_what_they_left_out() -> None:
    reward = none_for("e")
    probe = make_probe(reward)
    parts = [probe.run(ROWS[:2]), probe.run(ROWS[1:])]
    assert merge(parts).left_out == {"questions": 2, "responses": 4}


def test_a_diagnosis_goes_on_without_such_rows(tmp_path: Any) -> None:
    rows = [ROWS[0], ROWS[1], TOO_LONG, ROWS[2]]
    arguments = tiny("llama"), word_tokenizer(), rows
    config = ProbeConfig(**OPTIONS)
    for _ in range(2):  # the second time, all is read from the folder
        with pytest.warns(UserWarning, match="left out 1 of 4 rows, because question 2"):
            report = run_diagnosis(*arguments, none_for("e"), "base", tmp_path / "out", config=config)
        assert [rollout.question for rollout in report.rollouts] == ["0", "0", "3", "3"]
        assert report.left_out["questions"] == 2
        assert ProbeReport.load(tmp_path / "out" / "records").left_out == report.left_out
    with pytest.raises(UnscoredError, match="gave None"):
        run_diagnosis(*arguments[:2], ROWS[1:2], none_for("e"), "base", tmp_path / "none", config=config)
