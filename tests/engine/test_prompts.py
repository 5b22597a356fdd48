import numpy as np
import pandas
import pytest
import torch

from odp_callbacks.engine.prompts import (
    as_questions,
    check_length,
    context_limit,
    encode_prompt,
    is_conversational,
    rows_from_batch,
)
from odp_callbacks.engine.teachers import Teacher, teacher_prompt_ids
from tests.helpers.models import BOS, EOS, PAD, WORDS, tiny

A, B, C = (WORDS.index(w) for w in "abc")
USER, ASSISTANT = WORDS.index("user"), WORDS.index("assistant")


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", [BOS, A, B]),
        ("", [BOS]),
        ([message("user", "a")], [BOS, USER, A, EOS, ASSISTANT]),
        ((message("user", "a"), message("assistant", "b c")), [BOS, USER, A, EOS, ASSISTANT, B, C]),
    ],
)
def test_encode_prompt(tokenizer, prompt, expected):
    """Strings with the tokenizer; messages with the template's BOS only; an assistant's last message is continued."""
    ids = encode_prompt(tokenizer, prompt)
    assert ids.dtype == torch.long
    assert ids.tolist() == expected


@pytest.mark.parametrize("prompt", [[], None, 3, ["a"], [{"content": "a"}], b"a"])
def test_other_types_of_prompts_are_refused(tokenizer, prompt):
    with pytest.raises(ValueError, match="`prompt` must be a string or a non-empty list of messages with a 'role'"):
        encode_prompt(tokenizer, prompt)


def test_prompts_need_tokens_and_messages_need_a_template(world):
    with pytest.raises(ValueError, match=r"`prompt` '' has no tokens; a prompt needs at least one"):
        encode_prompt(world.tokenizer, "")
    with pytest.raises(ValueError, match="`tokenizer` has no chat template"):
        encode_prompt(world.tokenizer, [message("user", "a")])


def test_is_conversational():
    assert is_conversational([message("user", "a")])
    assert not is_conversational("a")


def test_questions_have_ids(tokenizer):
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 7}]
    assert [q.id for q in as_questions(rows, tokenizer)] == ["0", "7"]
    assert [q.id for q in as_questions(rows, tokenizer, ["x", "y"])] == ["x", "y"]
    assert as_questions(rows, tokenizer)[1].row is rows[1]


@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize(
    ("ids", "mask"),
    [([PAD, PAD, BOS, A, B], [0, 0, 1, 1, 1]), ([BOS, A, B, PAD], [1, 1, 1, 0]), ([BOS, A, B], None)],
)
def test_padding_on_either_side_is_removed(tokenizer, kind, ids, mask):
    row = {"input_ids": kind(ids)} | ({} if mask is None else {"attention_mask": kind(mask)})
    (question,) = as_questions([row], tokenizer)
    assert question.prompt_ids.tolist() == [BOS, A, B]
    assert question.prompt_ids.dtype == torch.long
    assert question.row["prompt"].split()[-2:] == ["a", "b"]


def test_a_template_over_encoded_rows_adds_no_second_bos(tokenizer):
    (question,) = as_questions([{"input_ids": [BOS, A, B]}], tokenizer)
    assert teacher_prompt_ids(Teacher("{prompt}"), tokenizer, question).tolist() == [BOS, A, B]


def test_rows_without_a_prompt_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"needs a column 'prompt' \(or 'input_ids'\), but row 1 has \['question'\]"):
        as_questions([{"prompt": "a"}, {"question": "b"}], tokenizer)
    with pytest.raises(ValueError, match="`input_ids` need at least one token, but a row has only padding"):
        as_questions([{"input_ids": [PAD], "attention_mask": [0]}], tokenizer)


