"""Columns made from those of a dataset."""

from typing import Any

import pytest

from odp_callbacks.engine.answer_rewards import answer_reward
from odp_callbacks.engine.dataset_columns import DATASET_PRESETS, preset_rows, with_columns
from odp_callbacks.engine.templates import fill_template

SHAPES: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Ice melts at 0 degrees.", "question": "is ice cold", "answer": True},
    "mmlu": {"question": "2 + 2?", "subject": "algebra", "choices": ["3", "4", "5", "6"], "answer": 1},
    "gsm8k": {"question": "Ann has 1,000 and 234 more.", "answer": "1,000 + 234 = <<1000+234=1234>>1,234\n#### 1,234"},
}


@pytest.mark.parametrize(("preset", "answer"), [("boolq", "yes"), ("mmlu", "B"), ("gsm8k", "1234")])
@pytest.mark.parametrize("chat", [False, True])
def test_presets_make_rows_whose_solution_gets_the_reward(preset: str, answer: str, chat: bool) -> None:
    (row,) = preset_rows([SHAPES[preset]], preset, chat=chat)
    assert row["answer"] == answer
    text = row["prompt"][0]["content"] if chat else row["prompt"]
    assert SHAPES[preset]["question"] in text
    assert answer_reward(DATASET_PRESETS[preset].rule)(["q"], [row["solution"]], answer=[row["answer"]]) == [1.0]


def test_rows_in_other_forms() -> None:
    import pandas as pd
    from datasets import Dataset

    for rows in (pd.DataFrame([SHAPES["mmlu"]]), Dataset.from_list([SHAPES["mmlu"]])):
        (row,) = preset_rows(rows, "mmlu")
        assert "A. 3\nB. 4\nC. 5\nD. 6" in row["prompt"]


ROW = {
    "choices": ["x", "y"],
    "label": 1,
    "text": "1",
    "flag": False,
    "nested": {"text": ["u", "v"]},
    "many": ["z"] * 27,
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{choices:letters}", "A. x\nB. y"),
        ("{choices:numbers}", "1. x\n2. y"),
        ("{nested[text]:letters}", "A. u\nB. v"),
        ("{label:letter of choices} {label:item of choices}", "B y"),
        ("{text:letter of nested[text]} {text:item of nested[text]}", "B v"),
        ("{flag:yes/no} {label:right/wrong}", "no right"),
        ("{text:number} {label:>3}", "1   1"),
    ],
)
def test_formats(template: str, expected: str) -> None:
    assert fill_template(template, ROW) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{passage}", "`columns.prompt` names the column 'passage', but the row has only"),
        ("{label:letter of options}", "names the column 'options'"),
        ("{label:letters}", "a list of choices is needed"),
        ("{flag:letter of choices}", "it is False, but must be the index of one of the 2 entries of 'choices'"),
        ("{many:letters}", "there are more choices than the 26 letters"),
        ("{choices:yes/no}", "which is neither true nor false"),
        ("{text:boxed}", "no answer can be found by the rule 'boxed' in '1'"),
    ],
)
def test_what_does_not_fit_is_said_with_the_row(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"row 0 of `dataset` cannot be used: .*{reason}"):
        with_columns([ROW], {"prompt": template})


@pytest.mark.parametrize("label", [2, -1, "7", 1.5, None])
def test_a_label_out_of_range_is_refused(label: object) -> None:
    with pytest.raises(
        ValueError, match=r"row 1 of `dataset` .*must be the index of one of the 2 entries of 'choices'"
    ):
        with_columns([ROW, {**ROW, "label": label}], {"answer": "{label:letter of choices}"})


def test_new_columns_read_the_row_as_it_was_given() -> None:
    assert with_columns([{"a": "1", "b": "2"}], {"a": "{b}", "b": "{a}"}) == [{"a": "2", "b": "1"}]


def test_a_dataset_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer can be found by the rule 'number'"):
        preset_rows([{**SHAPES["gsm8k"], "answer": "who knows"}], "gsm8k")
    with pytest.raises(ValueError, match=r"`preset` must be one of \['boolq', 'mmlu', 'gsm8k'\]"):
        preset_rows([], "squad")
