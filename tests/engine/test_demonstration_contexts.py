"""Contexts of demonstrations."""

from typing import Any

import pytest

from odp_callbacks.engine.teachers import Teacher, as_teachers
from odp_callbacks.engine.teachers.demonstration_contexts import demonstration_context, named_context

ROW = {
    "prompt": "What is {x}?",
    "demonstrations": ["first {right}", "second right"],
    "wrong_demonstrations": ["first wrong", "second wrong"],
    "summary": "in short",
    "32B_demonstrations": ["by another"],
}


def prompt(name: str, row: Any = ROW) -> Any:
    return as_teachers({"teacher": name})["teacher"].prompt(row)


@pytest.mark.parametrize(
    ("name", "heading", "shown"),
    [
        ("Self-1C", "# Demonstration\n", ["first {right}"]),
        ("self-sum-1c", "# Demonstration\n", ["in short"]),
        ("Self-1C1W", "# Demonstrations (some are wrong and must not be imitated)\n", ["first {right}", "first wrong"]),
        ("Self-Sum-1C1W", "(some are wrong and must not be imitated)", ["in short", "first wrong"]),
        ("self-2c2w", "must not", ["first {right}", "second right", "first wrong", "second wrong"]),
        ("self-0c1w", "(wrong, not to be imitated)", ["first wrong"]),
        ("Self-1C (32B)", "# Demonstration\n", ["by another"]),
    ],
)
def test_the_papers_contexts(name: str, heading: str, shown: list[str]) -> None:
    text = prompt(name)
    parts = text.split('"""')
    assert text.startswith("What is {x}?\n\n# Demonstration")
    assert heading in parts[0]
    assert [part.strip() for part in parts[1::2]] == shown
    assert all(
        ("a wrong response" in before) == ("wrong" in inside)
        for before, inside in zip(parts[::2], parts[1::2], strict=False)
    )
    assert ("summary" in parts[0]) == ("sum" in name.lower())
    assert parts[-1].strip().startswith("Now answer the question with a response of your own")
    assert "thinking" in parts[-1]


def test_in_a_conversation_they_replace_the_last_user_message() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    system, user = prompt("self-1c", {**ROW, "prompt": chat})
    assert system == chat[0]
    assert user["content"].startswith("q\n\n# Demonstration")


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="names the column 'demonstrations', but the row has only"):
        prompt("self-1c", {"prompt": "q"})
    with pytest.raises(ValueError, match=r"the field \{demonstrations\[2\]\}, which cannot be filled in"):
        prompt("self-3c")
    for arguments in ({"correct": 0}, {"correct": -1, "wrong": 3}, {"correct": 2, "summary": True}):
        with pytest.raises(ValueError, match="`correct`"):
            demonstration_context(**arguments)


def test_other_names_are_templates_or_errors() -> None:
    assert named_context("self-1") is None
    assert named_context("{demonstrations[0]} self-1c") is None
    assert Teacher(demonstration_context(1, 1)).prompt(ROW) == prompt("self-1c1w")
    with pytest.raises(ValueError, match="contexts of demonstrations such as 'self-1c'"):
        as_teachers("self-c")
