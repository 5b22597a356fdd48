"""One unit of a study: it is measured by the commands that exist, resumes as they do, and ends with a summary."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.analysis.study.figures import CellSummary
from odp_callbacks.analysis.study.paper_summary import paper_summary
from odp_callbacks.analysis.study.report_summary import accuracy_summary, node_summary, update_summary
from odp_callbacks.cli.datasets import QuestionOptions
from odp_callbacks.cli.demonstration_files import add_demonstrations, load_rows
from odp_callbacks.cli.demonstrations import DemonstrationsCommand, make_demonstrations, sentence
from odp_callbacks.cli.diagnose import DiagnoseOptions, diagnose
from odp_callbacks.cli.diagnosis import fingerprint
from odp_callbacks.cli.results import terminal_text
from odp_callbacks.cli.study.plan import DEMONSTRATIONS, StudyOptions, StudyTask, Unit
from odp_callbacks.cli.study.students import student_model, summary_model
from odp_callbacks.engine.prompts import Row
from odp_callbacks.files import read_json_object, write_atomically
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import DamagedRecordsError
from odp_callbacks.storage.study_summaries import load_summaries, save_summaries

DEMONSTRATIONS_FILE = "demonstrations.jsonl"
SUMMARIES: Mapping[str, Callable[[Any, str, str, Sequence[str]], CellSummary]] = {
    "paper": paper_summary,
    "update": update_summary,
    "accuracy": accuracy_summary,
    "nodes": node_summary,
}


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    Attributes:
        options: The options of the study.
        output: The folder.
    """

    options: StudyOptions
    output: Path

    def settings_file(self, unit: Unit) -> Path:
        """The file with the options that a unit was started with."""
        return unit.folder(self.output) / f"{unit.part}.settings.json"

    def summary_file(self, unit: Unit) -> Path:
        """The file that a finished measurement has."""
        return unit.folder(self.output) / f"{unit.part}.summary.json"

    def failure_file(self, unit: Unit) -> Path:
        """The file that tells why a unit failed."""
        return unit.folder(self.output) / f"{unit.part}.failure.txt"

    def demonstrations(self, unit: Unit) -> Path:
        """The file with the demonstrations of a unit's student and task."""
        return replace(unit, part=DEMONSTRATIONS).folder(self.output) / DEMONSTRATIONS_FILE

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit is finished."""
        if unit.part == DEMONSTRATIONS:
            return self.demonstrations(unit).exists()
        return self.summary(unit) is not None

    def summary(self, unit: Unit) -> CellSummary | None:
        """The summary of a finished measurement; None if there is none, or if it is damaged."""
        try:
            return load_summaries(self.summary_file(unit))[0]
        except (FileNotFoundError, NotADirectoryError, DamagedRecordsError, IndexError):
            return None

    def check(self, unit: Unit) -> None:
        """Check that the folder holds no unit with other options.

        Raises:
            ValueError: If it does; the message names one of them.
        """
        path = self.settings_file(unit)
        if not path.exists():
            return
        saved, given = read_json_object(path), _as_json(self.options.settings_of(unit))
        if changed := sorted(name for name in saved.keys() | given.keys() if saved.get(name) != given.get(name)):
            raise ValueError(
                f"`output` is {str(self.output)!r}, which holds {unit} with another `{changed[0]}`; give another "
                f"folder, or remove {str(unit.folder(self.output))!r}."
            )

    def measure(self, unit: Unit, console: Console) -> None:
        """Measure a unit, or go on with one that was interrupted.

        Args:
            unit: The unit; the one that it needs is finished.
            console: Where progress is shown.
        """
        folder = unit.folder(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.settings_file(unit), json.dumps(_as_json(self.options.settings_of(unit)), indent=1))
        if unit.part == DEMONSTRATIONS:
            self._make_demonstrations(unit, console)
            return
        rows = self._rows(unit)
        measured = diagnose(self._diagnose_options(unit, console), console)
        expected = PaperRecord if unit.part == "paper" else ProbeReport
        assert isinstance(measured, expected), unit
        # By its prompt, a question is the same for all students, whichever questions they have demonstrations of.
        names = [fingerprint(row["prompt"]) for row in rows]
        summary = SUMMARIES[unit.part](measured, unit.student, unit.task, names)
        facts = {**summary.facts, "own_contexts": self.options.own_contexts()}
        save_summaries([replace(summary, facts=facts)], self.summary_file(unit))

    def _rows(self, unit: Unit) -> list[Row]:
        rows, _ = self.options.task_of(unit).load()
        return add_demonstrations(rows, [load_rows(str(self.demonstrations(unit)))])

    def _make_demonstrations(self, unit: Unit, console: Console) -> None:
        options, task = self.options, self.options.task_of(unit)
        inform = _informer(console)
        command = DemonstrationsCommand(
            **_question_options(task),
            stop=task.stop,
            model=student_model(options, unit.student, inform),
            adapter=options.students[unit.student].adapter,
            sample=options.demonstrations,
            summaries=summary_model(options, inform),
            summary_max_new_tokens=options.summary_max_new_tokens,
            output=str(self.demonstrations(unit)),
        )
        result = make_demonstrations(command, console)
        inform(sentence(result))

    def _diagnose_options(self, unit: Unit, console: Console) -> DiagnoseOptions:
        options, task = self.options, self.options.task_of(unit)
        if unit.part == "nodes":
            measure = replace(options.nodes, update=False)
        else:
            measure = replace(options.update, budget=0, step_alignment=False)
        return DiagnoseOptions(
            **_question_options(task),
            teachers=dict(options.teachers),
            student=student_model(options, unit.student, _informer(console)),
            adapter=options.students[unit.student].adapter,
            lora_rank=options.lora_rank,
            stop=task.stop,
            measure=measure,
            protocol="paper" if unit.part == "paper" else "default",
            paper=options.paper,
            demonstrations=[str(self.demonstrations(unit))],
            teacher_accuracy=options.teacher_accuracy if unit.part == "accuracy" else 0,
            confidence=options.confidence,
            output=str(unit.folder(self.output)),
        )


def _question_options(task: StudyTask) -> dict[str, Any]:
    """The arguments of all commands that ask questions."""
    return {one.name: getattr(task, one.name) for one in fields(QuestionOptions)}


def _informer(console: Console) -> Callable[[str], None]:
    return lambda message: console.print(terminal_text(message))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file returns them."""
    loaded: dict[str, Any] = json.loads(json.dumps(settings, default=repr))
    return loaded
