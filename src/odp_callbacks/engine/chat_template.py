"""How a chat template is rendered: its text, its own options, and the tools that it shows the model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from odp_callbacks.engine.messages import messages_in_parts, text_messages

CONTENT_IN_PARTS = "odp_content_in_parts"
"""Attribute of a tokenizer whose chat template is a processor's, and expects the content of messages in parts."""
TRIAL_TEXT = "one two three"
"""What a message says by which a template is tried."""


@dataclass(frozen=True)
class ChatTemplate:
    """The options with which messages become a prompt.

    Attributes:
        template: Template in place of the tokenizer's own; None for the tokenizer's.
        arguments: Options of the template, such as ``{"enable_thinking": False}``.
        tools: Functions or JSON schemas that the template shows the model.
        reads_rows: Whether a row's columns ``chat_template_kwargs`` and ``tools`` count, before the options here.
        continues_assistant: Whether a response continues an assistant's message at the end of a conversation; otherwise
            it is a new message.

    Examples:
        >>> ChatTemplate().for_row({"prompt": [], "chat_template_kwargs": {"enable_thinking": False}}).arguments
        {'enable_thinking': False}
    """

    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] = ()
    reads_rows: bool = True
    continues_assistant: bool = True

    def for_row(self, row: Mapping[str, Any]) -> "ChatTemplate":
        """The options for one row.

        Raises:
            ValueError: If a column of the row cannot be used as it is meant.
        """
        if not self.reads_rows:
            return self
        arguments, tools = _decoded(row, "chat_template_kwargs"), _decoded(row, "tools")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(f"the column 'chat_template_kwargs' must be a mapping of options, but is {arguments!r}.")
        if tools is not None and not are_tools(tools):
            raise ValueError(f"the column 'tools' must be a list of JSON schemas of functions, but is {tools!r}.")
        if not arguments and tools is None:
            return self
        return replace(
            self,
            arguments={**self.arguments, **(arguments or {})},
            tools=self.tools if tools is None else list(tools),
        )

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation; the template writes its own special tokens, and no others are added.

        Args:
            tokenizer: A transformers tokenizer.
            messages: Chat messages with a ``role``.

        Raises:
            ValueError: If there is no template, or a message holds anything but text.
        """
        own_template = self.template or getattr(tokenizer, "chat_template", None)
        if not own_template and not self.arguments.get("chat_template"):
            raise ValueError(
                "`prompt` is a list of messages, but `tokenizer` has no chat template; "
                "set `tokenizer.chat_template` or give prompts as strings."
            )
        conversation: list[Any] = list(text_messages(messages))
        is_continued = self.continues_assistant and conversation[-1]["role"] == "assistant"
        expects_parts = getattr(tokenizer, CONTENT_IN_PARTS, False)
        if expects_parts and isinstance(own_template, str):
            expects_parts = not writes_parts_as_they_are(own_template)
        if expects_parts or (isinstance(own_template, str) and reads_only_parts(own_template)):
            conversation = messages_in_parts(conversation)
        options: dict[str, Any] = {
            **({"chat_template": self.template} if self.template else {}),
            **({"tools": list(self.tools)} if self.tools else {}),
            "add_generation_prompt": not is_continued,
            "continue_final_message": is_continued,
            **self.arguments,
            "return_dict": False,
        }
        token_ids: list[int] = tokenizer.apply_chat_template(conversation, **options)
        return token_ids


@lru_cache(maxsize=64)
def writes_parts_as_they_are(template: str) -> bool:
    """Whether a template writes the list itself where a content is given in parts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    message = {"role": "user", "content": TRIAL_TEXT}
    names = {f"{name}_token": "" for name in ("bos", "eos", "pad", "unk")}
    try:
        in_parts = render_jinja_template(conversations=[messages_in_parts([message])], chat_template=template, **names)[
            0
        ][0]
    except Exception:  # a template that this trial does not fit
        return False
    return "'type'" in in_parts or '"type"' in in_parts


@lru_cache(maxsize=64)
def reads_only_parts(template: str) -> bool:
    """Whether a template drops a content that is a text, and writes one that is given in parts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    message = {"role": "user", "content": TRIAL_TEXT}
    names = {f"{name}_token": "" for name in ("bos", "eos", "pad", "unk")}
    try:
        as_text, in_parts = (
            render_jinja_template(conversations=[conversation], chat_template=template, **names)[0][0]
            for conversation in ([message], messages_in_parts([message]))
        )
    except Exception:  # a template that this trial does not fit; it gets texts, as most templates do
        return False
    return TRIAL_TEXT not in as_text and TRIAL_TEXT in in_parts


def _decoded(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, also where it was stored as JSON."""
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"the column {column!r} must be JSON or a value, but is {value[:60]!r}.") from error


def are_tools(tools: Any) -> bool:
    """Whether this is a list of functions or of their JSON schemas."""
    is_list = isinstance(tools, Sequence) and not isinstance(tools, str | bytes)
    return is_list and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
