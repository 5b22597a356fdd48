"""Reward functions by their names."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from odp_callbacks.cli.main import main
from odp_callbacks.cli.rewards import load_reward
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.verifier import Verifier
from tests.helpers.command_line import diagnose_arguments


def test_a_reward_by_its_import_path() -> None:
    assert load_reward("odp_callbacks.cli.rewards.exact", None)(["p"], ["a "], answer=["a"]) == [1.0]


def test_math_verify_compares_values_not_texts() -> None:
    reward = load_reward("math-verify", None, [{"prompt": "p", "answer": "1/2"}])
    chat = [{"role": "assistant", "content": "It is $0.25$."}]
    completions = ["So the result is $\\frac{1}{2}$.", chat]
    assert reward(["p"] * 2, completions, answer=["$0.5$", "$0.5$"]) == [1.0, 0.0]


@pytest.mark.parametrize("package", ["math_verify", "antlr4"])
def test_without_math_verify_the_extra_is_named_before_a_model_is_loaded(
    package: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a ModuleNotFoundError after the model was loaded."""
    monkeypatch.setitem(sys.modules, package, None)
    assert main(diagnose_arguments("no/model", dataset, tmp_path / "out", reward="math-verify")) == 2
    error = capsys.readouterr().err
    assert f"`reward` is 'math-verify', which needs the package {package}: pip install 'odp-callbacks[math]'." in error


@pytest.mark.parametrize("timeout", [None, 120.0])
def test_math_verify_judges_alike_in_every_batch(timeout: float | None) -> None:
    """In the verifier's other thread it takes every answer for wrong, because it needs signals."""
    completions = ["It is $\\frac{1}{2}$.", "It is $0.25$."] * 3
    questions = [Question(str(index), {"prompt": "p", "answer": "0.5"}, torch.tensor([1])) for index in range(6)]
    verifier = Verifier(load_reward("math-verify", None), timeout)
    rewards = verifier.score(questions, completions, [[1]] * 6)
    assert rewards == [1.0, 0.0] * 3
    verifier.try_thread(rewards, questions, completions, [[1]] * 6)
    scoring = verifier.open()
    for number, completion in enumerate(completions):
        scoring.add(number, questions[number], completion, [1])
    assert scoring.rewards() == dict(enumerate(rewards))
    verifier.close()
    assert verifier.threaded is False


def test_math_verify_leaves_the_timeout_of_a_reward_running() -> None:
    """It uses the same alarm, and switched it off."""
    reward = load_reward("math-verify", None)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        assert reward(["p"], ["$1$"], answer=["1"]) == [1.0]
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert reward(["p"], ["$1$"], answer=["1"]) == [1.0]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_row_without_an_answer_gets_no_reward() -> None:
    """The text "None" was taken for the answer."""
    for name, completion in (("exact", "None"), ("math-verify", "$1$")):
        reward = load_reward(name, None)
        assert reward(["p"] * 2, [completion] * 2, answer=[None, completion]) == [None, 1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.nn.Linear", "the class Linear was given"),
        ("os.sep", "must be a function of prompts"),
        (
            "os.path.join",
            r"needs the argument 'a', but row 0 of `dataset` has only \['answer', 'prompt'\]; .*`def reward",
        ),
    ],
)
def test_what_is_no_reward_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(path, None, [{"prompt": "p", "answer": "a"}])
