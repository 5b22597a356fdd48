"""Questions for a diagnosis: from a file, from Hugging Face's hub, or made by reasoning-gym; and their rewards."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction

GYM = "reasoning-gym:"
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_questions(
    dataset: str,
    *,
    count: int,
    split: str = "train",
    shots: int = 2,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Row], RewardFunction | None]:
    """Rows with a ``prompt``, and the verifier that comes with them, if one does.

    Args:
        dataset: A local ``.jsonl``, ``.parquet`` or ``.csv`` file; ``reasoning-gym:<task>``; or a dataset's name on the
            hub. Tasks have the columns ``answer`` and ``solution``, and from another question ``wrong_answer``, which
            also stands in ``wrong_solution``.
        count: At most so many rows, the first.
        split: Of a dataset on the hub.
        shots: Solved examples in each prompt of a task.
        seed: Of a task.
        settings: Of a task, such as ``{"max_digits": 1}``.

    Raises:
        ValueError: If there is no such dataset, or it has no column ``prompt``.
    """
    if dataset.startswith(GYM):
        return _gym(dataset.removeprefix(GYM), count, shots, seed, settings or None)
    from datasets import load_dataset

    path = Path(dataset)
    if path.suffix in FORMATS:
        if not path.exists():
            raise ValueError(f"`dataset` is {dataset!r}, but there is no such file.")
        if not path.stat().st_size:
            raise ValueError(f"`dataset` is {dataset!r}, which is empty; give a file with rows.")
        try:
            found: Any = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            why = error.__cause__ or error
            raise ValueError(f"`dataset` is {dataset!r}, which cannot be read as {path.suffix}: {why}") from error
    else:
        try:
            found = load_dataset(dataset, split=split)
        except Exception as error:
            raise ValueError(
                f"`dataset` is {dataset!r}, which is neither a .jsonl, .parquet or .csv file nor "
                f"'{GYM}<task>' nor to be had from the hub: {error}"
            ) from error
    if "prompt" not in found.column_names:
        raise ValueError(f"`dataset` must have a column 'prompt', but {dataset!r} has {sorted(found.column_names)}.")
    if not len(found):
        raise ValueError(f"`dataset` is {dataset!r}, which has no rows.")
    rows: list[Row] = [dict(found[i]) for i in range(min(count, len(found)))]
    return rows, None


def _gym(
    name: str, count: int, shots: int, seed: int, settings: Mapping[str, Any] | None
) -> tuple[list[Row], RewardFunction]:
    try:
        from odp_callbacks.cli.tasks import make_task
    except ImportError as error:
        raise ValueError(f"`dataset` needs reasoning-gym ({error.name}): pip install 'odp-callbacks[demo]'.") from error
    try:
        task = make_task(name, questions=4 * count, lines=0, shots=shots, seed=seed, settings=settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"`dataset` names the task {name!r}, which reasoning-gym does not make with `settings` = "
            f"{dict(settings or {})}: {error}"
        ) from error
    rows = list({str(row["prompt"]): row for row in task.rows}.values())
    made: list[Row] = []
    for i, row in enumerate(rows[:count]):
        wrong = next((o["answer"] for o in rows[i + 1 :] + rows[:i] if o["answer"] != row["answer"]), row["answer"])
        solution = str(row["solution"])
        made.append({**row, "wrong_answer": wrong, "wrong_solution": solution.replace(str(row["answer"]), str(wrong))})
    return made, task.reward


def load_reward(name: str, own: RewardFunction | None, rows: Sequence[Row] = ()) -> RewardFunction:
    """A reward function by its name.

    Args:
        name: ``"task"`` for the one that came with the questions, ``"exact"``, ``"math-verify"``, or the import path of
            a TRL reward function, as in ``my_package.rewards.correct``.
        own: The one that came with the questions.
        rows: The questions, which must have the columns that it reads.

    Raises:
        ValueError: If there is none of that name, or a column is missing.

    Examples:
        >>> load_reward("exact", None)(["1+1="], [" 2 "], answer=["2"])
        [1.0]
    """
    if name == "task":
        if own is None:
            raise ValueError("`reward` is 'task', but this dataset brings none; give 'exact', 'math-verify' or a path.")
        return own
    if name in REWARDS:
        if name in ANSWERED and (bare := [row for row in rows if "answer" not in row]):
            raise ValueError(
                f"`reward` is {name!r}, which reads a column 'answer', but `dataset` has {sorted(bare[0])}."
            )
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    try:
        found: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`reward` is {name!r}, which is none of {sorted(['task', *REWARDS])} and cannot be imported: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"`reward` is {name!r}, which is no function.")
    reward: RewardFunction = found
    return reward


def exact(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 where the completion, without white space around it, is the column ``answer``."""
    return [float(_text(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def math_verify(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 where Math-Verify finds the completion's result equal to the column ``answer``."""
    from math_verify import parse, verify

    return [float(verify(parse(str(a)), parse(_text(c)))) for c, a in zip(completions, answer, strict=True)]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact, "math-verify": math_verify}
ANSWERED = frozenset(REWARDS)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def fingerprint(value: Any) -> str:
    """A short name of anything that JSON can hold, or says of itself by its ``repr``."""
    from hashlib import blake2b

    return blake2b(json.dumps(value, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()
