"""Reward functions by their names."""

import sys

import pytest

from odp_callbacks.cli.rewards import load_reward


def test_a_reward_by_its_import_path() -> None:
    assert load_reward("odp_callbacks.cli.rewards.exact", None)(["p"], ["a "], answer=["a"]) == [1.0]


def test_math_verify_compares_values_not_texts() -> None:
    reward = load_reward("math-verify", None, [{"prompt": "p", "answer": "1/2"}])
    chat = [{"role": "assistant", "content": "It is $0.25$."}]
    completions = ["So the result is $\\frac{1}{2}$.", chat]
    assert reward(["p"] * 2, completions, answer=["$0.5$", "$0.5$"]) == [1.0, 0.0]


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"needs the package math_verify: pip install 'odp-callbacks\[math\]'"):
        load_reward("math-verify", None)
