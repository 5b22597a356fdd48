"""What loggers other than TensorBoard receive."""

from typing import Any

import pytest

from odp_callbacks.visualization.loggers import ReportLogger
from tests.helpers.records import MakeReport, split


class Wandb:
    experiment = object()

    def __init__(self) -> None:
        self.pictures: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert all(hasattr(image, "savefig") for image in images)
        (self.pictures[key],) = images


class MLflow:
    run_id = "7"

    def __init__(self) -> None:
        self.experiment = self
        self.pictures: dict[str, Any] = {}

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        assert run_id == "7"
        self.pictures[artifact_file] = figure


def test_other_loggers_receive_the_pictures_that_they_can_show(make_report: MakeReport) -> None:
    wandb, mlflow = Wandb(), MLflow()
    report_logger = ReportLogger()
    for logger in (wandb, mlflow, object()):
        report_logger.log(logger, make_report(split), 3)
    assert "odp/summary/gain" in wandb.pictures
    assert "odp/summary-gain-00000003.png" in mlflow.pictures


def test_their_pictures_show_the_confidence_level(make_report: MakeReport) -> None:
    wandb, mlflow = Wandb(), MLflow()
    for logger in (wandb, mlflow):
        ReportLogger(confidence=0.8).log(logger, make_report(split), 3)
    for plot in (wandb.pictures["odp/rollout/correct"], mlflow.pictures["odp/rollout-correct-00000003.png"]):
        assert "the 80% interval" in plot.axes[0].texts[-1].get_text()
    with pytest.raises(ValueError, match="`confidence` must"):
        ReportLogger(confidence=0)
