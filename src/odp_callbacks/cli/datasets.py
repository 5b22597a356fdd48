"""Questions for a diagnosis: read from a file, downloaded from Hugging Face's hub, or made by reasoning-gym."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odp_callbacks.engine.prompts import Row, prompt_remedy
from odp_callbacks.engine.rewards import RewardFunction

TASK_PREFIX = "reasoning-gym:"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_questions(
    dataset: str,
    *,
    count: int,
    split: str = "train",
    shots: int = 2,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Row], RewardFunction | None]:
    """Load rows with a column ``prompt``, and the reward function that comes with them, if there is one.

    Args:
        dataset: A local ``.jsonl``, ``.parquet`` or ``.csv`` file, ``reasoning-gym:<task>``, or the name of a dataset
            on the hub. The rows of a task have the columns ``answer`` and ``solution``, and, taken from another
            question, ``wrong_answer`` and the ``wrong_solution`` that ends in it.
        count: How many rows to load at most; the first ones are taken.
        split: The split of a dataset on the hub.
        shots: Solved examples in each prompt of a task.
        seed: The seed of a task.
        settings: The settings of a task, such as ``{"max_digits": 1}``.

    Raises:
        ValueError: If there is no such dataset, or if it has no column ``prompt``.
    """
    if dataset.startswith(TASK_PREFIX):
        return _task_questions(dataset.removeprefix(TASK_PREFIX), count, shots, seed, settings or None)
    table = _read_file(dataset) if Path(dataset).suffix in FILE_FORMATS else _download(dataset, split)
    if "prompt" not in table.column_names:
        columns = sorted(table.column_names)
        raise ValueError(
            f"`dataset` must have a column 'prompt', but {dataset!r} has {columns}{prompt_remedy(columns)}."
        )
    if not len(table):
        raise ValueError(f"`dataset` is {dataset!r}, which has no rows.")
    rows: list[Row] = [dict(table[row_index]) for row_index in range(min(count, len(table)))]
    return rows, None


def _read_file(dataset: str) -> Any:
    from datasets import load_dataset

    path = Path(dataset)
    if not path.exists():
        raise ValueError(f"`dataset` is {dataset!r}, but there is no such file.")
    if not path.stat().st_size:
        raise ValueError(f"`dataset` is {dataset!r}, which is empty; give a file with rows.")
    try:
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"`dataset` is {dataset!r}, which cannot be read as {path.suffix}: {reason}") from error


def _download(dataset: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(dataset, split=split)
    except Exception as error:
        raise ValueError(
            f"`dataset` is {dataset!r}, which is neither a .jsonl, .parquet or .csv file nor '{TASK_PREFIX}<task>', "
            f"and could not be loaded from the hub: {error}"
        ) from error


def _task_questions(
    name: str, count: int, shots: int, seed: int, settings: Mapping[str, Any] | None
) -> tuple[list[Row], RewardFunction]:
    """Different questions of a reasoning-gym task, each with the wrong answer of a control."""
    try:
        from odp_callbacks.cli.tasks import make_task
    except ImportError as error:
        raise ValueError(f"`dataset` needs reasoning-gym ({error.name}): pip install 'odp-callbacks[demo]'.") from error
    try:
        # Small tasks repeat their questions: a surplus is made, and each question is kept once.
        task = make_task(name, questions=4 * count, lines=0, shots=shots, seed=seed, settings=settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"`dataset` names the task {name!r}, which reasoning-gym cannot make with `settings` = "
            f"{dict(settings or {})}: {error}"
        ) from error
    distinct_rows = list({str(row["prompt"]): row for row in task.rows}.values())
    rows: list[Row] = []
    for row_index, row in enumerate(distinct_rows[:count]):
        answer, solution = row["answer"], str(row["solution"])
        other_rows = distinct_rows[row_index + 1 :] + distinct_rows[:row_index]
        wrong_answer = next((other["answer"] for other in other_rows if other["answer"] != answer), answer)
        wrong_solution = solution.replace(str(answer), str(wrong_answer))
        rows.append({**row, "wrong_answer": wrong_answer, "wrong_solution": wrong_solution})
    return rows, task.reward
