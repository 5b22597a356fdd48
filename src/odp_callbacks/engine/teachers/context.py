"""The context that a teacher is given in place of the student's prompt."""

from collections.abc import Callable, Mapping
from typing import Any

from odp_callbacks.engine.messages import content_text
from odp_callbacks.engine.prompts import Prompt, Row, is_conversational
from odp_callbacks.engine.templates import fill_template

Context = str | Callable[[Row], Prompt]
"""A template over the row's columns, or a function from row to prompt."""


def prompt_in_context(context: Context | None, row: Row) -> Prompt:
    r"""The prompt that a teacher with this context is given for ``row``.

    Args:
        context: A template, a function, or None for the row's own prompt; see
            :class:`~odp_callbacks.engine.teachers.Teacher`.
        row: A row with a ``prompt``.

    Returns:
        A string or messages; the row is not changed.

    Raises:
        ValueError: If the template names a column that the row lacks, or the conversation has no user message.

    Examples:
        >>> prompt_in_context("The answer is {answer}.\n{prompt}", {"prompt": "1 + 1 =", "answer": "2"})
        'The answer is 2.\n1 + 1 ='
    """
    prompt: Prompt = row["prompt"]
    if context is None:
        return prompt
    if callable(context):
        return context(row)
    if not is_conversational(prompt):
        return fill_template(context, row)
    messages: list[Mapping[str, Any]] = list(prompt)  # type: ignore[arg-type]
    user_indices = [message_index for message_index, message in enumerate(messages) if message.get("role") == "user"]
    if not user_indices:
        raise ValueError(f"`context` replaces the last user message, but `prompt` {prompt!r} has none.")
    last_index = user_indices[-1]
    content = fill_template(context, {**row, "prompt": content_text(messages[last_index].get("content"))})
    messages[last_index] = {**messages[last_index], "content": content}
    return messages
