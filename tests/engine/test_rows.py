"""Questions in every form that people have them in."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict

from odp_callbacks.engine import diagnose
from odp_callbacks.engine.rows import as_rows
from tests.helpers.models import tiny, word_tokenizer

ROWS = [{"prompt": "a b", "answer": "c"}, {"prompt": "d", "answer": "e"}]
COLUMNS = {"prompt": ["a b", "d"], "answer": ["c", "e"]}
CHAT = [{"role": "user", "content": "a b"}]
Pair = namedtuple("Pair", ["prompt", "answer"])


@dataclass
class Item:
    prompt: str
    answer: str


class MapStyle(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return ROWS[index]


class FakePolars:
    """As much of a polars table as is used, which need not be installed."""

    columns = tuple(COLUMNS)

    def __len__(self) -> int:
        return 2

    def row(self, index: int, *, named: bool) -> dict[str, str]:
        assert named
        return ROWS[index]


FakePolars.__module__, FakePolars.__name__ = "polars.dataframe.frame", "DataFrame"

FORMS: dict[str, Any] = {
    "list": ROWS,
    "tuple": tuple(ROWS),
    "pandas table": pandas.DataFrame(COLUMNS, index=[7, 3]),
    "polars table": FakePolars(),
    "arrow table": pyarrow.table(COLUMNS),
    "columns": COLUMNS,
    "columns of arrays": {name: np.array(column) for name, column in COLUMNS.items()},
    "columns of series": {name: pandas.Series(column, index=[7, 3]) for name, column in COLUMNS.items()},
    "columns as tuples": {name: tuple(column) for name, column in COLUMNS.items()},
    "pandas rows": [pandas.Series(row) for row in ROWS],
    "named tuples": [Pair(**row) for row in ROWS],
    "data classes": [Item(**row) for row in ROWS],
    "structured array": np.array([("a b", "c"), ("d", "e")], dtype=[("prompt", "U9"), ("answer", "U9")]),
    "dataset": Dataset.from_list(ROWS),
    "map-style dataset": MapStyle(),
}
PROMPTS: dict[str, Any] = {
    "list of texts": COLUMNS["prompt"],
    "array of texts": np.array(COLUMNS["prompt"]),
    "series of texts": pandas.Series(COLUMNS["prompt"], index=[7, 3]),
    "column of a dataset": Dataset.from_list(ROWS)["prompt"],
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_rows(given: Any) -> None:
    rows = as_rows(given)
    assert list(rows) == ROWS
    assert len(rows) == 2
    assert rows[-1] == ROWS[1]
    assert rows[:1] == ROWS[:1]
    assert all(type(row["answer"]) is str for row in rows)
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("given", PROMPTS.values(), ids=PROMPTS)
def test_bare_prompts_are_rows_with_nothing_else(given: Any) -> None:
    assert list(as_rows(given)) == [{"prompt": "a b"}, {"prompt": "d"}]


def test_bare_conversations_are_rows_with_nothing_else() -> None:
    assert list(as_rows([CHAT])) == [{"prompt": CHAT}]


def test_mappings_are_passed_on_as_they_are() -> None:
    assert as_rows(ROWS)[1] is ROWS[1]
    assert as_rows(as_rows(ROWS))[1] is ROWS[1]


def test_numbers_of_a_table_keep_their_types_and_missing_values_are_none() -> None:
    table = pandas.DataFrame(
        {
            "prompt": ["a", "b"],
            "level": [1, 2],
            "share": [0.5, float("nan")],
            "answer": ["x", None],
            "ok": [True, False],
        }
    )
    first, second = as_rows(table)
    assert first == {"prompt": "a", "level": 1, "share": 0.5, "answer": "x", "ok": True}
    assert type(first["level"]) is int
    assert second["answer"] is None
    assert second["share"] != second["share"]


def test_conversations_of_a_parquet_file_are_lists(tmp_path: Any) -> None:
    """pandas reads lists of structures as arrays of objects."""
    Dataset.from_list([{"prompt": CHAT, "answer": "c"}]).to_parquet(tmp_path / "rows.parquet")
    assert list(as_rows(pandas.read_parquet(tmp_path / "rows.parquet"))) == [{"prompt": CHAT, "answer": "c"}]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (DatasetDict({"train": Dataset.from_list(ROWS)}), ValueError, r"the splits \['train'\]; give one of them"),
        ({"train": pandas.DataFrame(COLUMNS)}, ValueError, r"`prompts\['train'\]`"),
        (ROWS[0], ValueError, r"is a single row; give a list of rows, `\[row\]`"),
        ({"prompt": CHAT, "answer": "c"}, ValueError, "is a single row"),
        ({"question": ["a"]}, ValueError, r"needs a column 'prompt', but has \['question'\]"),
        (
            {"prompt": ["a", "b"], "answer": ["c"]},
            ValueError,
            "columns of different lengths: {'prompt': 2, 'answer': 1}",
        ),
        ({"prompt": ["a", "b"], "level": 3}, ValueError, "its column 'level' is 3; give a list"),
        ("a b", TypeError, "but the text 'a b' was given"),
        (iter(ROWS), TypeError, r"give a list of them, `list\(...\)`"),
        (
            Dataset.from_list(ROWS).to_iterable_dataset(),
            TypeError,
            r"it is streamed, .* `list\(dataset.take\(1000\)\)`",
        ),
        (3, TypeError, "`prompts` must be rows with `len` and indexing, or None, but got 3"),
    ],
)
def test_what_cannot_be_rows_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rows(given)


@pytest.mark.parametrize("item", [3, None, ["a", "b"], b"a"])
def test_what_cannot_be_a_row_is_refused_by_its_place(item: Any) -> None:
    with pytest.raises(ValueError, match="in row 1, which is a"):
        list(as_rows([ROWS[0], item]))


@pytest.mark.parametrize("given", [*FORMS.values()], ids=FORMS)
def test_columns_reach_the_reward_in_every_form(given: Any) -> None:
    answers: set[tuple[str, str]] = set()

    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        answers.update(zip(prompts, answer, strict=True))
        return [float(len(completion) % 2) for completion in completions]

    options = {"max_new_tokens": 2, "rollouts_per_question": 1, "budget": 0, "influence": False}
    report = diagnose(tiny("gpt2"), word_tokenizer(), given, reward, "base", **options)
    assert answers == {("a b", "c"), ("d", "e")}
    assert {rollout.question for rollout in report.rollouts} == {"0", "1"}
