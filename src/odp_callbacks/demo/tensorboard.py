"""The demo in TensorBoard: the probe as a callback logs it, and success before and after each teacher's step."""

from typing import Any

from odp_callbacks.analysis.scalar_selection import ScalarSelection
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.demo.results import DemoResults
from odp_callbacks.visualization.tensorboard import TensorBoardReports
from odp_callbacks.visualization.tensorboard_runs import TeacherRuns

ROOT = "odp"
HELD_OUT_SUCCESS = "held_out_success"
"""Each teacher is a line from the success before its step to that after it."""
PINNED = (HELD_OUT_SUCCESS, "update_gain", "update_gain/correct", "update_gain/incorrect")
"""Tags of the cards on top of the first tab."""
REPEATED = 8
"""How often the success after a step is written. Of few points, TensorBoard leaves the largest and the smallest out of
a chart's range, and its smoothing draws a second one too near to the first."""


def write_to_tensorboard(results: DemoResults, writer: Any) -> None:
    """Write the report and the steps.

    Args:
        results: What the demo found.
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
    """
    report = results.report
    reports = TensorBoardReports(report.confidence, ROOT)
    selected = ScalarSelection(tuple(report.teachers)).numbers(scalars(report, report.confidence))
    # What was measured before the step holds for the whole of it: a line, where single points would not be seen.
    for step in (0, 1):
        for tag, value in reports.write_scalars(writer, selected, report.teachers, step, is_training=False).items():
            writer.add_scalar(tag, value, step)
    reports.write(writer, report, 0, is_training=False)
    runs = TeacherRuns(writer, ROOT)
    for teacher, gain in results.gains.items():
        for step, success in [(0, gain.before), *[(1, gain.after)] * REPEATED]:
            runs.add_scalars({teacher: {f"{ROOT}/{HELD_OUT_SUCCESS}": success.value}}, step, replaces=False)
    runs.close()
    reports.close()
    writer.close()
