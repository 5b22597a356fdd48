import asyncio
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

from odp_callbacks.engine import Probe
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rewards import RewardError, RewardHost, check_reward, score
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.training import make_callback

NO_IDS = torch.tensor([1])
HOST = ("trainer_state", "log_metric", "log_extra")
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
    host = {name: seen.pop(name) for name in ("trainer_state", "log_metric", "log_extra")}
    assert host["trainer_state"].global_step == 0
    host["log_metric"]("accuracy", 0.5)
    host["log_extra"]("column", ["x", "y", "z"])
    # `level` and `other` are not in every row.
    assert seen == {
        "prompts": ["a"] * 3,
        "completions": ["p", "q", "r"],
        "completion_ids": [[5], [6, 7], [8]],
        "answer": ["x", "y", "z"],
    }


def test_a_function_gets_what_it_names():
    def reward(completions, prompts, answer, completion_ids):
        assert completion_ids == [[5, 6]]
        return [float(completions == answer)]

    assert score(reward, [question(answer="x", unused=1)], ["x"], [(5, 6)]) == [1.0]
    with pytest.raises(TypeError, match="answer"):
        score(reward, [question()], ["x"], [(5, 6)])


def test_reserved_columns_do_not_shadow():
    def reward(prompts, completions, **columns):
        assert (prompts, completions, columns["completion_ids"]) == (["a"], ["y"], [[1]])
        assert columns.keys() == {"answer", "completion_ids", *HOST}
        assert all(columns[name] != "no" for name in HOST)
        return [1.0]

    taken = dict.fromkeys(("prompts", "completions", "completion", "completion_ids", *HOST), "no")
    assert score(reward, [question(answer="x", **taken)], ["y"], [(1,)]) == [1.0]
    assert score(lambda completions, prompts: [1.0], [question(**taken)], ["y"], [(1,)]) == [1.0]


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
        ([0.0, 1.5], r"but 1.5 was among them; rescale it"),
        ([-0.1, 0.0], "but -0.1"),
        (["0.5", "1"], "but '0.5'"),
        ([0.0, 1j], "but 1j"),
        ({0.0, 1.0}, "must return a list of 2 numbers"),
        (torch.nn.Linear(1, 1), "must return a list of 2 numbers"),
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


def test_what_trl_passes_reaches_those_who_name_it():
    logged = []
    state = SimpleNamespace(global_step=7)
    host = RewardHost(state, log_metric=lambda name, value: logged.append((name, value)))

    def reward(completions, trainer_state, log_metric):
        log_metric("length", 3.0)
        return [trainer_state.global_step / 10 for _ in completions]

    assert score(reward, [question()], ["p"], [(1,)], host) == [0.7]
    assert logged == [("length", 3.0)]
    assert score(lambda completions, trainer_state: [trainer_state.global_step / 10], [question()], ["p"], [(1,)]) == [
        0
    ]


def test_functions_without_prompts():
    rows = [question(answer="x")]
    assert score(lambda completions, answer: [float(completions == answer)], rows, ["x"], [(1,)]) == [1.0]
    assert score(lambda completions, **columns: [float("prompts" in columns)], rows, ["x"], [(1,)]) == [1.0]
    assert score(lambda completion_ids: [1 / len(completion_ids[0])], rows, ["x"], [(1, 2)]) == [0.5]


async def asynchronous(prompts, completions, answer):
    await asyncio.sleep(0.001)
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


class Asynchronous:
    """Keeps something that belongs to the event loop of its first call, as clients of servers do."""

    def __init__(self):
        self.loop = None

    async def __call__(self, completions, answer, **columns):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        return await asynchronous(None, completions, answer)


@pytest.mark.parametrize(
    "reward", [asynchronous, Asynchronous(), partial(asynchronous)], ids=["function", "object", "partial"]
)
def test_asynchronous_functions_and_classes(reward):
    rows = [question(answer="x"), question(answer="y")]
    for _ in range(2):
        assert score(reward, rows, ["x", "x"], [(1,), (1,)]) == [1.0, 0.0]

    async def in_a_notebook():
        return score(reward, rows, ["x", "x"], [(1,), (1,)])

    assert asyncio.run(in_a_notebook()) == [1.0, 0.0]


