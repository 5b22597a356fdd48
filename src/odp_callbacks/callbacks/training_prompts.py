"""How a training makes its prompts: the rows of its dataset, and the options of its chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from odp_callbacks.engine.chat_template import ChatTemplate, are_tools
from odp_callbacks.engine.prompts import Row, prompt_remedy
from odp_callbacks.engine.rows import WORKING_FORM, as_rows

PLAIN_COLLATORS = ("DataCollatorForChatML",)
"""Collators of TRL that render messages without any option."""


def training_template(host: Any) -> ChatTemplate:
    """How a trainer, or a LightningModule, renders messages.

    TRL's trainers that sample, such as `GRPOTrainer` or `DistillationTrainer`, have ``chat_template_kwargs``, ``tools``
    and perhaps a ``chat_template`` of their own. They ignore columns of these names, and always begin a new message.
    Its other trainers read the columns of each row.

    Args:
        host: The trainer or module; what it does not have counts as not set.
    """
    arguments = getattr(host, "chat_template_kwargs", None)
    samples = arguments is not None
    if not arguments:
        arguments = getattr(getattr(host, "args", None), "chat_template_kwargs", None)
    tools, template = getattr(host, "tools", None), getattr(host, "chat_template", None)
    is_trl = type(host).__module__.startswith("trl.") or any(
        kind.__module__.startswith("trl.") for kind in type(host).__mro__
    )
    has_plain_collator = type(getattr(host, "data_collator", None)).__name__ in PLAIN_COLLATORS
    return ChatTemplate(
        template=template if isinstance(template, str) else None,
        arguments=dict(arguments) if isinstance(arguments, Mapping) else {},
        tools=list(tools or ()) if are_tools(tools) else (),
        reads_rows=not (is_trl and (samples or has_plain_collator)),
        continues_assistant=not (is_trl and samples),
    )


def rows_of_dataset(dataset: Any) -> Sequence[Row]:
    """The rows of a training's dataset, which are the questions where no ``prompts`` are given.

    Args:
        dataset: The trainer's ``train_dataset``.

    Raises:
        ValueError: If it is streamed, or its rows have no prompt.
    """
    place = "`prompts` was not given, and the trainer's `train_dataset`"
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        if dataset is None:
            raise ValueError(f"{place} is None; give rows such as {WORKING_FORM}.")
        raise ValueError(
            f"{place} is streamed: it has no length, and its rows cannot be taken by number; give some of them as "
            "`prompts`, such as `list(dataset.take(1000))`."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        try:
            columns = list(as_rows(dataset, "train_dataset")[0])
        except (TypeError, ValueError, LookupError):
            columns = []
    if "prompt" not in columns:
        remedy = prompt_remedy(columns) or f"; give rows such as {WORKING_FORM}"
        raise ValueError(
            f"{place} has no column 'prompt' to take in its place, but {sorted(map(str, columns))}{remedy}."
        )
    rows: Sequence[Row] = dataset
    return rows
