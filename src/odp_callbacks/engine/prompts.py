"""From rows to questions: the prompts of student and teachers as token ids.

A row is a mapping in TRL's convention. Its ``prompt`` is a string or a list of chat messages; the reward function and
the teachers' contexts receive every other column.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.chat_template import CONTENT_IN_PARTS, ChatTemplate
from odp_callbacks.engine.rows import as_rows, has_numpy, is_message_list, is_table, plain

Row = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]
DEFAULT_TEMPLATE = ChatTemplate()
"""The tokenizer's own template, with its own defaults and a row's options."""


@dataclass(frozen=True)
class Question:
    """A row and its encoded prompt.

    Attributes:
        id: Identifies the question in records: the row's ``id``, or its index in the data.
        row: The row as it was given.
        prompt_ids: ``(P,)`` int64 on the CPU, without padding.
        teacher_prompt_ids: For each teacher by name, the prompt that it is given, ``(P',)`` int64; empty until a probe
            has encoded them.
        template: How messages are rendered for this row.
    """

    id: str
    row: Row
    prompt_ids: Tensor
    teacher_prompt_ids: Mapping[str, Tensor] = field(default_factory=dict)
    template: ChatTemplate = DEFAULT_TEMPLATE


def is_conversational(prompt: object) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer in what transformers calls a processing class: a tokenizer, or a multimodal processor with one.

    Args:
        processing_class: A transformers tokenizer or processor.

    Returns:
        The tokenizer. If a processor has a chat template, it is a copy with that template; the processor is as before.

    Raises:
        ValueError: If there is no tokenizer, as in a feature extractor.
    """
    inner = getattr(processing_class, "tokenizer", None)
    tokenizer = processing_class if inner is None else inner
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(
            "`tokenizer` must be a transformers tokenizer, or a processor that holds one, but "
            f"{type(processing_class).__name__} was given; give the student's tokenizer as `tokenizer`."
        )
    template = getattr(processing_class, "chat_template", None)
    if inner is not None and template:
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = template
        setattr(tokenizer, CONTENT_IN_PARTS, True)
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: Prompt, template: ChatTemplate = DEFAULT_TEMPLATE) -> Tensor:
    """Encode a prompt: a string with the tokenizer, messages with its chat template.

    The chat template writes its own special tokens, and no others are added. If a conversation ends with an
    assistant's message, the response continues this message.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: A string, or a list of ``{"role": ..., "content": ...}``. A content in parts must have text only.
        template: How messages are rendered.

    Returns:
        ``(P,)`` int64.

    Raises:
        ValueError: If the prompt is empty, of another type, holds anything but text, or needs a chat template that the
            tokenizer lacks.
    """
    prompt = plain(prompt)
    if isinstance(prompt, str):
        _check_text(prompt)
        token_ids = tokenizer(prompt)["input_ids"]
    elif is_message_list(prompt):
        for message in prompt:
            _check_text(str(message.get("content")))
        token_ids = template.render(tokenizer, prompt)
    else:
        raise ValueError(
            f"`prompt` must be a string or a non-empty list of messages with a 'role', but {prompt!r} was given."
        )
    if len(token_ids) == 0:
        raise ValueError(f"`prompt` {prompt!r} has no tokens; a prompt needs at least one (a BOS token is enough).")
    return torch.as_tensor(token_ids, dtype=torch.long)


def as_questions(
    rows: Sequence[Row],
    tokenizer: Any,
    ids: Sequence[str] | None = None,
    template: ChatTemplate = DEFAULT_TEMPLATE,
) -> list[Question]:
    """Encode rows.

    Args:
        rows: Mappings with a ``prompt``, or with ``input_ids`` and, if these are padded, ``attention_mask``; or
            anything else that :func:`~odp_callbacks.engine.rows.as_rows` accepts.
        tokenizer: A transformers tokenizer.
        ids: Identifies each question; by default its ``id`` column, or its index.
        template: How messages are rendered.

    Returns:
        A question for each row.

    Raises:
        ValueError: If a row has no prompt, or one that cannot be encoded; the message names the row.
    """
    return [
        as_question(row, tokenizer, number, None if ids is None else ids[number], template)
        for number, row in enumerate(as_rows(rows))
    ]


