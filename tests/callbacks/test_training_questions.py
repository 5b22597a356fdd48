"""Which row a prompt of the training belongs to."""

from typing import Any

import pytest

from odp_callbacks.callbacks import training_questions
from odp_callbacks.callbacks.training_questions import TrainingQuestions
from odp_callbacks.engine.chat_template import ChatTemplate
from tests.helpers.models import BOS, word_tokenizer

A, B, C = 6, 7, 8


class CountingRows(list[Any]):
    """Counts how many rows are read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def test_a_row_is_found_by_its_tokens_and_no_row_is_read_twice() -> None:
    rows, warnings = CountingRows({"prompt": text} for text in ("a", "b", "c a", "a")), []
    questions = TrainingQuestions(rows, word_tokenizer(), ChatTemplate(), warnings.append)
    assert questions.found([BOS, B]) is list.__getitem__(rows, 1)
    assert rows.reads == 2, "no more than needed"
    assert questions.found((BOS, A)) is list.__getitem__(rows, 0), "the first of two equal ones"
    assert questions.found([BOS, C, A]) == {"prompt": "c a"}
    assert warnings == []
    assert questions.found([BOS, C]) is None
    assert rows.reads == 4
    assert "their prompts are not among `prompts`" in warnings[0]
    assert questions.found([BOS, B]) == {"prompt": "b"}
    assert rows.reads == 4


def test_a_long_search_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_questions, "ROWS_READ_AT_ONCE", 2)
    rows = CountingRows({"prompt": "a " * count} for count in range(1, 6))
    questions = TrainingQuestions(rows, word_tokenizer(), ChatTemplate(), lambda message: None)
    prompt = [BOS, A, A, A, A, A]
    found, reads = [], []
    for _ in range(3):
        questions.begin_measurement()
        found += [questions.found([BOS, B, B]), questions.found(prompt)]
        reads.append(rows.reads)
    assert found == [None] * 5 + [{"prompt": "a a a a a "}]
    assert reads == [2, 4, 5], "two in each measurement, however many prompts are searched"


def test_rows_that_cannot_be_encoded_are_passed_over() -> None:
    rows = [{"prompt": ""}, {"text": "a"}, {"prompt": 3}, {"prompt": "a"}]
    questions = TrainingQuestions(rows, word_tokenizer(), ChatTemplate(), lambda message: None)
    assert questions.found([BOS, A]) == {"prompt": "a"}
    assert TrainingQuestions(None, word_tokenizer(), ChatTemplate(), lambda message: None).found([BOS]) is None


def test_a_row_is_checked_against_the_training_s_tokens() -> None:
    warnings: list[str] = []
    questions = TrainingQuestions(None, word_tokenizer(), ChatTemplate(), warnings.append)
    row = {"prompt": "a b"}
    assert questions.checked(row, [BOS, A, B]) is row
    assert questions.checked(row, [A, B]) is None
    assert "its tokens end in [6, 7] and are 2, those of a probe end in [1, 6, 7] and are 3" in warnings[0]
    image = {"prompt": [{"role": "user", "content": "a"}], "image": object()}
    assert questions.checked(image, [BOS]) is None
    assert "only text can be measured" in warnings[1]
