"""Reports in Lightning's loggers: whatever a logger can show besides scalars."""

from typing import Any

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.pictures import pictures
from odp_callbacks.visualization.tensorboard import TensorBoardReports

NO_NAME = "a name that no logger has"
"""What Lightning puts in the place of a logger in ``fast_dev_run`` has every attribute, even this one."""


def is_tensorboard(logger: Any) -> bool:
    """Whether one of Lightning's loggers writes to TensorBoard."""
    experiment: Any = getattr(logger, "experiment", None)
    return hasattr(experiment, "add_histogram") and not hasattr(experiment, NO_NAME)


class ReportLogger:
    """Sends to each logger what it can show of a report besides scalars.

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

    def log(self, logger: Any, report: ProbeReport, step: int) -> None:
        """Send a report to a logger.

        Args:
            logger: Any of Lightning's loggers.
            report: The probe's report.
            step: The optimizer step.
        """
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, NO_NAME):
            return
        if is_tensorboard(logger):
            self._tensorboard.write(experiment, report, step)
        elif hasattr(logger, "log_image"):  # Weights & Biases, Comet
            for picture_name, plot in pictures(Analysis(report, self._tensorboard.confidence)):
                logger.log_image(f"{self.root}/{picture_name}", [plot], step=step)
        elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
            for picture_name, plot in pictures(Analysis(report, self._tensorboard.confidence)):
                file_name = f"{picture_name.replace('/', '-')}-{step:08d}.png"
                experiment.log_figure(logger.run_id, plot, f"{self.root}/{file_name}")
