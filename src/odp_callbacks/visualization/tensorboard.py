"""What TensorBoard shows: scalars in runs of teachers, a dashboard, histograms, pictures, text and hyperparameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.summaries import Analysis, ClassSummary
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.pictures import pictures
from odp_callbacks.visualization.report_text import as_code, changes_text, table_text
from odp_callbacks.visualization.tensorboard_runs import TeacherRuns
from odp_callbacks.visualization.tensorboard_tags import HISTOGRAMS, PICTURES, ScalarPlaces


@dataclass
class _History:
    """What one writer of a trainer has received so far, and the runs beside it.

    Attributes:
        runs: The runs beside that of the trainer.
        has_dashboard: Whether the dashboard was written.
        tags: For each tag of a scalar, whether it has had a number.
        summaries: Of the last report.
    """

    runs: TeacherRuns
    has_dashboard: bool = False
    tags: dict[str, bool] = field(default_factory=dict)
    summaries: Sequence[ClassSummary] = ()


class TensorBoardReports:
    """Writes scalars and reports to TensorBoard, and remembers what each writer has received.

    A writer receives the dashboard and the hyperparameters once, with its first report. With each later report it also
    receives a text on what has changed since the previous one. Each teacher has a run of its own, in a subfolder of the
    writer's folder.

    Args:
        confidence: Level of the intervals, in (0, 1).
        root: How the names of everything begin that is written.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """

    def __init__(self, confidence: float = 0.95, root: str = "odp") -> None:
        self.confidence = check_confidence(confidence)
        self.root = root
        self._histories: WeakKeyDictionary[Any, _History] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the histories: writers belong to the process that opened them."""
        return {"confidence": self.confidence, "root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def write_scalars(
        self, writer: Any, metrics: Mapping[str, float], teachers: Sequence[str], step: int, *, is_training: bool = True
    ) -> dict[str, float]:
        """Write the scalars of teachers, each teacher's to a run of its own.

        Args:
            writer: The ``torch.utils.tensorboard.SummaryWriter`` of the trainer.
            metrics: Scalars by name. What is undefined is not written, so that no card is empty.
            teachers: Names of the teachers.
            step: The optimizer step.
            is_training: Whether a training is under way, which replaces what an interrupted run logged after this step.

        Returns:
            What is left for the trainer's own run, under its tags.
        """
        history = self._history(writer)
        places = ScalarPlaces(teachers, self.root)
        numbers = {name: value for name, value in metrics.items() if isfinite(value)}
        by_run = places.by_run(numbers)
        history.tags = {**{places.of(name).tag: False for name in metrics}, **history.tags}
        history.tags |= {tag: True for tags in by_run.values() for tag in tags}
        history.runs.add_scalars(by_run, step, replaces=is_training)
        return by_run[""]

    def write(self, writer: Any, report: ProbeReport, step: int, *, is_training: bool = True) -> None:
        """Write a report; its scalars come before it.

        Args:
            writer: The ``torch.utils.tensorboard.SummaryWriter`` of the trainer.
            report: The probe's report.
            step: The optimizer step.
            is_training: As in :meth:`write_scalars`.
        """
        history = self._history(writer)
        analysis = Analysis(report, self.confidence)
        if not history.has_dashboard:
            # Set before the attempt: a writer for which it fails still receives the rest with the next report.
            history.has_dashboard = True
            self._write_dashboard(writer, analysis, history)
        self._write_histograms(history.runs, analysis, step, is_training)
        writer.add_text(f"{self.root}/table", as_code(table_text(analysis)), step)
        self._write_changes(writer, history, analysis, step)
        for picture_name, plot in pictures(analysis):
            writer.add_figure(f"{self.root}{PICTURES}/{picture_name}", plot, step)
        history.runs.flush()  # by itself a writer waits for two minutes

    def close(self) -> None:
        """Close the files of the teachers' runs; what is written later opens others."""
        for history in self._histories.values():
            history.runs.close()

    def _history(self, writer: Any) -> _History:
        if writer not in self._histories:
            self._histories[writer] = _History(TeacherRuns(writer, self.root))
        return self._histories[writer]

    def _write_dashboard(self, writer: Any, analysis: Analysis, history: _History) -> None:
        from odp_callbacks.visualization.tensorboard_dashboard import write_dashboard, write_hyperparameters

        write_dashboard(writer, history.tags, self.root)
        write_hyperparameters(writer, analysis.report, self.root)

    def _write_changes(self, writer: Any, history: _History, analysis: Analysis, step: int) -> None:
        """Write what has changed since the writer's previous report, if that was of the same teachers."""
        previous, current = history.summaries, analysis.summaries()
        history.summaries = current
        if [summary.teacher for summary in previous] == [summary.teacher for summary in current]:
            text = as_code(changes_text(previous, current, self.confidence))
            writer.add_text(f"{self.root}/changed", text, step)

    def _write_histograms(self, runs: TeacherRuns, analysis: Analysis, step: int, is_training: bool) -> None:
        """Write histograms of the tokens' influence and alignment, for correct and for incorrect rollouts."""
        report, evidence, influence = analysis.report, analysis.evidence, analysis.influence
        run_of = ScalarPlaces(report.teachers, self.root).runs
        histograms = [("alignment", evidence.cosine, evidence.correct)]
        if influence is not None:
            correct = np.repeat([rollout.correct for rollout in report.rollouts], np.diff(influence.starts))
            histograms.append(("influence", influence.value, correct))
        for name, values, correct in histograms:
            for teacher_index, teacher in enumerate(report.teachers):
                for split, is_correct in (("correct", True), ("incorrect", False)):
                    of_class = values[correct == is_correct, teacher_index]
                    of_class = of_class[~np.isnan(of_class)]
                    if of_class.size:
                        writer = runs.writer(run_of[teacher], step, replaces=is_training)
                        writer.add_histogram(f"{self.root}{HISTOGRAMS}/{name}/{split}", of_class, step)
