"""What TensorBoard shows of a report besides scalars: a dashboard, histograms, pictures, text and hyperparameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.summaries import Analysis, ClassSummary
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.pictures import pictures
from odp_callbacks.visualization.report_text import as_code, changes_text, table_text
from odp_callbacks.visualization.wording import tag_of


@dataclass
class _History:
    """What one writer has received so far."""

    has_dashboard: bool = False
    summaries: Sequence[ClassSummary] = ()


class TensorBoardReports:
    """Writes reports to TensorBoard, and remembers what each writer has received.

    A writer receives the dashboard and the hyperparameters once, with its first report. With each later report it also
    receives a text on what has changed since the previous one.

    Args:
        confidence: Level of the intervals, in (0, 1).
        prefix: Prefix of the scalars' names, such as the ``"train/"`` of transformers' ``Trainer``.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """

    def __init__(self, confidence: float = 0.95, prefix: str = "") -> None:
        self.confidence = check_confidence(confidence)
        self.prefix = prefix
        self._histories: WeakKeyDictionary[Any, _History] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the histories: writers belong to the process that opened them."""
        return {"confidence": self.confidence, "prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def write(self, writer: Any, report: ProbeReport, step: int) -> None:
        """Write a report.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``.
            report: The probe's report.
            step: The optimizer step.
        """
        history = self._histories.setdefault(writer, _History())
        if not history.has_dashboard:
            # Set before the attempt: a writer for which it fails still receives the rest with the next report.
            history.has_dashboard = True
            self._write_dashboard(writer, report)
        analysis = Analysis(report, self.confidence)
        _write_histograms(writer, analysis, step)
        writer.add_text("odp/table", as_code(table_text(analysis)), step)
        self._write_changes(writer, history, analysis, step)
        for picture_name, plot in pictures(analysis):
            writer.add_figure(f"odp/{picture_name}", plot, step)

    def _write_dashboard(self, writer: Any, report: ProbeReport) -> None:
        from odp_callbacks.visualization.tensorboard_dashboard import write_dashboard, write_hyperparameters

        write_dashboard(writer, report.teachers, self.prefix)
        write_hyperparameters(writer, report, self.prefix)

    def _write_changes(self, writer: Any, history: _History, analysis: Analysis, step: int) -> None:
        """Write what has changed since the writer's previous report, if that was of the same teachers."""
        previous, current = history.summaries, analysis.summaries()
        history.summaries = current
        if [summary.teacher for summary in previous] == [summary.teacher for summary in current]:
            writer.add_text("odp/changed", as_code(changes_text(previous, current, self.confidence)), step)


def _write_histograms(writer: Any, analysis: Analysis, step: int) -> None:
    """Write histograms of the tokens' alignment with each teacher, for correct and for incorrect rollouts."""
    evidence = analysis.evidence
    for teacher_index, teacher in enumerate(analysis.report.teachers):
        for split, is_correct in (("correct", True), ("incorrect", False)):
            alignment = evidence.cosine[evidence.correct == is_correct, teacher_index]
            alignment = alignment[~np.isnan(alignment)]
            if alignment.size:
                writer.add_histogram(f"odp/alignment_histogram/{tag_of(teacher)}/{split}", alignment, step)
