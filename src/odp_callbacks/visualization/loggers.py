"""Scalars and reports in Lightning's loggers, in the form that each logger can show."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.pictures import pictures
from odp_callbacks.visualization.tensorboard import TensorBoardReports

NO_NAME = "a name that no logger has"
"""What Lightning puts in the place of a logger in ``fast_dev_run`` has every attribute, even this one."""


EMPTY = ""
"""What stands in a table for a figure that does not exist."""


def is_tensorboard(logger: Any) -> bool:
    """Whether one of Lightning's loggers writes to TensorBoard."""
    experiment: Any = getattr(logger, "experiment", None)
    return hasattr(experiment, "add_histogram") and not hasattr(experiment, NO_NAME)


def is_table(logger: Any) -> bool:
    """Whether one of Lightning's loggers writes a table, in which a new scalar is a new column: the CSVLogger."""
    return isinstance(getattr(getattr(logger, "experiment", None), "metrics_keys", None), list)


class ReportLogger:
    """Sends to each logger the scalars, and what else it can show of a report.

    TensorBoard receives everything; Weights & Biases, Comet and MLflow receive the pictures. Loggers are recognised by
    their methods, and others receive nothing, nor do stand-ins for loggers.

    Args:
        confidence: Level of the intervals, in (0, 1).
        root: How the names of everything begin that is sent.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """

    def __init__(self, confidence: float = 0.95, root: str = "odp") -> None:
        self.root = root
        self._tensorboard = TensorBoardReports(confidence, root=root)

    def log_scalars(
        self, logger: Any, metrics: Mapping[str, float], teachers: Sequence[str], step: int, *, is_training: bool = True
    ) -> None:
        """Send scalars to a logger; what is undefined is not logged, and stays empty in a table.

        Args:
            logger: Any of Lightning's loggers.
            metrics: Scalars by name.
            teachers: Names of the teachers, each of which is a run of its own in TensorBoard.
            step: The optimizer step.
            is_training: Whether a training is under way.
        """
        logged: dict[str, Any] = {name: value for name, value in metrics.items() if isfinite(value)}
        if is_tensorboard(logger):
            logged = self._tensorboard.write_scalars(
                logger.experiment, metrics, teachers, step, is_training=is_training
            )
        elif logged and is_table(logger):
            logged = {**dict.fromkeys(metrics, EMPTY), **logged}
        if logged:
            logger.log_metrics(logged, step=step)

    def announce(self, logger: Any, names: Sequence[str], step: int) -> None:
        """Name the scalars that will come to a logger that writes a table, in a row without any number.

        Args:
            logger: Any of Lightning's loggers; those without a table are left alone.
            names: Names of scalars.
            step: The optimizer step.
        """
        if is_table(logger) and not set(names) <= set(logger.experiment.metrics_keys):
            logger.log_metrics(dict.fromkeys(names, EMPTY), step=step)

    def close(self) -> None:
        """Close the files of the teachers' runs in TensorBoard; what is logged later opens others."""
        self._tensorboard.close()

    def log(self, logger: Any, report: ProbeReport, step: int, *, is_training: bool = True) -> None:
        """Send a report to a logger.

        Args:
            logger: Any of Lightning's loggers.
            report: The probe's report.
            step: The optimizer step.
            is_training: Whether a training is under way.
        """
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, NO_NAME):
            return
        if is_tensorboard(logger):
            self._tensorboard.write(experiment, report, step, is_training=is_training)
        elif hasattr(logger, "log_image"):  # Weights & Biases, Comet
            for picture_name, plot in pictures(Analysis(report, self._tensorboard.confidence)):
                logger.log_image(f"{self.root}/{picture_name}", [plot], step=step)
        elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
            for picture_name, plot in pictures(Analysis(report, self._tensorboard.confidence)):
                file_name = f"{picture_name.replace('/', '-')}-{step:08d}.png"
                experiment.log_figure(logger.run_id, plot, f"{self.root}/{file_name}")
