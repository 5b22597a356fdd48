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
        root: How the names of everything begin that is written.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """

    def __init__(self, confidence: float = 0.95, prefix: str = "", root: str = "odp") -> None:
        self.confidence = check_confidence(confidence)
        self.prefix = prefix
        self.root = root
        self._histories: WeakKeyDictionary[Any, _History] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the histories: writers belong to the process that opened them."""
        return {"confidence": self.confidence, "prefix": self.prefix, "root": self.root}

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
        analysis = Analysis(report, self.confidence)
        if not history.has_dashboard:
            # Set before the attempt: a writer for which it fails still receives the rest with the next report.
            history.has_dashboard = True
            self._write_dashboard(writer, analysis)
        self._write_histograms(writer, analysis, step)
        writer.add_text(f"{self.root}/table", as_code(table_text(analysis)), step)
        self._write_changes(writer, history, analysis, step)
        for picture_name, plot in pictures(analysis):
            writer.add_figure(f"{self.root}/{picture_name}", plot, step)

    def _write_dashboard(self, writer: Any, analysis: Analysis) -> None:
        from odp_callbacks.visualization.tensorboard_dashboard import write_dashboard, write_hyperparameters

        write_dashboard(writer, analysis, self.prefix, self.root)
        write_hyperparameters(writer, analysis.report, self.prefix, self.root)

    def _write_changes(self, writer: Any, history: _History, analysis: Analysis, step: int) -> None:
        """Write what has changed since the writer's previous report, if that was of the same teachers."""
        previous, current = history.summaries, analysis.summaries()
        history.summaries = current
        if [summary.teacher for summary in previous] == [summary.teacher for summary in current]:
            writer.add_text(f"{self.root}/changed", as_code(changes_text(previous, current, self.confidence)), step)

    def _write_histograms(self, writer: Any, analysis: Analysis, step: int) -> None:
        """Write histograms of the tokens' influence and alignment, for correct and for incorrect rollouts."""
        report, evidence, influence = analysis.report, analysis.evidence, analysis.influence
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
                        writer.add_histogram(f"{self.root}/{name}_histogram/{tag_of(teacher)}/{split}", of_class, step)
