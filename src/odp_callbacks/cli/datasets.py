"""Questions for a diagnosis: read from files, downloaded from Hugging Face's hub, or made by reasoning-gym."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from odp_callbacks.cli.rewards import load_reward
from odp_callbacks.engine.answer_rewards import answer_reward
from odp_callbacks.engine.dataset_columns import dataset_preset, preset_rows, with_columns
from odp_callbacks.engine.prompts import Row, prompt_remedy
from odp_callbacks.engine.rewards import RewardFunction

TASK_PREFIX = "reasoning-gym:"
SAVED_TO_DISK = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` of datasets writes to a folder."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """The arguments of all commands that ask questions.

    Attributes:
        dataset: A .jsonl, .parquet or .csv file, a folder of such files, ``reasoning-gym:<task>``, or the name of a
            dataset on the hub.
        split: Split of a folder or of a dataset on the hub.
        subset: Configuration of a folder or of a dataset on the hub, such as ``main``.
        preset: ``boolq``, ``mmlu`` or ``gsm8k`` for a dataset with the columns of these: it makes the prompt, the
            answer and the reward.
        columns: Columns to make, as templates of those that the dataset has, such as
            ``{prompt: "{question} {choices:letters}", answer: "{label:letter of choices}"}``.
        chat: Whether the prompts become chat messages.
        questions: How many questions to take; the first of the dataset are taken.
        shots: Solved examples in the prompts of a reasoning-gym task.
        settings: Settings of a reasoning-gym task, such as ``{max_digits: 1}``.
        reward: ``task`` (the reward of a reasoning-gym task or of the preset), ``exact`` (the response equals the
            column ``answer``), ``stated``, ``boxed``, ``number``, ``yes-no`` or ``letter`` (how the answer is found in
            the response), ``math-verify``, or the import path of a TRL reward function.
        seed: Seed of all random draws.
    """

    dataset: str
    split: str = "train"
    subset: str | None = None
    preset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    questions: int = 16
    shots: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    reward: str = "task"
    seed: int = 0

    def load(self) -> tuple[list[Row], RewardFunction]:
        """The rows and the reward function that the options name.

        Raises:
            ValueError: If there is no such dataset or reward function, or if a row does not fit.
        """
        if self.questions < 1:
            raise ValueError(f"`questions` must be a positive integer, but {self.questions} was given.")
        rows, task_reward = load_questions(
            self.dataset,
            count=self.questions,
            split=self.split,
            subset=self.subset,
            preset=self.preset,
            columns=self.columns,
            chat=self.chat,
            shots=self.shots,
            seed=self.seed,
            settings=self.settings,
        )
        return rows, load_reward(self.reward, task_reward, rows)


def load_questions(
    dataset: str,
    *,
    count: int,
    split: str = "train",
    subset: str | None = None,
    preset: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    shots: int = 2,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Row], RewardFunction | None]:
    """Load rows with a column ``prompt``, and the reward function that comes with them, if there is one.

    Args:
        dataset: A local ``.jsonl``, ``.parquet`` or ``.csv`` file, a folder of such files or of
            ``Dataset.save_to_disk``, ``reasoning-gym:<task>``, or the name of a dataset on the hub. The rows of a task
            have the columns ``answer`` and ``solution``, and, taken from another question, ``wrong_answer`` and the
            ``wrong_solution`` that ends in it.
        count: How many rows to load at most; the first ones are taken.
        split: The split of a folder or of a dataset on the hub.
        subset: The configuration of a folder or of a dataset on the hub, such as ``"main"``.
        preset: A name in :data:`~odp_callbacks.engine.dataset_columns.DATASET_PRESETS`, which makes the columns and
            comes with a reward function.
        columns: Templates of columns to make; see :func:`~odp_callbacks.engine.dataset_columns.with_columns`.
        chat: Make the prompts chat messages.
        shots: Solved examples in each prompt of a task.
        seed: The seed of a task.
        settings: The settings of a task, such as ``{"max_digits": 1}``.

    Raises:
        ValueError: If there is no such dataset, if a template does not fit a row, or if there is no column ``prompt``.
    """
    reward: RewardFunction | None = None
    rows: list[Row]
    if dataset.startswith(TASK_PREFIX):
        rows, reward = _task_questions(dataset.removeprefix(TASK_PREFIX), count, shots, seed, settings or None)
    else:
        table = _load_table(dataset, split, subset)
        if not len(table):
            raise ValueError(f"`dataset` is {dataset!r}, which has no rows.")
        rows = [dict(table[row_index]) for row_index in range(min(count, len(table)))]
    if preset is not None:
        rows, reward = preset_rows(rows, preset, chat=chat), answer_reward(dataset_preset(preset).rule)
    if columns or chat:
        rows = with_columns(rows, columns or {}, chat=chat)
    if "prompt" not in rows[0]:
        present = sorted(rows[0])
        remedy = prompt_remedy(present) or "; make one with `preset` or `columns`, as in {prompt: '{question}'}"
        raise ValueError(f"`dataset` must have a column 'prompt', but {dataset!r} has {present}{remedy}.")
    return rows, reward


def _load_table(dataset: str, split: str, subset: str | None) -> Any:
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _read_folder(path, split, subset)
    return _read_file(dataset) if path.suffix in FILE_FORMATS else _download(dataset, split, subset)


def _read_folder(path: Path, split: str, subset: str | None) -> Any:
    """The rows of a folder of files, or of one that ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if not any((path / name).exists() for name in SAVED_TO_DISK):
            return load_dataset(str(path), subset, split=split)
        saved = load_from_disk(str(path))
        return saved[split] if isinstance(saved, DatasetDict) else saved
    except Exception as error:
        reason = f"it has no split {split!r}" if isinstance(error, KeyError) else error.__cause__ or error
        raise ValueError(f"`dataset` is the folder {str(path)!r}, which cannot be read: {reason}.") from error


def _read_file(dataset: str) -> Any:
    from datasets import load_dataset

    path = Path(dataset).expanduser()
    if not path.exists():
        raise ValueError(f"`dataset` is {dataset!r}, but there is no such file.")
    if not path.stat().st_size:
        raise ValueError(f"`dataset` is {dataset!r}, which is empty; give a file with rows.")
    try:
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"`dataset` is {dataset!r}, which cannot be read as {path.suffix}: {reason}") from error


def _download(dataset: str, split: str, subset: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(dataset, subset, split=split)
    except Exception as error:
        raise ValueError(
            f"`dataset` is {dataset!r}, which is neither a .jsonl, .parquet or .csv file nor a folder nor "
            f"'{TASK_PREFIX}<task>', and could not be loaded from the hub: {error}"
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
