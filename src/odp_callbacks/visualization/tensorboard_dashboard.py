"""TensorBoard's custom-scalars dashboard and hyperparameter page."""

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.api_pb2 import MetricInfo, MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.tensorboard_tags import DETAILS, interval_tags, run_names
from odp_callbacks.visualization.wording import class_title

GAINS = {"Update gain": "update_gain", "Predicted gain": "predicted_gain"}
"""Titles of the first pages, and the figure that each shows."""
CLASSES = ("", "/correct", "/incorrect", f"/{INCORRECT_MINUS_CORRECT}")
"""How the tags of a figure go on; nothing for all rollouts."""
OTHERS = {
    "Update gain": {
        "All probes so far": "pooled/update_gain",
        "The training's own rollouts": "training/update_gain",
        "In the geometry of Adam": "adam/update_gain",
    },
    "Predicted gain": {"In the geometry of Adam": "adam/predicted_gain"},
}
"""Further charts of these pages."""
STEPS = {
    "Sum of the expected gains, and change of the reward": "step/gain_sum",
    "Expected gain of each step": "step/gain",
    "Reward of the training": "step/reward",
}
PROBES = {"Student's success rate": "probe/success_rate", "Share of training time spent on probes": "probe/time_share"}


def write_dashboard(writer: Any, tags: Mapping[str, bool], root: str = "odp") -> None:
    """Write the layout of the custom-scalars dashboard.

    Each chart shows a figure with its interval as a band, and the runs of all teachers, each in its own colour.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        tags: The tags of all scalars, and whether each has had a number.
        root: How the names of the scalars begin.
    """
    layout_bytes = dashboard_layout(tags, root).SerializeToString()
    layout_tensor = TensorProto(dtype="DT_STRING", string_val=[layout_bytes], tensor_shape=TensorShapeProto())
    plugin_metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    value = Summary.Value(tag="custom_scalars__config__", tensor=layout_tensor, metadata=plugin_metadata)
    writer._get_file_writer().add_summary(Summary(value=[value]))


def dashboard_layout(tags: Mapping[str, bool], root: str = "odp") -> Any:
    """Lay out the dashboard: pages on the gain of the teachers, on the steps that training took, and on the probes.

    Charts and pages without a number so far come after the others, so that nobody sees an empty chart first.
    Of a page, TensorBoard shows the charts without a band first, in their order, and those with one in reverse order.

    Args:
        tags: The tags of all scalars, and whether each has had a number.
        root: How the names of the scalars begin.

    Returns:
        A ``tensorboard.plugins.custom_scalar.layout_pb2.Layout``.
    """
    pages: dict[str, dict[str, str]] = {}
    for page, figure in GAINS.items():
        by_class = {_capitalise(class_title(rest.strip("/") or "all")): f"{figure}{rest}" for rest in CLASSES}
        pages[page] = {**by_class, **OTHERS[page]}
    pages |= {"Steps": STEPS, "Success and cost": PROBES}
    tag_of = {figure: _known_tag(figure, tags, root) for charts in pages.values() for figure in charts.values()}
    has_number = {figure: tags.get(tag, False) for figure, tag in tag_of.items()}
    categories = []
    for page, charts in sorted(pages.items(), key=lambda item: not any(map(has_number.get, item[1].values()))):
        # Steps are logged when they are taken, which may be after the first report.
        known = {title: figure for title, figure in charts.items() if page == "Steps" or tag_of[figure] in tags}
        in_order = sorted(known.items(), key=lambda item: not has_number[item[1]])
        if in_order:
            drawn = [_chart(title, tag_of[figure], tags, root) for title, figure in in_order]
            bands = [chart for chart in drawn if chart.HasField("margin")]
            lines = [chart for chart in drawn if not chart.HasField("margin")]
            categories.append(layout_pb2.Category(title=page, chart=[*lines, *bands[::-1]]))
    return layout_pb2.Layout(category=categories)


def _known_tag(figure: str, tags: Mapping[str, bool], root: str) -> str:
    """Tag of a figure, in whichever group it is."""
    in_details = f"{root}{DETAILS}/{figure}"
    return in_details if in_details in tags else f"{root}/{figure}"


def _chart(title: str, tag: str, tags: Mapping[str, bool], root: str) -> Any:
    """Chart a scalar with its interval as a band, unless it has a number without one, which would not be shown."""
    low, high = interval_tags(tag, root)
    if low in tags and high in tags and (tags[low] or not tags[tag]):
        band = layout_pb2.MarginChartContent.Series(value=tag, lower=low, upper=high)
        return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[band]))
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))


def _capitalise(title: str) -> str:
    return title[0].upper() + title[1:]


def write_hyperparameters(writer: Any, report: ProbeReport, root: str = "odp") -> None:
    """Write the probe's settings to TensorBoard's page of hyperparameters, with the gain of each teacher.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        report: The probe's report.
        root: How the names of the scalars begin.
    """
    settings = {
        f"{root}/{setting_name}": value if isinstance(value, bool | int | float | str) else str(value)
        for setting_name, value in report.settings.items()
        if setting_name != "seed"
    }
    figure = "update_gain" if report.updates else "predicted_gain"
    experiment, *others = hparams(settings, {})
    content = HParamsPluginData.FromString(experiment.value[0].metadata.plugin_data.content)
    runs = run_names(report.teachers)
    # A group is the path of another run, seen from the run that has the settings.
    names = [MetricName(group=f"{root}/{runs[teacher]}", tag=f"{root}/{figure}") for teacher in report.teachers]
    content.experiment.metric_infos.extend(
        MetricInfo(name=name, display_name=f"{figure}, {teacher}")
        for name, teacher in zip(names, report.teachers, strict=True)
    )
    experiment.value[0].metadata.plugin_data.content = content.SerializeToString()
    for summary in (experiment, *others):
        writer._get_file_writer().add_summary(summary)
