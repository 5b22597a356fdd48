"""A diagnosis that can be interrupted: it measures one question after another, and saves each when it is done."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.tree.journal import Journal
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import load, merge, save

SETTINGS_FILE = "diagnosis.json"
QUESTIONS_FOLDER = "questions"


def run_diagnosis(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    output: Path,
    *,
    config: ProbeConfig,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    on_question: Callable[[int, int], None] | None = None,
) -> ProbeReport:
    """Measure questions one by one, and save each under ``output/questions``.

    Started again with the same arguments, it resumes: what is saved is not measured again. Within a question, finished
    continuations are saved in a journal, so that an interruption loses none of them. The random draws of a question
    depend on the seed and on its place alone, so that an interrupted diagnosis ends with the figures of one that was
    not interrupted. A ``budget`` is divided evenly among the questions.

    Args:
        student: A peft model.
        tokenizer: Its tokenizer.
        rows: The questions.
        reward: The verifier.
        teachers: As in :class:`~odp_callbacks.engine.Probe`.
        output: Folder of the diagnosis.
        config: How to measure.
        seed: Seed of all random draws.
        identity: What else distinguishes this diagnosis, such as the student's path. A folder that holds a diagnosis
            with another identity is refused.
        on_question: Called after each question with the number of questions done, and of all questions.

    Raises:
        ValueError: If the folder holds another diagnosis, or if an argument does not work.
    """
    budget_per_question = max(1, config.budget // len(rows)) if config.budget else config.budget
    probe = Probe(student, tokenizer, reward, teachers, replace(config, budget=budget_per_question))
    questions = probe.validate(rows, [str(question_index) for question_index in range(len(rows))])
    settings = {"teachers": list(probe.teachers), **(identity or {})}
    _claim_folder(output, {**config.settings(), "seed": seed, "rows": fingerprint(list(rows)), **settings})
    reports = []
    for question_index, question in enumerate(questions):
        reports.append(_measure_question(probe, question, question_index, output / QUESTIONS_FOLDER, seed))
        if on_question is not None:
            on_question(question_index + 1, len(questions))
    stage_seconds: Counter[str] = Counter()
    for report in reports:
        stage_seconds.update(report.stage_seconds)
    diagnosis = replace(merge(reports), stage_seconds=dict(stage_seconds))
    save(diagnosis, output / "records", overwrite=True)
    return diagnosis


def fingerprint(value: Any) -> str:
    """A short text that distinguishes a value from others.

    Args:
        value: What JSON can hold; other parts are described by their ``repr``.

    Examples:
        >>> fingerprint([1, 2]) == fingerprint([1, 2]), fingerprint([1, 2]) == fingerprint([2, 1])
        (True, False)
    """
    return blake2b(json.dumps(value, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def _measure_question(probe: Probe, question: Question, question_index: int, folder: Path, seed: int) -> ProbeReport:
    """Measure one question and save it, or load it if it is there."""
    records = folder / f"{question_index:05d}"
    if not records.exists():
        journal = Journal(folder / f".{question_index:05d}.journal")
        save(probe.run([question], seed=seed, journal=journal), records)
        journal.remove()
    return load(records)


def _claim_folder(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings to a new folder, or check that an existing one holds the same diagnosis."""
    path = output / SETTINGS_FILE
    # The saved settings have passed through JSON, so the given ones do too before they are compared.
    settings = json.loads(json.dumps(settings, default=repr))
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
        return
    saved_settings = json.loads(path.read_text())
    names = settings.keys() | saved_settings.keys()
    if changed_names := sorted(name for name in names if settings.get(name) != saved_settings.get(name)):
        raise ValueError(
            f"`output` is {str(output)!r}, which holds a diagnosis with another `{changed_names[0]}`; give another "
            "folder, or remove that one."
        )
