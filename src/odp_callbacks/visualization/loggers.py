"""A probe to any of Lightning's loggers: figures to all of them, pictures to those that take some."""

from typing import Any

from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.tensorboard import pictures, write_tensorboard


def log_pictures(logger: Any, report: ProbeReport, step: int, previous: ProbeReport | None = None) -> None:
    """What a logger can show besides scalars: TensorBoard all, Weights & Biases and MLflow the pictures.

    Args:
        logger: Any logger; known by what it can do.
        report: The probe's report.
        step: Optimizer step.
        previous: The probe before, for what changed since.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram"):
        write_tensorboard(experiment, report, step, previous)
    elif hasattr(logger, "log_image"):  # Weights & Biases, Comet ...
        for name, figure in pictures(report):
            logger.log_image(f"odp/{name}", [figure], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        for name, figure in pictures(report):
            experiment.log_figure(logger.run_id, figure, f"odp/{name.replace('/', '-')}-{step:08d}.png")
