"""What a study measures: its options, and the units that it consists of, each of which can be resumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.cli.datasets import QuestionOptions
from odp_callbacks.cli.diagnose import MODEL_PREFIX
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.demonstrations import DemonstrationOptions
from odp_callbacks.engine.paper import PaperConfig
from odp_callbacks.engine.teachers.demonstration_contexts import named_context
from odp_callbacks.files import check_can_be_written, local_path

DEMONSTRATIONS = "demonstrations"
MEASUREMENTS = ("update", "accuracy", "paper", "nodes")
"""What is measured of each student on each task, in this order: first what decides soonest."""
NEEDS = {"update": DEMONSTRATIONS, "accuracy": "update", "paper": DEMONSTRATIONS, "nodes": DEMONSTRATIONS}
"""The unit that each needs to be finished before."""


@dataclass(frozen=True, kw_only=True)
class StudyStudent:
    """A student of a study.

    Attributes:
        model: Folder or hub name; ``gemma-3-270m`` for Gemma 3 270M from PyPI; none for SmolLM2-135M-Instruct.
        adapter: Folder of a LoRA adapter; none for a fresh one.
        questions: How many questions of each task it is asked, for one that takes longer; none for those of the task.
    """

    model: str | None = None
    adapter: str | None = None
    questions: int | None = None


@dataclass(frozen=True, kw_only=True)
class StudyTask(QuestionOptions):
    """A task of a study: its questions, their reward, and the seed of all random draws.

    Attributes:
        stop: Texts whose last token also ends a response, such as a line's end.
    """

    stop: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The arguments of ``odp-callbacks study``.

    Attributes:
        students: The students by name.
        tasks: The tasks by name. One with the questions of another seed is a task of its own.
        teachers: Contexts by name, as in ``odp-callbacks diagnose``. The findings read the paper's names ``Self-1C``,
            ``Self-1C1W``, ``Self-Sum-1C`` and ``Self-Sum-1C1W``. One whose name begins with ``control`` is left out of
            means over teachers.
        measurements: Which of ``update`` (update gain), ``accuracy`` (the teachers' own), ``paper`` (the protocol of
            arXiv:2605.10889) and ``nodes`` (our figures at nodes) are measured.
        demonstrations: How the responses that contexts show are sampled.
        summaries: Who summarises the correct response: ``self``, a name in ``students``, or a folder or hub name of a
            model; none for no summaries.
        summary_max_new_tokens: Maximum length of a summary in tokens.
        update: How update gain is measured; no node is measured.
        teacher_accuracy: How many responses to each question a teacher gives by itself.
        paper: How the paper's protocol is followed.
        nodes: How our figures at nodes are measured; no update is measured.
        lora_rank: Rank of a fresh adapter.
        accept_gemma_license: Whether you accept the Gemma Terms of Use (https://ai.google.dev/gemma/terms); without
            that, the student ``gemma-3-270m`` is not downloaded.
        confidence: Level of the intervals.
        hours: No unit is started after this time; 0 only builds the page from what is there. None: no limit.
        output: Folder of the study. The same command, started again, goes on where it was.
        page: The markdown page; pictures lie beside it in ``images``. None for ``study.md`` in ``output``.
        records: A ``summaries.json`` of a study to build the page from, in place of those in ``output``; nothing is
            measured.
    """

    students: dict[str, StudyStudent]
    tasks: dict[str, StudyTask]
    teachers: dict[str, str]
    measurements: list[str] = field(default_factory=lambda: list(MEASUREMENTS))
    demonstrations: DemonstrationOptions = field(default_factory=DemonstrationOptions)
    summaries: str | None = None
    summary_max_new_tokens: int = 64
    update: ProbeConfig = field(default_factory=ProbeConfig)
    teacher_accuracy: int = 4
    paper: PaperConfig = field(default_factory=PaperConfig)
    nodes: ProbeConfig = field(default_factory=ProbeConfig)
    lora_rank: int = 8
    accept_gemma_license: bool = False
    confidence: float = 0.95
    hours: float | None = None
    output: str = "study"
    page: str | None = None
    records: str | None = None

    def check(self) -> None:
        """Raise a ValueError for what is wrong whatever the datasets and the models hold."""
        check_confidence(self.confidence)
        for argument in ("students", "tasks", "teachers"):
            names = getattr(self, argument)
            if not names:
                raise ValueError(f"`{argument}` is empty; give at least one, by name.")
            if argument != "teachers" and (bad := [name for name in names if not _is_folder_name(name)]):
                raise ValueError(
                    f"`{argument}` has {bad[0]!r}, which names no folder; use letters, digits, '.', '-' and '_'."
                )
        if unknown := [name for name in self.measurements if name not in MEASUREMENTS]:
            raise ValueError(f"`measurements` has {unknown[0]!r}, which is none of {list(MEASUREMENTS)}.")
        if "accuracy" in self.measurements and ("update" not in self.measurements or self.teacher_accuracy < 1):
            raise ValueError(
                "`measurements` has 'accuracy', which goes on from 'update' and needs a positive `teacher_accuracy`."
            )
        if models := [name for name, kind in self.teachers.items() if kind.startswith(MODEL_PREFIX)]:
            raise ValueError(
                f"`teachers` has {models[0]!r}, another model; a study compares contexts. Measure it with "
                "`odp-callbacks diagnose`."
            )
        if self.hours is not None and not self.hours >= 0:
            raise ValueError(f"`hours` must be 0 or positive, but {self.hours!r} was given.")
        check_can_be_written("output", local_path("output", self.output))
        check_can_be_written("page", self.page_path().parent)

    def page_path(self) -> Path:
        """The file of the page."""
        return (
            local_path("page", self.page) if self.page is not None else local_path("output", self.output) / "study.md"
        )

    def own_contexts(self) -> list[str]:
        """The teachers whose contexts do not have the paper's form."""
        return [name for name, kind in self.teachers.items() if named_context(kind) is None]

    def task_of(self, unit: "Unit") -> StudyTask:
        """The task of a unit, with as many questions as its student is asked."""
        task, questions = self.tasks[unit.task], self.students[unit.student].questions
        return task if questions is None else replace(task, questions=questions)

    def units(self) -> list["Unit"]:
        """All units, in the order in which they are measured: every cell gets its first figure early."""
        parts = (DEMONSTRATIONS, *(name for name in MEASUREMENTS if name in self.measurements))
        return [Unit(student, task, part) for part in parts for task in self.tasks for student in self.students]

    def settings_of(self, unit: "Unit") -> dict[str, Any]:
        """The options that a unit's result depends on, as JSON values or what `repr` tells apart."""
        student, task = asdict(self.students[unit.student]), asdict(self.task_of(unit))
        common: dict[str, Any] = {
            "student": student,
            "task": task,
            "demonstrations": self.demonstrations.identity(),
            "summaries": self.summaries,
            "summary_max_new_tokens": self.summary_max_new_tokens,
        }
        if unit.part == DEMONSTRATIONS:
            return common
        common["teachers"] = dict(self.teachers)
        if unit.part == "paper":
            return {**common, "paper": self.paper.settings()}
        common["lora_rank"] = self.lora_rank
        if unit.part == "accuracy":
            common["teacher_accuracy"] = self.teacher_accuracy
        return {**common, "measure": (self.nodes if unit.part == "nodes" else self.update).settings()}