def test_rows_from_lists_and_mappings():
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    assert rows_from_batch(rows) == rows
    assert rows_from_batch({"prompt": ["a", "b"], "answer": ["1", "2"], "loss": 3.0}) == rows
    tokenized = rows_from_batch(
        {"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.ones(2, 2), "id": [5, 6]}
    )
    assert [(r["input_ids"].tolist(), r["id"]) for r in tokenized] == [([1, 2], 5), ([3, 4], 6)]


@pytest.mark.parametrize("batch", [torch.zeros(2, 2), {"labels": [1]}, [], [1, 2], "ab", None])
def test_other_batches_are_refused(batch):
    with pytest.raises(ValueError, match="questions can be taken from the current batch only if"):
        rows_from_batch(batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_length_is_checked_against_the_context(family):
    model = tiny(family)
    assert context_limit(model) == 64
    check_length(torch.zeros(60), 4, model, "it")
    with pytest.raises(
        ValueError, match=r"question 3 has 61 tokens and `max_new_tokens` is 4, together more than .* 64"
    ):
        check_length(torch.zeros(61), 4, model, "question 3")
    assert context_limit(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("prompt", ["a \ud83d b", [message("user", "a \ud83d b")]], ids=["text", "messages"])
def test_half_of_a_surrogate_pair_is_refused_by_its_row(tokenizer, prompt):
    rows = [{"prompt": "a"}, {"prompt": prompt}]
    with pytest.raises(ValueError, match=r"question 1 cannot be used: .*lone surrogate '\\ud83d' at character 2"):
        as_questions(rows, tokenizer)
    with pytest.raises(ValueError, match=r"question x cannot be used: .*lone surrogate"):
        as_questions(rows[1:], tokenizer, ["x"])


def test_what_a_template_or_tokenizer_raises_names_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="question 1 cannot be used: TemplateError: roles must alternate"):
        as_questions([{"prompt": "a"}, {"prompt": [message("user", "a")]}], tokenizer)


@pytest.mark.parametrize("prompt", [None, [], 3, float("nan"), {"role": "user"}, ["a"]])
def test_rows_whose_prompt_is_none_are_refused_by_their_place(tokenizer, prompt):
    with pytest.raises(ValueError, match="question 1 cannot be used: `prompt` must be a string or a non-empty list"):
        as_questions([{"prompt": "a"}, {"prompt": prompt}], tokenizer)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"messages": [message("user", "a")]}, r"such as {'prompt': row\['messages'\]\[:-1\]}"),
        ({"conversations": []}, r"row\['conversations'\]\[:-1\]"),
        (message("user", "a"), r"give the whole conversation as a row, {'prompt': \[messages\]}"),
    ],
)
def test_what_would_make_a_prompt_is_said(tokenizer, row, remedy):
    with pytest.raises(ValueError, match=f"needs a column 'prompt'.*{remedy}"):
        as_questions([row], tokenizer)


def test_arrays_of_numpy_are_texts_and_messages(tokenizer):
    chat = np.array([message("user", np.str_("a"))], dtype=object)
    questions = as_questions([{"prompt": np.str_("a")}, {"prompt": chat}], tokenizer)
    assert [question.prompt_ids.tolist() for question in questions] == [[BOS, A], [BOS, USER, A, EOS, ASSISTANT]]
    assert questions[1].row["prompt"] == [message("user", "a")]


def test_rows_without_an_id_have_their_place(tokenizer):
    assert [question.id for question in as_questions([{"prompt": "a", "id": None}, {"prompt": "b"}], tokenizer)] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    "batch",
    [
        pandas.DataFrame({"prompt": ["a", "b"], "answer": ["1", "2"]}),
        [pandas.Series({"prompt": "a", "answer": "1"}), pandas.Series({"prompt": "b", "answer": "2"})],
    ],
    ids=["table", "series"],
)
def test_rows_of_batches_of_pandas(batch):
    assert rows_from_batch(batch) == [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


def test_rows_of_a_batch_that_is_one_row_or_a_list_of_prompts():
    row = {"prompt": "ab", "answer": "cd"}
    assert rows_from_batch(row) == [row]
    assert rows_from_batch(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
