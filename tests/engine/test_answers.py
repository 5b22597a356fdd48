"""Rules that find the answer in a text."""

import pytest

from odp_callbacks.engine.answers import (
    ANSWER_RULES,
    boxed_answer,
    choice_letter,
    last_number,
    same_answer,
    stated_answer,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24 clips", "24"),
        ("#### 1,234", "1234"),
        ("it costs $1,234.50.", "1234.5"),
        ("-$1,000", "-1000"),
        ("7-3", "3"),
        ("(-3)", "-3"),
        ("\N{MINUS SIGN}4", "-4"),
        ("$.5", "0.5"),
        ("50%", "50"),
        ("2e6", "2000000"),
        ("007", "7"),
        ("-0.0", "0"),
        ("12345678901234567890123456789012.0", "12345678901234567890123456789012"),
        ("12,34", "34"),
        ("H2O", None),
        ("", None),
        ("<think>7</think> 8, or so", "8"),
        ("8 <think>7</think> none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a{b{c}}d} \boxed{cut {off}", "a{b{c}}d"),
        (r"\boxed{}", None),
        ("1", None),
    ],
)
def test_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 3\nNo. ANSWER: 4.\nDone.", "4"),
        ("**Answer:** Paris", "Paris"),
        ("**Answer: Paris**", "Paris"),
        ("Final answer:\nParis", "Paris"),
        ("The correct answer is: Paris", "Paris"),
        ("The answers: many", None),
        ("Answer:", None),
    ],
)
def test_stated_answer(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("There is no proof.\nAnswer: Yes, it is", "yes"),
        ("Answer: maybe", None),
        ("True.", "yes"),
        ("It cannot be. So: **no**", "no"),
        ("Yes. But then again, no", None),
        ("There is no proof that it is", None),
        ("", None),
    ],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert yes_or_no(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A is wrong, B is right. Answer: B because", "B"),
        ("Answer: (c)", "C"),
        ("**Answer:** **D**", "D"),
        ("Answer: A city", None),
        ("Answer: A", "A"),
        ("B. Paris", "B"),
        ("(B)", "B"),
        ("A city", None),
        ("b", None),
        ("I think so", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def test_equal_numbers_are_the_same_answer_however_they_are_written() -> None:
    assert same_answer("1,000.0", "$1000")
    assert same_answer("New York", "new  york")
    assert not same_answer("0.5", "1/2")
    assert not same_answer(None, "None")


def test_every_rule_takes_hostile_texts() -> None:
    for rule in ANSWER_RULES.values():
        for text in (r"\boxed{" * 2000, "Answer:" * 2000, "," * 20000, "1," * 20000, "9e99 " * 1000, "\0\ud800"):
            rule(text)