def test_errors_of_asynchronous_functions_come_through():
    async def reward(completions):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        score(reward, [question()], ["p"], [(1,)])


@pytest.mark.parametrize(
    "none",
    [None, float("nan"), np.nan, torch.tensor(float("nan")), pandas.NA],
    ids=["None", "nan", "np", "torch", "NA"],
)
def test_none_is_no_reward(none):
    """TRL allows it for rows that a function has nothing to say about."""
    first, second = score(lambda completions: [0.5, none], [question(), question()], ["p", "q"], [(1,), (2,)])
    assert first == 0.5
    assert math.isnan(second)


@pytest.mark.parametrize(
    "result",
    [
        [True, False],
        [np.bool_(True), np.float16(0)],
        torch.tensor([True, False]),
        torch.tensor([1.0, 0.0], requires_grad=True),
        [torch.tensor(1.0, requires_grad=True), torch.tensor([0.0])],
        pandas.Series([1.0, 0.0], index=[5, 3]),
        {"a": 1.0, "b": 0.0}.values(),
        (value for value in (1, 0)),
        [Fraction(1), Decimal(0)],
    ],
    ids=lambda result: type(result).__name__,
)
def test_results_of_every_kind(result):
    assert score(lambda completions: result, [question(), question()], ["p", "q"], [(1,), (2,)]) == [1.0, 0.0]


def test_an_error_inside_a_generator_is_the_function_s_own():
    def reward(completions):
        yield 1.0
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        score(reward, [question(), question()], ["p", "q"], [(1,), (2,)])


def test_a_column_that_some_rows_lack_is_none_there_for_those_who_can_do_without():
    rows = [question(answer="x"), question()]
    assert score(
        lambda completions, answer=None: [float(a is None) for a in answer], rows, ["p", "q"], [(1,), (2,)]
    ) == [
        0.0,
        1.0,
    ]


class TakesTexts(torch.nn.Module):
    def forward(self, completions, **columns):
        return torch.ones(len(completions))


def test_modules_that_take_texts_are_functions():
    check_reward(TakesTexts())
    assert score(TakesTexts(), [question()], ["p"], [(1,)]) == [1.0]


class Reward:
    def __call__(self, completions):
        return [1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("organisation/model", "must be a function of prompts, completions and columns"),
        ([asynchronous], "must be a function of prompts, completions and columns"),
        (Reward, "the class Reward was given; give an instance"),
        (torch.nn.Linear(2, 2), r"is the model Linear, which reads tokens .* `def reward\(prompts, completions"),
        (tiny_base("gpt2"), "is the model GPT2LMHeadModel"),
        (
            lambda texts, /: [1.0],
            r"takes 'texts' by position only, .* `def reward\(prompts, completions, \*\*columns\)",
        ),
    ],
    ids=["name", "list", "class", "module", "reward model", "by position"],
)
def test_what_is_no_reward_function_is_refused_before_training(reward, message):
    with pytest.raises(TypeError, match=message):
        check_reward(reward)
    with pytest.raises(TypeError, match=message):
        Probe(tiny("gpt2"), word_tokenizer(), reward, "base", max_new_tokens=4)
    with pytest.raises(TypeError, match=message):
        make_callback(reward=reward)


@pytest.mark.parametrize("reward", [lambda texts, answers: [1.0], lambda prompt, completion: [1.0]])
def test_arguments_that_nothing_provides_are_refused_before_training(reward):
    probe = Probe(tiny("gpt2"), word_tokenizer(), reward, "base", max_new_tokens=4)
    message = r"`reward` needs the argument '(texts|prompt)', but question 0 has only the columns \['answer'\]; .*`def"
    with pytest.raises(RewardError, match=message):
        probe.validate([{"prompt": "a", "answer": "b"}])
    with pytest.raises(RewardError, match="but question 1 has only the columns"):
        Probe(tiny("gpt2"), word_tokenizer(), asynchronous, "base", max_new_tokens=4).validate(
            [{"prompt": "a", "answer": "b"}, {"prompt": "a"}]
        )
