"""TensorBoard's custom-scalars dashboard and hyperparameter page."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard.summary import hparams

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, SPLITS, Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.wording import class_title, tag_of

CHARTS = {
    "Update gain": "update_gain",
    "Predicted gain": "predicted_gain",
    "Alignment (gain-weighted)": "gain_weighted_alignment",
    "Alignment (token mean)": "alignment",
}
"""Titles of a teacher's charts, and the figure that each shows."""


@dataclass(frozen=True)
class _Chart:
    """A chart, and whether a number stands in it from the first report on."""

    chart: Any
    has_number: bool


def write_dashboard(writer: Any, analysis: Analysis, prefix: str = "", root: str = "odp") -> None:
    """Write the layout of the custom-scalars dashboard.

    Each chart shows a figure with its interval as a band. ``SummaryWriter.add_custom_scalars`` allows one band in a
    chart; this function puts all teachers into one.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        analysis: Of the first report.
        prefix: Prefix of the scalars' names.
        root: How the names of the scalars go on.
    """
    layout_bytes = dashboard_layout(analysis, prefix, root).SerializeToString()
    layout_tensor = TensorProto(dtype="DT_STRING", string_val=[layout_bytes], tensor_shape=TensorShapeProto())
    plugin_metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    value = Summary.Value(tag="custom_scalars__config__", tensor=layout_tensor, metadata=plugin_metadata)
    writer._get_file_writer().add_summary(Summary(value=[value]))


def dashboard_layout(analysis: Analysis, prefix: str = "", root: str = "odp") -> Any:
    """Lay out the dashboard: a page that compares the teachers, a page for each of them, and a page on the cost.

    The first page is on the update gain where it was measured. Charts and pages without a number in the first report
    come after the others, so that nobody sees an empty chart first. All of a run's series in one chart have the same
    colour, so each teacher also has a page of its own. TensorBoard shows the charts of a page in reverse order.

    Args:
        analysis: Of the first report.
        prefix: Prefix of the scalars' names.
        root: How the names of the scalars go on.

    Returns:
        A ``tensorboard.plugins.custom_scalar.layout_pb2.Layout``.
    """
    estimates = {
        (figure, summary.teacher, summary.split): estimate.value
        for summary in analysis.summaries()
        for figure, estimate in summary.figures.items()
    }
    figures, teachers = {figure for figure, _, _ in estimates}, analysis.report.teachers

    def chart(title: str, figure: str, split: str, shown: Sequence[str]) -> _Chart:
        tags = [f"{root}/{figure}/{tag_of(teacher)}/{split}" for teacher in shown]
        has_number = any(isfinite(estimates[figure, teacher, split]) for teacher in shown)
        return _Chart(_band_chart(title, tags, prefix), has_number)

    pages = [
        (
            f"{title}, all teachers",
            [
                chart(_capitalise(class_title(split)), figure, split, teachers)
                for split in (*SPLITS, INCORRECT_MINUS_CORRECT)
            ],
        )
        for title, figure in list(CHARTS.items())[:2]
        if figure in figures
    ]
    for teacher in teachers:
        charts = [
            chart(f"{title}, {class_title(split)}", figure, split, [teacher])
            for title, figure in CHARTS.items()
            for split in (*SPLITS[1:], INCORRECT_MINUS_CORRECT)
            if figure in figures
        ]
        pages.append((f"Teacher: {tag_of(teacher)}", charts))
    pages.append(("Success and cost", _success_and_cost(prefix, root)))
    in_order = sorted(pages, key=lambda page: not any(chart.has_number for chart in page[1]))
    return layout_pb2.Layout(
        category=[layout_pb2.Category(title=title, chart=_numbers_first(charts)[::-1]) for title, charts in in_order]
    )


def _numbers_first(charts: Sequence[_Chart]) -> list[Any]:
    return [chart.chart for chart in sorted(charts, key=lambda chart: not chart.has_number)]


def _success_and_cost(prefix: str, root: str) -> list[_Chart]:
    share_lines = layout_pb2.MultilineChartContent(
        tag=[f"^{prefix}{root}/probe/{tag}$" for tag in ("time_share", "undetermined_share")]
    )
    shares = layout_pb2.Chart(
        title="Share of training time spent on probes, share of undetermined tokens", multiline=share_lines
    )
    success = _band_chart("Student's success rate", [f"{root}/probe/success_rate"], prefix)
    return [_Chart(success, True), _Chart(shares, True)]


def _band_chart(title: str, scalar_tags: Sequence[str], prefix: str) -> Any:
    """Chart scalars, each with its interval as a band."""
    band_series = [
        layout_pb2.MarginChartContent.Series(
            value=prefix + tag, lower=prefix + _end_tag(tag, "low"), upper=prefix + _end_tag(tag, "high")
        )
        for tag in scalar_tags
    ]
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=band_series))


def _end_tag(tag: str, end: str) -> str:
    """Name one end of a scalar's interval: ``odp/figure/rest`` becomes ``odp/figure_low/rest``."""
    first_part, figure, *other_parts = tag.split("/")
    if figure == "probe":
        return f"{tag}_{end}"
    return "/".join([first_part, f"{figure}_{end}", *other_parts])


def _capitalise(title: str) -> str:
    return title[0].upper() + title[1:]


def write_hyperparameters(writer: Any, report: ProbeReport, prefix: str = "", root: str = "odp") -> None:
    """Write the probe's settings to TensorBoard's page of hyperparameters.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        report: The probe's report.
        prefix: Prefix of the scalars' names.
        root: How the names of the scalars go on.
    """
    settings = {
        f"{root}/{setting_name}": value if isinstance(value, bool | int | float | str) else str(value)
        for setting_name, value in report.settings.items()
        if setting_name != "seed"
    }
    figure = "update_gain" if report.updates else "predicted_gain"
    metrics = {f"{prefix}{root}/{figure}/{tag_of(teacher)}/all": None for teacher in report.teachers}
    for summary in hparams(settings, metrics):
        writer._get_file_writer().add_summary(summary)
