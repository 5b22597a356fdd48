"""The teachers' own accuracy in a diagnosis: measured once, kept in its folder, and printed beside the ranking."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from odp_callbacks.analysis.teacher_accuracy import student_accuracy, teacher_accuracies
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.teacher_responses import sample_teacher_responses
from odp_callbacks.engine.timing import Progress
from odp_callbacks.records import ProbeReport, TeacherResponse
from odp_callbacks.storage import DamagedRecordsError
from odp_callbacks.storage.teacher_responses import (
    TEACHER_RESPONSES_FILE,
    read_teacher_responses,
    write_teacher_responses,
)

RESPONSES_FOLDER = "teacher-responses"


def measured_responses(
    probe: Probe,
    questions: Sequence[Question],
    output: Path,
    responses: int,
    seed: int,
    journal: Journal,
    on_stage: Progress | None,
) -> tuple[TeacherResponse, ...]:
    """The teachers' own responses: those that the folder of the diagnosis holds, or new ones, which it then holds.

    Args:
        probe: Has student, teachers, reward function and configuration.
        questions: The questions, encoded by the probe.
        output: Folder of the diagnosis.
        responses: Number of responses of each teacher to each question.
        seed: Seed of all random draws.
        journal: Stores responses as they finish.
        on_stage: Called with the name of a stage, the amount done, and the total.
    """
    folder = output / RESPONSES_FOLDER / str(responses)
    file = folder / TEACHER_RESPONSES_FILE
    if file.exists():
        try:
            return read_teacher_responses(file.read_bytes(), str(folder))
        except DamagedRecordsError as error:
            warnings.warn(f"odp-callbacks: the teachers' responses are sampled again, because {error}", stacklevel=2)
    sampled = sample_teacher_responses(
        probe, questions, responses=responses, seed=seed, journal=journal, progress=on_stage
    )
    write_teacher_responses(sampled, folder)
    return sampled


def accuracy_as_json(report: ProbeReport, confidence: float) -> dict[str, Any]:
    """The accuracy of the student and of each teacher, as JSON values; empty if the teachers were not asked."""
    accuracies = teacher_accuracies(report, confidence)
    if not accuracies:
        return {}
    student = {"accuracy": asdict(student_accuracy(report, confidence))}
    return {"student": student, "teachers": [asdict(accuracy) for accuracy in accuracies]}
