"""Contents in parts: text is joined, anything else refused."""

from typing import Any

import numpy as np
import pytest

from odp_callbacks.engine import Teacher
from odp_callbacks.engine.messages import content_text, text_messages
from odp_callbacks.engine.prompts import as_questions, encode_prompt
from odp_callbacks.engine.teachers import teacher_prompt_ids
from tests.helpers.models import word_tokenizer

PARTS: list[Any] = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "content",
    [
        PARTS,
        tuple(PARTS),
        np.array(PARTS, dtype=object),
        ["a ", "b"],
        [{"text": "a b"}],
        {"type": "text", "text": "a b"},
        # Arrow gives every part all keys.
        [{"type": "text", "text": "a b", "image": None}],
    ],
    ids=["list", "tuple", "array", "texts", "without type", "one part", "of Arrow"],
)
def test_text_parts_are_joined_in_plain_rows_and_in_contexts(content: Any) -> None:
    tokenizer = word_tokenizer()
    assert encode_prompt(tokenizer, user(content)).tolist() == encode_prompt(tokenizer, user("a b")).tolist()
    (question,) = as_questions([{"prompt": user(content)}], tokenizer)
    (expected,) = as_questions([{"prompt": user("a b")}], tokenizer)
    for teacher in (Teacher("c {prompt}"), Teacher(lambda row: row["prompt"]), Teacher()):
        found = teacher_prompt_ids(teacher, tokenizer, question)
        assert found.tolist() == teacher_prompt_ids(teacher, tokenizer, expected).tolist()


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image"}, "image"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "video", "video": "x"}, "video"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "text", "text": None}, "text"),
        ({"type": "text", "text": "a", "image": "x.png"}, "image"),
        (3, "int"),
    ],
)
def test_other_parts_are_refused_by_message_and_kind(part: Any, kind: str) -> None:
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": [*PARTS, part]}]
    with pytest.raises(ValueError, match=rf"question 0 cannot be used: message 1 \(role 'user'\).*'{kind}'.*only text"):
        as_questions([{"prompt": prompt}], word_tokenizer())
    with pytest.raises(ValueError, match=f"'{kind}'"):
        Teacher("c {prompt}").prompt({"prompt": prompt})


@pytest.mark.parametrize("content", [None, 3, 2.5, b"a"])
def test_contents_that_are_no_text_are_not_written_as_one(content: Any) -> None:
    with pytest.raises(ValueError, match=r"message 0 \(role 'user'\) cannot be used: a message's content must be text"):
        encode_prompt(word_tokenizer(), user(content))


@pytest.mark.parametrize("images", [{"images": [object()]}, {"image": object()}])
def test_images_in_columns_are_refused_where_a_training_would_use_them(images: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"question 0 cannot be used: it has the column 'images?', and only text"):
        as_questions([{"prompt": user("a"), **images}], word_tokenizer())
    as_questions([{"prompt": "a", **images}, {"prompt": user("a"), "images": [], "image": None}], word_tokenizer())


def test_messages_that_call_tools_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "name": "f", "content": "b"}
    assert [message["content"] for message in text_messages([*user("a"), call, result])] == ["a", "", "b"]
    text = word_tokenizer().decode(encode_prompt(word_tokenizer(), [*user("a"), call, result]))
    assert "None" not in text
    assert "<unk>" not in text.replace("<unk> b", "b")  # the role of the tool is not in the vocabulary
    with pytest.raises(ValueError, match="role 'user'"):
        text_messages([{"role": "user"}])


def test_texts_of_contexts_from_columns() -> None:
    row = {"prompt": "a", "solution": [{"role": "assistant", "content": PARTS}], "parts": PARTS}
    assert Teacher("{solution}|{parts}|{prompt}").prompt(row) == "a b|a b|a"
    assert content_text("a") == "a"
