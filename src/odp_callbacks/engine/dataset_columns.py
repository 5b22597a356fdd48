r"""Columns made from those of a dataset, so that it can be used as it comes.

A dataset has columns of its own: a passage, a question, choices, the index of the right one. A probe needs a
``prompt``, and a reward function an ``answer``. Each is a template over the dataset's own columns; see
:mod:`~odp_callbacks.engine.templates` for what a template can say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from odp_callbacks.engine.answer_rewards import check_references
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rows import as_rows
from odp_callbacks.engine.templates import fill_template


@dataclass(frozen=True)
class DatasetPreset:
    """What a well-known dataset needs.

    Attributes:
        columns: The template of each column that is made.
        rule: How the answer is found in a response, see :func:`~odp_callbacks.engine.answer_rewards.answer_reward`.
    """

    columns: Mapping[str, str]
    rule: str


DATASET_PRESETS: dict[str, DatasetPreset] = {
    "boolq": DatasetPreset(
        {
            "prompt": "{passage}\n\nQuestion: {question}\n\n"
            'Think about it first. Then end with a line "Answer: yes" or "Answer: no".',
            "answer": "{answer:yes/no}",
            "solution": "Answer: {answer:yes/no}",
        },
        "yes-no",
    ),
    "mmlu": DatasetPreset(
        {
            "prompt": "{question}\n\n{choices:letters}\n\n"
            'Think about it first. Then end with a line "Answer: " and the letter of the right choice.',
            "answer": "{answer:letter of choices}",
            "solution": "Answer: {answer:letter of choices}. {answer:item of choices}",
        },
        "letter",
    ),
    "gsm8k": DatasetPreset(
        {
            "prompt": '{question}\n\nThink step by step. Then end with a line "Answer: " and the number.',
            "answer": "{answer:number}",
            "solution": "{answer}",
        },
        "number",
    ),
}
"""Datasets whose columns are known, by name: passage, question and a bool; question, choices and an index; question and
a solution that ends in a number. The wording of the prompts is ours."""


def with_columns(rows: Any, columns: Mapping[str, str], *, chat: bool = False) -> list[Row]:
    """Rows with columns made from those that they have.

    Args:
        rows: The rows, in any form that :func:`~odp_callbacks.engine.rows.as_rows` accepts.
        columns: The template of each new column. All of them read the row as it was given, so a new column may have
            the name of an old one.
        chat: Make the ``prompt`` a chat message of the user, for models that were trained on conversations.

    Returns:
        A row for each row.

    Raises:
        ValueError: If a template names a column that a row lacks, or a value does not fit, such as an index that is out
            of range; the message names the row.

    Examples:
        >>> rows = [{"question": "Is ice cold?", "label": 1}]
        >>> with_columns(rows, {"prompt": "{question} yes or no?", "answer": "{label:yes/no}"})[0]
        {'question': 'Is ice cold?', 'label': 1, 'prompt': 'Is ice cold? yes or no?', 'answer': 'yes'}
    """
    made_rows: list[Row] = []
    for row_index, row in enumerate(as_rows(rows)):
        try:
            filled = {name: fill_template(template, row, f"columns.{name}") for name, template in columns.items()}
        except ValueError as error:
            raise ValueError(f"row {row_index} of `dataset` cannot be used: {error}") from error
        made_row: dict[str, Any] = {**row, **filled}
        if chat and isinstance(made_row.get("prompt"), str):
            made_row["prompt"] = [{"role": "user", "content": made_row["prompt"]}]
        made_rows.append(made_row)
    return made_rows


def preset_rows(rows: Any, preset: str, *, chat: bool = False) -> list[Row]:
    """Rows of a well-known dataset with ``prompt``, ``answer`` and ``solution``.

    Args:
        rows: The rows as the dataset has them.
        preset: A name in :data:`DATASET_PRESETS`.
        chat: Make the ``prompt`` a chat message of the user.

    Raises:
        ValueError: If there is no such preset, a row does not fit it, or a row has no answer.

    Examples:
        >>> rows = preset_rows([{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}], "mmlu")
        >>> rows[0]["answer"], rows[0]["prompt"].splitlines()[2:4]
        ('B', ['A. 3', 'B. 4'])
    """
    chosen = dataset_preset(preset)
    made_rows = with_columns(rows, chosen.columns, chat=chat)
    check_references(chosen.rule, made_rows)
    return made_rows


def dataset_preset(name: str) -> DatasetPreset:
    """The preset of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in DATASET_PRESETS:
        raise ValueError(
            f"`preset` must be one of {list(DATASET_PRESETS)}, but {name!r} was given; for another dataset give "
            "`columns`, such as {prompt: '{question}', answer: '{answer}'}."
        )
    return DATASET_PRESETS[name]
