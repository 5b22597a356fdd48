"""From rows to questions: what is shown to the student, as token ids.

A row is a mapping in TRL's convention: ``prompt`` is a string, or a list of chat messages; every other column goes to
the reward function and to the teachers' contexts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A row and its encoded prompt.

    Attributes:
        id: Identifies the question in records; the row's ``id`` or its place in the data.
        row: The row as it was given.
        prompt_ids: ``(P,)`` int64 on the CPU, without padding.
    """

    id: str
    row: Row
    prompt_ids: Tensor


def is_conversational(prompt: object) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> Tensor:
    """Encode a prompt: a string as the tokenizer does it, messages through its chat template.

    The chat template writes its own special tokens, so none are added a second time. A conversation that ends with
    an assistant's message is continued, not answered.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: String, or list of ``{"role": ..., "content": ...}``.

    Returns:
        ``(P,)`` int64.

    Raises:
        ValueError: If the prompt is empty, of another type, or needs a chat template that is not there.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif is_conversational(prompt) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`prompt` is a list of messages, but `tokenizer` has no chat template; "
                "set `tokenizer.chat_template` or give prompts as strings."
            )
        answered = prompt[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=not answered, continue_final_message=answered, return_dict=False
        )
    else:
        raise ValueError(
            f"`prompt` must be a string or a non-empty list of messages with a 'role', but {prompt!r} was given."
        )
    if len(ids) == 0:
        raise ValueError(f"`prompt` {prompt!r} has no tokens; a prompt needs at least one (a BOS token will do).")
    return torch.as_tensor(ids, dtype=torch.long)


def as_questions(rows: Sequence[Row], tokenizer: Any, ids: Sequence[str] | None = None) -> list[Question]:
    """Encode rows.

    Args:
        rows: Mappings with a ``prompt``, or with ``input_ids`` and, where those are padded, ``attention_mask``.
        tokenizer: A transformers tokenizer.
        ids: Identifies each question; its ``id`` column or its place by default.

    Raises:
        ValueError: If a row has no prompt, or one that cannot be encoded.
    """
    questions = []
    for number, row in enumerate(rows):
        if "prompt" in row:
            prompt_ids = encode_prompt(tokenizer, row["prompt"])
        elif "input_ids" in row:
            prompt_ids = _unpadded(row)
            # A tokenizer that adds a BOS adds it again when a teacher's context is encoded.
            told = prompt_ids[int(prompt_ids[0] == getattr(tokenizer, "bos_token_id", None)) :]
            row = {**row, "prompt": tokenizer.decode(told)}
        else:
            raise ValueError(
                f"each row needs a column 'prompt' (or 'input_ids'), but row {number} has {sorted(map(str, row))}."
            )
        questions.append(Question(str(row.get("id", number)) if ids is None else ids[number], row, prompt_ids))
    return questions


def _unpadded(row: Row) -> Tensor:
    """The tokens of ``input_ids`` that the attention mask keeps: left or right padding goes."""
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long).cpu()
    if "attention_mask" in row:
        ids = ids[torch.as_tensor(row["attention_mask"]).cpu().bool()]
    if ids.numel() == 0:
        raise ValueError("a row's `input_ids` are empty once its padding is taken off.")
    return ids


def rows_from_batch(batch: object) -> list[Row]:
    """Take the rows out of a training batch.

    Args:
        batch: A list of rows, or a mapping from column to a list (or tensor) with one entry a row.

    Raises:
        ValueError: If the batch is neither.
    """
    if isinstance(batch, Mapping) and ("prompt" in batch or "input_ids" in batch):
        size = len(batch["prompt"] if "prompt" in batch else batch["input_ids"])
        columns = {k: v for k, v in batch.items() if hasattr(v, "__len__") and len(v) == size}
        return [{key: column[i] for key, column in columns.items()} for i in range(size)]
    if isinstance(batch, Sequence) and batch and all(isinstance(row, Mapping) for row in batch):
        return list(batch)
    raise ValueError(
        "questions can be taken from the current batch only if it is a list of rows or a mapping of columns with "
        f"'prompt' or 'input_ids', but it is a {type(batch).__name__}; give `prompts` instead."
    )


def context_limit(model: nn.Module) -> int | None:
    """Longest sequence that the model's configuration allows, in tokens; None where it states none."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit is not None and limit > 0 else None


def check_length(prompt_ids: Tensor, max_new_tokens: int, model: nn.Module, what: str) -> None:
    """Raise ``ValueError`` if prompt and response together exceed the model's context."""
    limit = context_limit(model)
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise ValueError(
            f"{what} has {len(prompt_ids)} tokens and `max_new_tokens` is {max_new_tokens}, together more than the "
            f"model's context of {limit}; shorten the question or lower `max_new_tokens`."
        )
