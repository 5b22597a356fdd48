"""From rows to questions: the prompts of student and teachers as token ids.

A row is a mapping in TRL's convention. Its ``prompt`` is a string or a list of chat messages; the reward function and
the teachers' contexts receive every other column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A row and its encoded prompt.

    Attributes:
        id: Identifies the question in records: the row's ``id``, or its index in the data.
        row: The row as it was given.
        prompt_ids: ``(P,)`` int64 on the CPU, without padding.
        teacher_prompt_ids: For each teacher by name, the prompt that it is given, ``(P',)`` int64; empty until a probe
            has encoded them.
    """

    id: str
    row: Row
    prompt_ids: Tensor
    teacher_prompt_ids: Mapping[str, Tensor] = field(default_factory=dict)


def is_conversational(prompt: object) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> Tensor:
    """Encode a prompt: a string with the tokenizer, messages with its chat template.

    The chat template writes its own special tokens, and no others are added. If a conversation ends with an
    assistant's message, the response continues this message.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: A string, or a list of ``{"role": ..., "content": ...}``.

    Returns:
        ``(P,)`` int64.

    Raises:
        ValueError: If the prompt is empty, of another type, or needs a chat template that the tokenizer lacks.
    """
    if isinstance(prompt, str):
        token_ids = tokenizer(prompt)["input_ids"]
    elif (
        is_conversational(prompt)
        and prompt
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`prompt` is a list of messages, but `tokenizer` has no chat template; "
                "set `tokenizer.chat_template` or give prompts as strings."
            )
        is_continued = prompt[-1]["role"] == "assistant"
        token_ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=not is_continued, continue_final_message=is_continued, return_dict=False
        )
    else:
        raise ValueError(
            f"`prompt` must be a string or a non-empty list of messages with a 'role', but {prompt!r} was given."
        )
    if len(token_ids) == 0:
        raise ValueError(f"`prompt` {prompt!r} has no tokens; a prompt needs at least one (a BOS token is enough).")
    return torch.as_tensor(token_ids, dtype=torch.long)


def as_questions(rows: Sequence[Row], tokenizer: Any, ids: Sequence[str] | None = None) -> list[Question]:
    """Encode rows.

    Args:
        rows: Mappings with a ``prompt``, or with ``input_ids`` and, if these are padded, ``attention_mask``.
        tokenizer: A transformers tokenizer.
        ids: Identifies each question; by default its ``id`` column, or its index.

    Returns:
        A question for each row.

    Raises:
        ValueError: If a row has no prompt, or one that cannot be encoded.
    """
    questions = []
    for number, row in enumerate(rows):
        if "prompt" in row:
            prompt_ids = encode_prompt(tokenizer, row["prompt"])
        elif "input_ids" in row:
            prompt_ids = _unpadded(row)
            # The text has no BOS, because the tokenizer adds one when it encodes a teacher's context.
            has_bos = int(prompt_ids[0] == getattr(tokenizer, "bos_token_id", None))
            row = {**row, "prompt": tokenizer.decode(prompt_ids[has_bos:])}
        else:
            raise ValueError(
                f"each row needs a column 'prompt' (or 'input_ids'), but row {number} has {sorted(map(str, row))}."
            )
        questions.append(Question(str(row.get("id", number)) if ids is None else ids[number], row, prompt_ids))
    return questions


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
        batch: A list of rows, or a mapping from column to a list (or tensor) with one entry for each row. Entries of
            another length, such as a loss, are left out.

    Returns:
        The rows.

    Raises:
        ValueError: If the batch is neither.
    """
    if isinstance(batch, Mapping) and ("prompt" in batch or "input_ids" in batch):
        row_count = len(batch["prompt"] if "prompt" in batch else batch["input_ids"])
        columns = {
            name: column for name, column in batch.items() if hasattr(column, "__len__") and len(column) == row_count
        }
        return [{name: column[row_index] for name, column in columns.items()} for row_index in range(row_count)]
    if isinstance(batch, Sequence) and batch and all(isinstance(row, Mapping) for row in batch):
        return list(batch)
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


def check_length(prompt_ids: Tensor, max_new_tokens: int, model: nn.Module, description: str) -> None:
    """Raise ``ValueError`` if prompt and response together exceed the model's context.

    Args:
        prompt_ids: ``(P,)``, the prompt.
        max_new_tokens: Limit of the response, in tokens.
        model: The model that reads both.
        description: What the prompt is, for the message: ``"question 3"``.

    Raises:
        ValueError: If they do.
    """
    limit = context_limit(model)
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise ValueError(
            f"{description} has {len(prompt_ids)} tokens and `max_new_tokens` is {max_new_tokens}, together more than "
            f"the model's context of {limit}; shorten the question or lower `max_new_tokens`."
        )
