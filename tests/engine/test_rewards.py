from functools import partial

import numpy as np
import pytest
import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rewards import RewardError, score

NO_IDS = torch.tensor([1])
CHAT = [{"role": "user", "content": "a"}]


def question(**row):
    return Question("0", {"prompt": "a", **row}, NO_IDS)


def test_arguments_are_those_of_trl():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.5, 1.0]

    rows = [question(answer="x", level=1), question(answer="y", level=2), question(answer="z", other=3)]
    assert score(reward, rows, ["p", "q", "r"], [[5], [6, 7], [8]]) == [0.0, 0.5, 1.0]
    # `level` and `other` are not in every row.
    assert seen == {"prompts": ["a"] * 3, "completions": ["p", "q", "r"], "answer": ["x", "y", "z"]}


def test_a_function_gets_what_it_names():
    def reward(completions, prompts, answer, completion_ids):
        assert completion_ids == [[5, 6]]
        return [float(completions == answer)]

    assert score(reward, [question(answer="x", unused=1)], ["x"], [(5, 6)]) == [1.0]
    with pytest.raises(TypeError, match="answer"):
        score(reward, [question()], ["x"], [(5, 6)])


def test_reserved_columns_do_not_shadow():
    def reward(prompts, completions, **columns):
        assert columns == {"answer": ["x"]}
        return [1.0]

    assert score(reward, [question(completion="no", completion_ids="no", answer="x")], ["y"], [(1,)]) == [1.0]


def test_conversational_completions_are_messages():
    def reward(prompts, completions):
        assert prompts == [CHAT, "a"]
        assert completions == [[{"role": "assistant", "content": "p"}], "q"]
        return [1, 0]

    assert score(reward, [question(prompt=CHAT), question()], ["p", "q"], [(1,), (2,)]) == [1.0, 0.0]


def test_callables_of_every_kind():
    class Verifier:
        def __call__(self, prompts, completions, answer):
            return [float(c == a) for c, a in zip(completions, answer)]

    def scaled(prompts, completions, scale):
        return [scale for _ in completions]

    rows = [question(answer="x")]
    assert score(Verifier(), rows, ["x"], [(1,)]) == [1.0]
    assert score(partial(scaled, scale=0.25), rows, ["x"], [(1,)]) == [0.25]
    for result in (np.array([0.5]), torch.tensor([0.5]), (0.5,), [np.float32(0.5)]):
        assert score(lambda prompts, completions, result=result: result, rows, ["x"], [(1,)]) == [0.5]


def test_nothing_to_score_calls_nobody():
    assert score(lambda **_: 1 / 0, [], [], []) == []


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"must return a list of 2 numbers in \[0, 1\], but it returned None"),
        (0.5, r"must return a list of 2 numbers"),
        ([], "one number for each of the 2 completions, but it returned 0"),
        ([1.0], "but it returned 1"),
        ([0.0, 1.0, 0.0], "but it returned 3"),
        ([0.0, None], r"numbers in \[0, 1\], but None was among them"),
        ([0.0, 1.5], r"but 1.5 was among them; rescale it"),
        ([-0.1, 0.0], "but -0.1"),
        ([0.0, float("nan")], "but nan"),
        ([0.0, "high"], "but 'high'"),
        ([[0.0], [1.0]], r"but \[0.0\]"),
        ("10", "must return a list of 2 numbers"),
        ({0.0: "no", 1.0: "yes"}, "must return a list of 2 numbers"),
    ],
)
def test_reward_errors(result, message):
    with pytest.raises(RewardError, match=message):
        score(lambda prompts, completions: result, [question(), question()], ["p", "q"], [(1,), (2,)])


def test_an_error_of_the_function_itself_comes_through():
    def reward(prompts, completions):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        score(reward, [question()], ["p"], [(1,)])