def as_question(
    row: Row, tokenizer: Any, number: int, question_id: str | None = None, template: ChatTemplate = DEFAULT_TEMPLATE
) -> Question:
    """Encode one row; the arguments are those of :func:`as_questions`.

    Args:
        row: The row.
        tokenizer: A transformers tokenizer.
        number: Its index.
        question_id: Identifies the question; None for its ``id`` column, or its index.
        template: How messages are rendered.

    Raises:
        ValueError: If it has no prompt, or one that cannot be encoded.
    """
    if question_id is None:
        question_id = str(number if row.get("id") is None else row["id"])
    if "prompt" not in row and "input_ids" not in row:
        raise ValueError(
            f"each row needs a column 'prompt' (or 'input_ids'), but row {number} has {sorted(map(str, row))}"
            f"{prompt_remedy(row)}."
        )
    if "prompt" in row and has_numpy(row["prompt"]):
        row = {**row, "prompt": plain(row["prompt"])}
    try:
        row_template = template
        if is_message_list(row.get("prompt")):
            _check_images(row)
            row_template = template.for_row(row)
        if "prompt" in row:
            prompt_ids = encode_prompt(tokenizer, row["prompt"], row_template)
        else:
            prompt_ids = _unpadded(row)
            # The text has no BOS, because the tokenizer adds one when it encodes a teacher's context.
            has_bos = int(prompt_ids[0] == getattr(tokenizer, "bos_token_id", None))
            row = {**row, "prompt": tokenizer.decode(prompt_ids[has_bos:])}
    except Exception as error:  # of the tokenizer, or of its template
        raise unusable(f"question {question_id}", error) from error
    return Question(question_id, row, prompt_ids, template=row_template)


def unusable(description: str, error: Exception) -> ValueError:
    """The error for a question that cannot be used.

    Args:
        description: Which one it is, for the message: ``"question 3"``.
        error: Why.
    """
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ValueError(f"{description} cannot be used: {reason}")


def prompt_remedy(columns: Collection[str]) -> str:
    """What would make a prompt of a row that has none, as the end of a sentence.

    Args:
        columns: Names of the row's columns.
    """
    if "role" in columns:
        return "; it is a message, so give the whole conversation as a row, {'prompt': [messages]}"
    for name in ("messages", "conversations"):
        if name in columns:
            return f"; a prompt is the part before the answer, such as {{'prompt': row[{name!r}][:-1]}}"
    return ""


def _check_images(row: Row) -> None:
    """Raise ``ValueError`` if a conversation has images in columns of their own, where TRL's trainers look for them."""
    for name in ("image", "images"):
        value = row.get(name)
        is_empty = value is None or isinstance(value, str) or (hasattr(value, "__len__") and not len(value))
        if not is_empty:
            raise ValueError(f"it has the column {name!r}, and only text can be measured; leave the column out.")


def _check_text(text: str) -> None:
    """Raise ``ValueError`` if a text has half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`prompt` has the lone surrogate {text[error.start]!r} at character {error.start}, which is no text and "
            "cannot be encoded; remove it, or replace it: text.encode('utf-8', 'replace').decode()."
        ) from None


def _unpadded(row: Row) -> Tensor:
    """The tokens of ``input_ids`` without padding, which may be on the left or on the right."""
    token_ids = torch.as_tensor(row["input_ids"], dtype=torch.long).cpu()
    if "attention_mask" in row:
        token_ids = token_ids[torch.as_tensor(row["attention_mask"]).cpu().bool()]
    if token_ids.numel() == 0:
        raise ValueError("each row's `input_ids` need at least one token, but a row has only padding.")
    return token_ids


def rows_from_batch(batch: object) -> list[Row]:
    """The rows of a training batch.

    Args:
        batch: A list of rows or prompts, a table, one row, or a mapping from column to a list (or tensor) with one
            entry for each row. Entries of another length, such as a loss, are left out.

    Returns:
        The rows.

    Raises:
        ValueError: If the batch is neither.
    """
    if isinstance(batch, Mapping) and (isinstance(batch.get("prompt"), str) or is_message_list(batch.get("prompt"))):
        return [batch]
    if isinstance(batch, Mapping) and ("prompt" in batch or "input_ids" in batch):
        row_count = len(batch["prompt"] if "prompt" in batch else batch["input_ids"])
        columns = {
            name: column for name, column in batch.items() if hasattr(column, "__len__") and len(column) == row_count
        }
        return [{name: column[row_index] for name, column in columns.items()} for row_index in range(row_count)]
    if is_table(batch) or (isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch)):
        try:
            return list(as_rows(batch, "batch"))
        except ValueError:  # its items are no rows
            pass
    raise ValueError(
        "questions can be taken from the current batch only if it is a list of rows or a mapping of columns with "
        f"'prompt' or 'input_ids', but it is a {type(batch).__name__}; give `prompts` instead."
    )


def context_limit(model: nn.Module) -> int | None:
    """Longest sequence that the model's configuration allows, in tokens; None if it states no limit."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit is not None and limit > 0 else None


class QuestionLengthError(ValueError):
    """A prompt leaves no room for a response in a model's context."""


def check_length(prompt_ids: Tensor, max_new_tokens: int, model: nn.Module, description: str) -> None:
    """Raise :class:`QuestionLengthError` if prompt and response together exceed the model's context.

    Args:
        prompt_ids: ``(P,)``, the prompt.
        max_new_tokens: Limit of the response, in tokens.
        model: The model that reads both.
        description: What the prompt is, for the message: ``"question 3"``.

    Raises:
        QuestionLengthError: If they do.
    """
    limit = context_limit(model)
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise QuestionLengthError(
            f"{description} has {len(prompt_ids)} tokens and `max_new_tokens` is {max_new_tokens}, together more than "
            f"the model's context of {limit}; shorten the question or lower `max_new_tokens`."
        )
