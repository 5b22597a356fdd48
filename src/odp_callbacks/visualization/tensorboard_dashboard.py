"""TensorBoard's custom-scalars dashboard and hyperparameter page."""

from collections.abc import Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard.summary import hparams

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, SPLITS
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.wording import class_title, tag_of

CHARTS = {"Predicted gain": "predicted_gain", "Alignment (gain-weighted)": "gain_weighted_alignment",
          "Alignment (token mean)": "alignment"}  # fmt: skip
"""Titles of a teacher's charts, and the figure that each shows."""


def write_dashboard(writer: Any, teachers: Sequence[str], prefix: str = "") -> None:
    """Write the layout of the custom-scalars dashboard.

    Each chart shows a figure with its interval as a band. ``SummaryWriter.add_custom_scalars`` allows one band in a
    chart; this function puts all teachers into one.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        teachers: The teachers' names.
        prefix: Prefix of the scalars' names.
    """
    layout_bytes = dashboard_layout(teachers, prefix).SerializeToString()
    layout_tensor = TensorProto(dtype="DT_STRING", string_val=[layout_bytes], tensor_shape=TensorShapeProto())
    plugin_metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    value = Summary.Value(tag="custom_scalars__config__", tensor=layout_tensor, metadata=plugin_metadata)
    writer._get_file_writer().add_summary(Summary(value=[value]))


def dashboard_layout(teachers: Sequence[str], prefix: str = "") -> Any:
    """Lay out the dashboard: a page that compares the teachers, a page for each of them, and a page on the cost.

    All of a run's series in one chart have the same colour, so each teacher also has a page of its own. TensorBoard
    shows the charts of a page in reverse order.

    Args:
        teachers: The teachers' names.
        prefix: Prefix of the scalars' names.

    Returns:
        A ``tensorboard.plugins.custom_scalar.layout_pb2.Layout``.
    """
    teacher_tags = [tag_of(teacher) for teacher in teachers]
    comparison = [
        _band_chart(
            _capitalise(class_title(split)), [f"odp/predicted_gain/{tag}/{split}" for tag in teacher_tags], prefix
        )
        for split in (*SPLITS, INCORRECT_MINUS_CORRECT)
    ]
    dashboard_pages = [layout_pb2.Category(title="Predicted gain, all teachers", chart=comparison[::-1])]
    for tag in teacher_tags:
        charts = [
            _band_chart(f"{title}, {class_title(split)}", [f"odp/{figure}/{tag}/{split}"], prefix)
            for title, figure in CHARTS.items()
            for split in (*SPLITS[1:], INCORRECT_MINUS_CORRECT)
        ]
        dashboard_pages.append(layout_pb2.Category(title=f"Teacher: {tag}", chart=charts[::-1]))
    share_lines = layout_pb2.MultilineChartContent(
        tag=[f"^{prefix}{tag}$" for tag in ("odp/probe/time_share", "odp/probe/undetermined_share")]
    )
    charts = [
        _band_chart("Student's success rate", ["odp/probe/success_rate"], prefix),
        layout_pb2.Chart(
            title="Share of training time spent on probes, share of undetermined tokens", multiline=share_lines
        ),
    ]
    dashboard_pages.append(layout_pb2.Category(title="Success and cost", chart=charts))
    return layout_pb2.Layout(category=dashboard_pages)


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


def write_hyperparameters(writer: Any, report: ProbeReport, prefix: str = "") -> None:
    """Write the probe's settings to TensorBoard's page of hyperparameters.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        report: The probe's report.
        prefix: Prefix of the scalars' names.
    """
    settings = {
        f"odp/{setting_name}": value if isinstance(value, bool | int | float | str) else str(value)
        for setting_name, value in report.settings.items()
        if setting_name != "seed"
    }
    metrics = {f"{prefix}odp/predicted_gain/{tag_of(teacher)}/all": None for teacher in report.teachers}
    for summary in hparams(settings, metrics):
        writer._get_file_writer().add_summary(summary)
