"""Chat messages as text: contents in parts are joined, and what is no text is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

WORKING_CONTENT = "give text, or parts such as {'type': 'text', 'text': ...}"
SAYING_KEYS = ("tool_calls", "function_call", "tool_responses", "reasoning_content", "reasoning", "thinking")
"""Keys that a message may have in place of a content."""
MEDIA = frozenset({"image", "image_url", "images", "video", "audio", "input_audio", "file"})
"""Keys under which a part holds something else than text."""


def content_text(content: Any) -> str:
    """The text of a message's content.

    Args:
        content: A text, or parts ``{"type": "text", "text": ...}``.

    Raises:
        ValueError: If there is anything but text, such as an image.

    Examples:
        >>> content_text([{"type": "text", "text": "1 + "}, {"type": "text", "text": "1 ="}])
        '1 + 1 ='
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return _part_text(content)
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return "".join(_part_text(part) for part in content)
    raise ValueError(f"a message's content must be text, but it is {content!r}; {WORKING_CONTENT}.")


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages whose contents are text.

    A message without a content, such as an assistant's that only calls tools, gets an empty one, because a template
    would write "None".

    Args:
        messages: Chat messages; those with text are passed on as they are.

    Raises:
        ValueError: If a content has anything but text, or a message has nothing at all.
    """
    converted: list[Mapping[str, Any]] = []
    for position, message in enumerate(messages):
        content = message.get("content")
        says_something_else = any(message.get(key) for key in SAYING_KEYS)
        if isinstance(content, str) or ("content" not in message and says_something_else):
            converted.append(message)
            continue
        try:
            text = "" if content is None and says_something_else else content_text(content)
        except ValueError as error:
            raise ValueError(f"message {position} (role {message['role']!r}) cannot be used: {error}") from error
        converted.append({**message, "content": text})
    return converted


def messages_in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with their texts as parts, for templates that read nothing else."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in ("text", None) or not isinstance(part.get("text"), str):
        raise ValueError(
            f"its content has a part of type {kind or type(part).__name__!r}, and only text can be measured; "
            f"{WORKING_CONTENT}."
        )
    # Arrow gives every part the keys of all others, with None where they do not belong.
    if extra := sorted(str(key) for key in part.keys() - {"type", "text"} if part[key] is not None and key in MEDIA):
        raise ValueError(f"its content has a part with {extra[0]!r}, and only text can be measured; {WORKING_CONTENT}.")
    return str(part["text"])