@dataclass(frozen=True)
class Unit:
    """What is measured in one piece: a part of a study, of one student on one task.

    Attributes:
        student: Name of the student.
        task: Name of the task.
        part: ``"demonstrations"``, or one of :data:`MEASUREMENTS`.
    """

    student: str
    task: str
    part: str

    def __str__(self) -> str:
        """The unit in words."""
        return f"{self.part} of {self.student} on {self.task}"

    def folder(self, output: Path) -> Path:
        """Where the unit's records are; the teachers' own accuracy is a part of the record of the update."""
        return output / self.student / self.task / ("update" if self.part == "accuracy" else self.part)

    @property
    def needed(self) -> "Unit | None":
        """The unit that must be finished before; None if there is none."""
        return Unit(self.student, self.task, NEEDS[self.part]) if self.part in NEEDS else None


def study_options(given: Mapping[str, Any]) -> StudyOptions:
    """The options from nested dictionaries, as a parser returns them.

    Args:
        given: Values by the names of :class:`StudyOptions`.
    """
    return StudyOptions(
        **{
            **given,
            "students": {name: StudyStudent(**(student or {})) for name, student in given["students"].items()},
            "tasks": {name: StudyTask(**task) for name, task in given["tasks"].items()},
            "demonstrations": DemonstrationOptions(**given["demonstrations"]),
            "update": ProbeConfig(**given["update"]),
            "paper": PaperConfig(**given["paper"]),
            "nodes": ProbeConfig(**given["nodes"]),
        }
    )


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and all(letter.isalnum() or letter in ".-_" for letter in name)
