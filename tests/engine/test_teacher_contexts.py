"""Templates over a row's columns."""

from typing import Any

import pytest

from odp_callbacks.engine import Teacher

ROW = {"prompt": "1 + 1 =", "answer": "2", "level": 3, "share": 0.5, "none": None, "nan": float("nan"), "steps": ["x"],
       "more": {"key": "value"}, "braces": "{answer}"}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"\boxed{{}} {prompt}", r"\boxed{} 1 + 1 ="),
        (r"\boxed{{{answer}}}", r"\boxed{2}"),
        ("{level}, {share:.2f}, {answer!r}, {steps[0]}, {more[key]}", "3, 0.50, '2', x, value"),
        ("{braces}", "{answer}"),
        ("no field", "no field"),
    ],
)
def test_templates_are_filled_in(template: str, expected: str) -> None:
    assert Teacher(template).prompt(ROW) == expected


@pytest.mark.parametrize(
    "template",
    [
        r"\boxed{}",
        r"\boxed{42}",
        '{"answer": 1}',
        "{prompt",
        "prompt}",
        "{ {prompt}",
        r"\frac{1}{2} {prompt}",
        "{x + y}",
    ],
)
def test_literal_braces_are_explained(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"`context` .*braces that belong to the text are doubled, as in \\boxed\{\{\}\}"
    ):
        Teacher(template).prompt(ROW)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{none}", "it is None in this row"),
        ("{nan}", "it is nan in this row"),
        ("{more}", "which is no text; an entry can be named"),
        ("{steps[4]}", "IndexError"),
        ("{answer.missing}", "AttributeError"),
        ("{answer:.2f}", "Unknown format code"),
        ("{answer!z}", "Unknown conversion"),
    ],
)
def test_values_that_are_no_text_are_not_written_as_one(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"`context` .*{reason}"):
        Teacher(template).prompt(ROW)


def test_the_columns_of_a_conversation_are_those_of_its_last_user_message() -> None:
    chat: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Teacher("{prompt} c").prompt({"prompt": chat}) == [{"role": "user", "content": "a c"}, chat[1]]
