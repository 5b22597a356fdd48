"""Rewards of responses by a rule."""

import pytest
import torch

from odp_callbacks.engine.answer_rewards import answer_reward, check_references, right_answer
from odp_callbacks.engine.answers import ANSWER_RULES
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rewards import RewardSignatureError, score


@pytest.mark.parametrize(
    ("rule", "reference", "right", "wrong"),
    [
        ("stated", "Paris", "Answer: paris", "Paris"),
        ("boxed", "1/2", r"so \boxed{1 / 2}", "1/2"),
        ("boxed", r"thus \boxed{7}", r"\boxed{7.0}", r"\boxed{8}"),
        ("number", "6 * 7 = 42\n#### 42", "42", "#### 24"),
        ("number", 1234, "It is 1,234.", "1234 or 1"),
        ("yes-no", True, "Answer: yes", "Answer: no"),
        ("yes-no", "no", "No.", "Yes."),
        ("letter", "B", "Answer: (b)", "Answer: C"),
    ],
)
def test_right_and_wrong_responses(rule: str, reference: object, right: str, wrong: str) -> None:
    reward = answer_reward(rule)
    chat = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    assert reward(["q"] * 2, [right, wrong], answer=[reference] * 2) == [1.0, 0.0]
    assert reward(["q"] * 2, chat, answer=[reference] * 2) == [1.0, 0.0]


def test_rows_without_an_answer_get_no_reward() -> None:
    assert answer_reward("number", "target")(["q"] * 2, ["1", "1"], target=[None, "1"]) == [None, 1.0]


def test_the_engine_notices_a_missing_column() -> None:
    question = Question("0", {"prompt": "q", "target": "1"}, torch.tensor([1]))
    assert score(answer_reward("number", "target"), [question], ["1"], [[1]]) == [1.0]
    with pytest.raises(RewardSignatureError, match="needs the argument 'answer'"):
        score(answer_reward("number"), [question], ["1"], [[1]])


@pytest.mark.parametrize(
    ("rule", "reference"), [("number", "Paris"), ("letter", 2), ("yes-no", "maybe"), ("letter", "AB")]
)
def test_a_reference_without_an_answer_is_refused_before_training(rule: str, reference: object) -> None:
    assert right_answer(ANSWER_RULES[rule], reference) is None
    rows = [{"answer": None}, {"answer": reference}]
    with pytest.raises(ValueError, match=f"`reward` '{rule}' finds no answer in the column 'answer' of row 1"):
        check_references(rule, rows)
    with pytest.raises(ValueError, match="reads a column 'target', but row 0 has only"):
        check_references(rule, rows, "target")


def test_a_rule_of_ones_own() -> None:
    def last_word(text: str) -> str | None:
        return text.split()[-1] if text.split() else None

    reward = answer_reward(last_word)
    assert reward.__name__ == "last_word"
    assert reward(["q"] * 2, ["in the end", ""], answer=["end", "end"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="`rule` must be one of"):
        answer_reward("last word")
