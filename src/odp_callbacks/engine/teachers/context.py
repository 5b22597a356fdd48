"""The context that a teacher is given in place of the student's prompt."""

import string
from collections.abc import Callable, Mapping
from typing import Any

from odp_callbacks.engine.messages import content_text
from odp_callbacks.engine.prompts import Prompt, Row, is_conversational
from odp_callbacks.engine.rows import is_message_list, is_missing, plain

Context = str | Callable[[Row], Prompt]
"""A template over the row's columns, or a function from row to prompt."""
BRACES = r"braces that belong to the text are doubled, as in \boxed{{}}"
"""What to do about braces that name no column."""


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
        return _fill_template(context, row)
    messages: list[Mapping[str, Any]] = list(prompt)  # type: ignore[arg-type]
    user_indices = [message_index for message_index, message in enumerate(messages) if message.get("role") == "user"]
    if not user_indices:
        raise ValueError(f"`context` replaces the last user message, but `prompt` {prompt!r} has none.")
    last_index = user_indices[-1]
    content = _fill_template(context, {**row, "prompt": content_text(messages[last_index].get("content"))})
    messages[last_index] = {**messages[last_index], "content": content}
    return messages


def _fill_template(template: str, row: Row) -> str:
    """Put the columns of a row into a template.

    Raises:
        ValueError: If the template is none, names a column that the row lacks, or a value is no text or number.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"`context` {template!r} cannot be read as a template ({error}); {BRACES}.") from None
    filled = []
    for text, field_name, format_spec, conversion in parts:
        filled.append(text)
        if field_name is None:
            continue
        column = field_name.split(".")[0].split("[")[0]
        if column not in row:
            raise ValueError(
                f"`context` names the column {column!r}, but the row has only {sorted(map(str, row))}; {BRACES}."
            )
        filled.append(_field_text(field_name, conversion, format_spec or "", row))
    return "".join(filled)


def _field_text(field_name: str, conversion: str | None, format_spec: str, row: Row) -> str:
    """The text of one field of a template."""
    formatter = string.Formatter()
    try:
        value, _ = formatter.get_field(field_name, (), row)
        if conversion is None and not format_spec:
            return _as_text(value)
        format_spec = formatter.vformat(format_spec, (), row)
        return str(formatter.format_field(formatter.convert_field(value, conversion), format_spec))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"`context` has the field {{{field_name}}}, which cannot be filled in: {reason}") from error


def _as_text(value: Any) -> str:
    """A value as it stands in a sentence.

    Raises:
        ValueError: If there is nothing, or something that has no text of its own.
    """
    value = plain(value)
    if is_missing(value):
        raise ValueError(f"it is {value!r} in this row; give every row a value, or leave the row out.")
    if is_message_list(value):
        if len(value) > 1:
            raise ValueError("it holds several messages; name the one that is meant, as in {column[0][content]}.")
        return content_text(value[0].get("content"))
    is_in_parts = isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value)
    if is_in_parts:
        return content_text(value)
    if isinstance(value, bytes | set | frozenset | Mapping):
        raise ValueError(f"it is {value!r}, which is no text; an entry can be named, as in {{column[key]}}.")
    return f"{value}"
