"""How messages are rendered: options, tools and templates, of a configuration, of a training and of a row."""

import json
from typing import Any

import pytest

from odp_callbacks.engine import Probe, ProbeConfig, Teacher
from odp_callbacks.engine.chat_template import ChatTemplate, reads_only_parts
from odp_callbacks.engine.prompts import as_questions, encode_prompt
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.probes import word_reward

CHAT = [{"role": "user", "content": "a b"}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %} {{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% if enable_thinking is defined and not enable_thinking %} e{% endif %}"
    "{% endif %}"
)
OTHER_TEMPLATE = "{{ bos_token }}{% for m in messages %} f {{ m.content }}{% endfor %}"
PARTS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }}"
    "{% for part in m.content %}{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "d", "parameters": {"type": "object", "properties": {}}}}


def c() -> int:
    """Return something.

    Returns:
        A number.
    """
    return 1


def tokenizer_with(template: str = TEMPLATE) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(row: dict[str, Any], template: ChatTemplate | None = None, **config: Any) -> str:
    """The text of a row's prompt in a probe."""
    probe = Probe(
        tiny("gpt2"),
        tokenizer_with(),
        word_reward,
        {"hint": Teacher("{prompt} c")},
        ProbeConfig(max_new_tokens=8, **config),
        training_template=template or ChatTemplate(),
    )
    (question,) = probe.encode([row])
    teacher_text = tokenizer_with().decode(question.teacher_prompt_ids["hint"])
    text: str = tokenizer_with().decode(question.prompt_ids)
    assert teacher_text == text.replace("a b", "a b c"), "the teacher's prompt is rendered as the student's"
    return text


THINKING, NOT_THINKING = "<s> user a b assistant", "<s> user a b assistant e"


def test_options_come_from_the_configuration_the_training_or_the_row() -> None:
    off = {"enable_thinking": False}
    assert rendered({"prompt": CHAT}) == THINKING
    assert rendered({"prompt": CHAT}, chat_template_kwargs=off) == NOT_THINKING
    assert rendered({"prompt": CHAT}, ChatTemplate(arguments=off)) == NOT_THINKING
    assert rendered({"prompt": CHAT, "chat_template_kwargs": off}) == NOT_THINKING
    assert rendered({"prompt": CHAT, "chat_template_kwargs": json.dumps(off)}) == NOT_THINKING
    assert rendered({"prompt": CHAT, "chat_template_kwargs": None}, ChatTemplate(arguments=off)) == NOT_THINKING
    # The configuration replaces the training's, and a row's own replace both.
    assert rendered({"prompt": CHAT}, ChatTemplate(arguments=off), chat_template_kwargs={}) == THINKING
    on = {"enable_thinking": True}
    assert rendered({"prompt": CHAT, "chat_template_kwargs": on}, chat_template_kwargs=off) == THINKING
    # Where a training does not read a row's columns, the probe does not, either.
    assert rendered({"prompt": CHAT, "chat_template_kwargs": off}, ChatTemplate(reads_rows=False)) == THINKING


@pytest.mark.parametrize("tools", [[TOOL], [c]], ids=["schema", "function"])
def test_tools_come_from_the_configuration_the_training_or_the_row(tools: list[Any]) -> None:
    name = "c" if tools == [c] else "d"
    expected = f"<s> {name} user a b assistant"
    assert rendered({"prompt": CHAT}, tools=tools) == expected
    assert rendered({"prompt": CHAT}, ChatTemplate(tools=tools)) == expected
    assert rendered({"prompt": CHAT, "tools": tools}) == expected
    assert rendered({"prompt": CHAT, "tools": []}, ChatTemplate(tools=tools)) == THINKING
    if tools == [TOOL]:
        assert rendered({"prompt": CHAT, "tools": json.dumps(tools)}) == expected


def test_another_template_takes_the_place_of_the_tokenizer_s() -> None:
    for options in ({"chat_template": OTHER_TEMPLATE}, {"template": ChatTemplate(OTHER_TEMPLATE)}):
        assert rendered({"prompt": CHAT}, **options) == "<s> f a b"
    assert rendered({"prompt": CHAT, "chat_template_kwargs": {"chat_template": OTHER_TEMPLATE}}) == "<s> f a b"
    # It also serves a tokenizer that has none.
    tokenizer = word_tokenizer(chat=False)
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT, ChatTemplate(OTHER_TEMPLATE))) == "<s> f a b"


def test_an_assistant_s_last_message_is_continued_or_followed() -> None:
    prompt = [*CHAT, {"role": "assistant", "content": "c"}]
    tokenizer = tokenizer_with()
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<s> user a b assistant c"
    followed = encode_prompt(tokenizer, prompt, ChatTemplate(continues_assistant=False))
    assert tokenizer.decode(followed) == "<s> user a b assistant c assistant"


def test_templates_that_read_only_parts_get_parts() -> None:
    """Such a template drops a text silently."""
    assert reads_only_parts(PARTS_TEMPLATE)
    assert not reads_only_parts(TEMPLATE)
    assert not reads_only_parts("{{ raise_exception('no') }}")
    tokenizer = tokenizer_with(PARTS_TEMPLATE)
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)) == THINKING


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chat_template_kwargs", [1], "'chat_template_kwargs' must be a mapping of options"),
        ("chat_template_kwargs", "{no json", "'chat_template_kwargs' must be JSON"),
        ("tools", ["hammer"], "'tools' must be a list of JSON schemas"),
        ("tools", 3, "'tools' must be a list of JSON schemas"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(column: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"question 0 cannot be used: the column {message}"):
        as_questions([{"prompt": CHAT, column: value}], tokenizer_with())
    # A prompt that is a text needs no template, so that its columns are only columns.
    assert as_questions([{"prompt": "a", column: value}], tokenizer_with())[0].row[column] == value


@pytest.mark.parametrize(
    ("option", "value"), [("chat_template", 3), ("chat_template_kwargs", [1]), ("tools", c), ("tools", ["hammer"])]
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        ProbeConfig(**{option: value})


def test_records_hold_the_options() -> None:
    settings = ProbeConfig(chat_template_kwargs={"enable_thinking": False}, tools=[c, TOOL]).settings()
    assert settings["chat_template_kwargs"] == "{'enable_thinking': False}"
    assert settings["tools"] == str(["c", repr(TOOL)])
