"""A diagnosis that can be interrupted: it measures the questions in blocks, and saves each block when it is done."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import nn

from odp_callbacks.analysis.time_shortage import NOT_DONE, response_limit
from odp_callbacks.cli.teacher_accuracy import measured_responses
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction, UnscoredError
from odp_callbacks.engine.sampling.memory import cache_bytes_of_token, free_bytes
from odp_callbacks.engine.time_plan import UPDATE_SHARE
from odp_callbacks.engine.timing import Progress
from odp_callbacks.engine.unit_costs import UnitCosts
from odp_callbacks.files import read_json_object, write_atomically
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import DamagedRecordsError, load, merge, save
from odp_callbacks.storage.merging import with_updates_of

SETTINGS_FILE = "diagnosis.json"
BLOCKS_FOLDER = "blocks"
UPDATE_FOLDER = "update"
JOURNAL_FILE = "journal"
BLOCK_SIZE = "questions_per_block"
LIMITS = ("max_new_tokens", "response_limit")
"""Settings of the update that say how long responses could be, and were."""
MINIMUM_SECONDS = 1e-3
"""What is left for a part of the diagnosis if all its time was used up before."""
MAXIMUM_BLOCK = 64
"""Questions whose nodes are measured together, so that the batch of their continuations stays full."""


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
    teacher_accuracy: int = 0,
    first_question: int = 0,
    on_stage: Progress | None = None,
) -> ProbeReport:
    """Measure the update of all questions, then their nodes, block by block; each part is saved when it is done.

    Started again with the same arguments, it resumes: what is saved is not measured again. Finished rollouts and
    continuations are kept in a journal, so that an interruption loses none of them. The random draws of a question
    depend on the seed and on its place alone, so that an interrupted diagnosis ends with the figures of one that was
    not interrupted. A block holds all questions, up to :data:`MAXIMUM_BLOCK` and as far as the keys and values of their
    rollouts fit in memory. A ``budget`` or ``seconds`` is divided among the blocks by their questions; ``seconds`` are
    those of this call.

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
        teacher_accuracy: How many responses to each question every teacher gives by itself; 0 for none.
        first_question: Number of the first row among the questions, where these are a part of all questions.
        on_stage: Called with the name of a stage, the amount done, and the total.

    Raises:
        ValueError: If the folder holds another diagnosis, or if an argument does not work.
    """
    deadline, costs = Deadline(config.seconds), UnitCosts()

    def probe_with(**changes: Any) -> Probe:
        probe = Probe(student, tokenizer, reward, teachers, replace(config, **changes))
        probe.unit_costs, probe.says_shortage = costs, False
        return probe

    probe = probe_with()
    questions = probe.validate(rows, [str(first_question + index) for index in range(len(rows))])
    settings = {"teachers": list(probe.teachers), **(identity or {})}
    settings = {**config.settings(), "seed": seed, "rows": fingerprint(list(rows)), **settings}
    block_size = _claim_folder(output, settings, lambda: _questions_that_fit(student, questions, config))
    journal = Journal(output / JOURNAL_FILE)
    update = None
    if config.update:
        share = UPDATE_SHARE if config.measures_nodes else 1.0
        seconds = seconds_left(deadline.at_share(share))
        update_probe = probe_with(budget=0, seconds=seconds, half_width=None, step_alignment=False)
        update = _measured(update_probe, questions, output / UPDATE_FOLDER, "the update", seed, journal, on_stage)
    diagnosis = update
    if config.measures_nodes:
        sampled = None if update is None else {rollout.question for rollout in update.rollouts}
        if sampled is not None and update is not None and update.left_out.get("unsampled_questions"):
            questions = [question for question in questions if question.id in sampled]
        limit = None if update is None else response_limit(update)
        config = config if limit is None else replace(config, max_new_tokens=limit)
        blocks = [questions[first : first + block_size] for first in range(0, len(questions), block_size)]
        diagnosis = _measure_blocks(
            probe_with, config, blocks, output / BLOCKS_FOLDER, seed, journal, on_stage, deadline
        )
        if update is not None:
            diagnosis = with_updates_of(diagnosis, update)
            without_time = {name: count for name, count in update.left_out.items() if name in NOT_DONE}
            kept_settings = {name: update.settings[name] for name in LIMITS if name in update.settings}
            diagnosis = replace(
                diagnosis,
                left_out={**diagnosis.left_out, **without_time},
                settings={**diagnosis.settings, **kept_settings},
            )
    assert diagnosis is not None, "a configuration measures the update or nodes"
    if teacher_accuracy:
        responses = measured_responses(probe, questions, output, teacher_accuracy, seed, journal, on_stage)
        diagnosis = replace(diagnosis, teacher_responses=responses)
    scored = {rollout.question for rollout in diagnosis.rollouts}
    diagnosis = replace(diagnosis, left_out={**diagnosis.left_out, "questions": len(rows) - len(scored)})
    save(diagnosis, output / "records", overwrite=True)
    journal.remove()
    return diagnosis


def _measure_blocks(
    probe_with: Callable[..., Probe],
    config: ProbeConfig,
    blocks: Sequence[Sequence[Question]],
    folder: Path,
    seed: int,
    journal: Journal,
    on_stage: Progress | None,
    deadline: Deadline,
) -> ProbeReport:
    """Measure the nodes of all blocks; a block whose questions have no reward is left out if others have one."""
    question_count = sum(map(len, blocks))
    reports: list[ProbeReport] = []
    unscored: list[UnscoredError] = []
    for place, block in enumerate(blocks):
        share = len(block) / question_count
        probe = probe_with(
            update=False,
            budget=max(1, round(config.budget * share)) if config.budget else config.budget,
            max_new_tokens=config.max_new_tokens,
            seconds=seconds_left(deadline.part(len(blocks) - place)),
        )
        try:
            reports.append(_measured(probe, block, folder / f"{place:05d}", f"block {place}", seed, journal, on_stage))
        except UnscoredError as error:  # the reward function has nothing to say about these questions
            unscored.append(error)
    if not reports:
        raise unscored[0]
    stage_seconds: Counter[str] = Counter()
    for report in reports:
        stage_seconds.update(report.stage_seconds)
    return replace(merge(reports), stage_seconds=dict(stage_seconds))


def seconds_left(deadline: Deadline) -> float | None:
    """The seconds until a deadline, as a probe takes them; None without one."""
    return max(deadline.remaining_seconds, MINIMUM_SECONDS) if deadline.is_finite else None


def _measured(
    probe: Probe,
    questions: Sequence[Question],
    folder: Path,
    name: str,
    seed: int,
    journal: Journal,
    on_stage: Progress | None,
) -> ProbeReport:
    """Measure questions together and save the records, or load them if they are there and not damaged."""
    try:
        return load(folder)
    except FileNotFoundError:
        pass
    except DamagedRecordsError as error:
        warnings.warn(f"odp-callbacks: {name} is measured again, because {error}", stacklevel=2)
    save(probe.run(questions, seed=seed, journal=journal, progress=on_stage), folder, overwrite=True)
    return load(folder)


def _questions_that_fit(student: nn.Module, questions: Sequence[Question], config: ProbeConfig) -> int:
    """How many questions' rollouts have keys and values that fit in memory."""
    longest = max(len(question.prompt_ids) for question in questions)
    tokens = longest + config.rollouts * config.max_new_tokens
    usable = free_bytes(next(student.parameters()).device, config.max_memory_bytes)
    return max(1, min(MAXIMUM_BLOCK, int(usable // (tokens * cache_bytes_of_token(student)))))


def fingerprint(value: Any) -> str:
    """A short text that distinguishes a value from others.

    Args:
        value: What JSON can hold; other parts are described by their ``repr``.

    Examples:
        >>> fingerprint([1, 2]) == fingerprint([1, 2]), fingerprint([1, 2]) == fingerprint([2, 1])
        (True, False)
    """
    return blake2b(json.dumps(value, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def _claim_folder(output: Path, settings: dict[str, Any], choose_block_size: Callable[[], int]) -> int:
    """Write the settings to a new folder, or check that an existing one holds the same diagnosis.

    Returns:
        The number of questions in a block: the one that the diagnosis started with, because figures depend on it.
    """
    path = output / SETTINGS_FILE
    # The saved settings have passed through JSON, so the given ones do too before they are compared.
    settings = json.loads(json.dumps(settings, default=repr))
    try:
        saved_settings = read_json_object(path) if path.exists() else None
    except ValueError as error:
        if any((output / name).exists() for name in (UPDATE_FOLDER, BLOCKS_FOLDER)):
            raise ValueError(
                f"`output` is {str(output)!r}, where it cannot be told which diagnosis its questions belong to: "
                f"{error} Give another folder, or remove that one."
            ) from error
        saved_settings = None  # nothing was measured under them
    if saved_settings is None:
        block_size = choose_block_size()
        write_atomically(path, json.dumps({**settings, BLOCK_SIZE: block_size}, indent=1))
        return block_size
    block_size = saved_settings.pop(BLOCK_SIZE, None)
    names = settings.keys() | saved_settings.keys()
    changed_names = sorted(name for name in names if settings.get(name) != saved_settings.get(name))
    if changed_names or not isinstance(block_size, int):
        raise ValueError(
            f"`output` is {str(output)!r}, which holds a diagnosis with another `{[*changed_names, BLOCK_SIZE][0]}`; "
            "give another folder, or remove that one."
        )
    return block_size
