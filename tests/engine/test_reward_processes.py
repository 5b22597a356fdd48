"""The reward function in processes of their own: same rewards, and one clear message where something goes wrong."""

import math
import os
from typing import Any

import pytest
import torch

from odp_callbacks.engine import ProbeConfig
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.reward_arguments import RewardError, RewardHost, RewardTimeoutError
from odp_callbacks.engine.verifier import BATCH_SIZE, Verifier
from tests.helpers import slow_rewards
from tests.helpers.models import tiny
from tests.helpers.probes import assert_same_measurements, measure

QUESTION = Question("0", {"prompt": "a", "answer": "3 4"}, torch.tensor([1]))


def score(verifier: Verifier, texts: list[str]) -> list[float]:
    return verifier.score([QUESTION] * len(texts), texts, [[0]] * len(texts))


def test_rewards_are_those_of_this_process_also_with_an_alarm_and_while_others_are_submitted() -> None:
    verifier = Verifier(slow_rewards.verified, 30.0, processes=2)
    texts = [f"{number % 8} x" for number in range(BATCH_SIZE + 5)]
    scoring = verifier.open()
    for number, text in enumerate(texts):
        scoring.add(number, QUESTION, text, [0])
    assert scoring._jobs, "a full batch does not wait for the others"
    expected = slow_rewards.verified([], texts, ["3 4"] * len(texts))
    assert scoring.rewards() == dict(enumerate(expected))
    assert 0 < sum(expected) < len(texts)
    assert score(verifier, texts) == expected
    assert score(verifier, []) == []
    verifier.close()


def test_it_is_called_elsewhere_with_what_a_trainer_gives() -> None:
    verifier = Verifier(slow_rewards.in_process, 30.0, processes=1)
    verifier.host = RewardHost(step=7)
    assert score(verifier, [str(os.getpid())]) == [1.0]
    verifier.close()


def test_an_asynchronous_function_may_have_nothing_to_say() -> None:
    verifier = Verifier(slow_rewards.asynchronous, 30.0, processes=1)
    first, second = score(verifier, ["?", "1"])
    assert math.isnan(first)
    assert second == 1.0
    verifier.close()


def test_what_goes_wrong_is_said_and_the_next_call_starts_anew() -> None:
    verifier = Verifier(slow_rewards.misbehaving, 1.0, processes=1)
    cases: list[tuple[str, type[BaseException], str]] = [
        ("fail", KeyError, "verifier"),
        ("fail strangely", RuntimeError, "UnrepeatableError: a strange failure"),
        ("hang", RewardTimeoutError, "`reward` took longer than 1 s for 1 completions; make it faster"),
        ("die", RewardError, "a process of `reward_processes` ended with the code 9"),
        ("exit", RuntimeError, "SystemExit: 3"),
    ]
    for text, error, message in cases:
        with pytest.raises(error, match=message):
            score(verifier, [text])
        assert score(verifier, ["fine"]) == [0.5]
    verifier.close()


class Local:
    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        raise NotImplementedError


def test_a_function_that_cannot_be_sent_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`reward_processes` needs a `reward` that another process can import, but "):
        Verifier(lambda prompts, completions: [], processes=2)
    monkeypatch.setattr(Local, "__module__", "__main__")
    with pytest.raises(ValueError, match="it is defined in the script itself; define it at the top level of a module"):
        Verifier(Local(), processes=2)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="`reward_processes` must be a number of processes or 0, but"):
            ProbeConfig(reward_processes=wrong)  # type: ignore[arg-type]  # it is wrong


def test_a_column_that_cannot_be_sent_is_named() -> None:
    verifier = Verifier(slow_rewards.verified, processes=1)
    question = Question("0", {"prompt": "a", "answer": lambda: 3}, torch.tensor([1]))
    with pytest.raises(RewardError, match="arguments of `reward` cannot be sent to another process"):
        verifier.score([question], ["3"], [[0]])
    verifier.close()


def test_a_probe_measures_the_same() -> None:
    rows = [{"prompt": "a b", "answer": "1"}, {"prompt": "c", "answer": "1"}]
    options: dict[str, Any] = {"rows": rows, "max_new_tokens": 4, "nodes": 1, "reward": slow_rewards.first_letter}
    own = measure(tiny(), "base", **options)
    processes = measure(tiny(), "base", reward_processes=1, **options)
    assert_same_measurements(processes, own)
    assert len({rollout.reward for rollout in own.rollouts}) > 1
