"""A diagnosis that can be interrupted: it measures one question after another, and saves each when it is done."""

import json
import warnings
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
from odp_callbacks.engine.rewards import RewardFunction, UnscoredError
from odp_callbacks.engine.timing import Progress
from odp_callbacks.engine.tree.journal import Journal
from odp_callbacks.files import read_json_object, write_atomically
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import DamagedRecordsError, load, merge, save
from odp_callbacks.storage.merging import with_updates_of

SETTINGS_FILE = "diagnosis.json"
QUESTIONS_FOLDER = "questions"
UPDATE_FOLDER = "update"


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
    on_stage: Progress | None = None,
) -> ProbeReport:
    """Measure the update of all questions, then the nodes of one question after another; each is saved when it is done.

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
        on_stage: Called with stage, done and total while the update of all questions is measured.

    Raises:
        ValueError: If the folder holds another diagnosis, or if an argument does not work.
    """
    budget_per_question = max(1, config.budget // len(rows)) if config.budget else config.budget
    of_nodes = replace(config, budget=budget_per_question, update=config.update and not config.measures_nodes)
    probe = Probe(student, tokenizer, reward, teachers, of_nodes)
    questions = probe.validate(rows, [str(question_index) for question_index in range(len(rows))])
    settings = {"teachers": list(probe.teachers), **(identity or {})}
    _claim_folder(output, {**config.settings(), "seed": seed, "rows": fingerprint(list(rows)), **settings})
    update = None
    if config.update:
        update = _measure_update(
            student, tokenizer, reward, teachers, config, questions, output / UPDATE_FOLDER, seed, on_stage
        )
        if not config.measures_nodes:
            if on_question is not None:
                on_question(len(questions), len(questions))
            save(update, output / "records", overwrite=True)
            return update
    reports: list[ProbeReport] = []
    unscored: list[UnscoredError] = []
    for done, question in enumerate(questions, 1):
        try:
            reports.append(_measure_question(probe, question, int(question.id), output / QUESTIONS_FOLDER, seed))
        except UnscoredError as error:  # the reward function has nothing to say about this question
            unscored.append(error)
        if on_question is not None:
            on_question(done, len(questions))
    if not reports:
        raise unscored[0]
    stage_seconds: Counter[str] = Counter()
    for report in reports:
        stage_seconds.update(report.stage_seconds)
    merged = merge(reports)
    left_out = {**merged.left_out, "questions": len(rows) - len(reports)}
    diagnosis = replace(merged, stage_seconds=dict(stage_seconds), left_out=left_out)
    if update is not None:
        diagnosis = with_updates_of(diagnosis, update)
    save(diagnosis, output / "records", overwrite=True)
    return diagnosis


def _measure_update(
    student: nn.Module,
    tokenizer: Any,
    reward: RewardFunction,
    teachers: object,
    config: ProbeConfig,
    questions: Sequence[Question],
    folder: Path,
    seed: int,
    on_stage: Progress | None,
) -> ProbeReport:
    """Measure the update of all questions together and save it, or load it if it is there and not damaged.

    Its directions are sums over questions, so it cannot be measured question by question.
    """
    try:
        return load(folder)
    except FileNotFoundError:
        pass
    except DamagedRecordsError as error:
        warnings.warn(f"odp-callbacks: the update is measured again, because {error}", stacklevel=2)
    without_nodes = replace(config, budget=0, time_budget=None, half_width=None, step_alignment=False)
    probe = Probe(student, tokenizer, reward, teachers, without_nodes)
    save(probe.run(questions, seed=seed, progress=on_stage), folder, overwrite=True)
    return load(folder)


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
    """Measure one question and save it, or load it if it is there and not damaged."""
    records = folder / f"{question_index:05d}"
    try:
        return load(records)
    except FileNotFoundError:
        pass
    except DamagedRecordsError as error:
        warnings.warn(f"odp-callbacks: question {question_index} is measured again, because {error}", stacklevel=2)
    journal = Journal(folder / f".{question_index:05d}.journal")
    save(probe.run([question], seed=seed, journal=journal), records, overwrite=True)
    journal.remove()
    return load(records)


def _claim_folder(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings to a new folder, or check that an existing one holds the same diagnosis."""
    path = output / SETTINGS_FILE
    # The saved settings have passed through JSON, so the given ones do too before they are compared.
    settings = json.loads(json.dumps(settings, default=repr))
    try:
        saved_settings = read_json_object(path) if path.exists() else None
    except ValueError as error:
        if (output / QUESTIONS_FOLDER).exists():
            raise ValueError(
                f"`output` is {str(output)!r}, where it cannot be told which diagnosis its questions belong to: "
                f"{error} Give another folder, or remove that one."
            ) from error
        saved_settings = None  # nothing was measured under them
    if saved_settings is None:
        write_atomically(path, json.dumps(settings, indent=1))
        return
    names = settings.keys() | saved_settings.keys()
    if changed_names := sorted(name for name in names if settings.get(name) != saved_settings.get(name)):
        raise ValueError(
            f"`output` is {str(output)!r}, which holds a diagnosis with another `{changed_names[0]}`; give another "
            "folder, or remove that one."
        )
