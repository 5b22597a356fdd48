"""What TensorBoard gets besides scalars: a dashboard, histograms, pictures, text and hyperparameters."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.summaries import GAP, SPLITS, Analysis, summarise
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import printable, shown

CHARTS = {"Predicted gain": "predicted_gain", "Alignment (gain-weighted)": "gain_weighted_alignment",
          "Alignment (token mean)": "alignment"}  # fmt: skip
"""Titles of a teacher's charts, and the figure that each shows."""
LONGEST_TAG = 100
"""Characters of a name in a tag."""


def write_tensorboard(
    writer: Any, report: ProbeReport, step: int, previous: ProbeReport | None = None, prefix: str = ""
) -> None:
    """Write what a probe has to show.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        report: The probe's report.
        step: Optimizer step.
        previous: The probe before, for what changed since.
        prefix: Of the scalars' names, as transformers' ``Trainer`` puts ``"train/"`` before them.
    """
    if previous is None:
        write_dashboard(writer, report.teachers, prefix)
        write_hyperparameters(writer, report, prefix)
    evidence = gather(report.nodes, teachers=len(report.teachers))
    cosine = evidence.cosine
    for k, teacher in enumerate(report.teachers):
        for split, wanted in (("correct", True), ("incorrect", False)):
            values = cosine[evidence.correct == wanted, k]
            values = values[~np.isnan(values)]
            if values.size:
                writer.add_histogram(f"odp/alignment_histogram/{tagged(teacher)}/{split}", values, step)
    writer.add_text("odp/table", as_code(table_text(report)), step)
    if previous is not None and previous.teachers == report.teachers:
        writer.add_text("odp/changed", as_code(changes(previous, report)), step)
    for name, figure in pictures(report):
        writer.add_figure(f"odp/{name}", figure, step)


def pictures(report: ProbeReport) -> Iterator[tuple[str, Any]]:
    """Names and matplotlib figures, drawn one by one; none where matplotlib is missing.

    One that cannot be drawn is left out with a warning, and the others come.
    """
    try:
        from odp_callbacks.visualization import plots
        from odp_callbacks.visualization.rollout_pictures import rollout_figure, telling_rollout
    except ImportError:  # matplotlib belongs to the extra `tensorboard`
        return
    analysis = Analysis(report)
    drawings: dict[str, Callable[[], Any]] = {}
    for split, wanted in (("correct", True), ("incorrect", False)):
        index = telling_rollout(analysis, wanted)
        if index is not None:
            drawings[f"rollout/{split}"] = partial(rollout_figure, analysis, index)
    drawings["summary/gain"] = partial(plots.gains, analysis.summaries(), report.teachers)
    for what, figure in (("alignment", "gain_weighted_alignment"), ("gain", "predicted_gain")):
        drawings[f"summary/{what}_over_depth"] = partial(plots.over_depth, analysis, figure)
        drawings[f"summary/{what}_by_module"] = partial(plots.by_module, analysis, figure)
    drawings["summary/alignment_against_divergence"] = partial(plots.against_divergence, analysis)
    for name, draw in drawings.items():
        with warnings.catch_warnings():
            # A script that matplotlib's font lacks shows as boxes; that is no news for the training log.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            try:
                drawn = draw()
            except Exception as error:
                warnings.warn(f"odp-callbacks: no picture {name}: {type(error).__name__}: {error}", stacklevel=2)
                continue
            # Inside: it is the writing that misses a glyph.
            if drawn is not None:
                yield name, drawn


def tagged(teacher: str) -> str:
    """A teacher's name as a part of a tag: names are checked before training, but records may hold any."""
    return shown(teacher, LONGEST_TAG).replace("/", "_")


def write_dashboard(writer: Any, teachers: tuple[str, ...], prefix: str = "") -> None:
    """The layout of TensorBoard's custom scalars: a figure with its interval as a band, all teachers in one chart."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import layout_pb2

    def margin(title: str, tags: list[str]) -> Any:
        series = [
            layout_pb2.MarginChartContent.Series(
                value=prefix + tag, lower=prefix + _end(tag, "low"), upper=prefix + _end(tag, "high")
            )
            for tag in tags
        ]
        return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=series))

    teachers = tuple(map(tagged, teachers))
    # All of a run's series in a chart have one colour: the first page compares, and then each teacher has its own.
    # TensorBoard shows the last chart of a page first.
    compared = [margin(_title(split), [f"odp/predicted_gain/{teacher}/{split}" for teacher in teachers])
                for split in (*SPLITS, GAP)]  # fmt: skip
    categories = [layout_pb2.Category(title="Predicted gain, all teachers", chart=compared[::-1])]
    for teacher in teachers:
        charts = [
            margin(f"{title}, {_title(split)}", [f"odp/{figure}/{teacher}/{split}"])
            for title, figure in CHARTS.items()
            for split in (*SPLITS[1:], GAP)
        ]
        categories.append(layout_pb2.Category(title=f"Teacher: {teacher}", chart=charts[::-1]))
    cost = layout_pb2.MultilineChartContent(
        tag=[f"^{prefix}{tag}$" for tag in ("odp/probe/time_share", "odp/probe/undetermined_share")]
    )
    categories.append(
        layout_pb2.Category(
            title="Success and cost",
            chart=[
                margin("success of the student", ["odp/probe/success_rate"]),
                layout_pb2.Chart(title="share of time, and of tokens that cannot be told", multiline=cost),
            ],
        )
    )
    # `SummaryWriter.add_custom_scalars` writes the same, but takes one band in a chart.
    layout = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout], tensor_shape=TensorShapeProto())
    kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    value = Summary.Value(tag="custom_scalars__config__", tensor=tensor, metadata=kind)
    writer._get_file_writer().add_summary(Summary(value=[value]))


def _title(split: str) -> str:
    return "incorrect less correct" if split == GAP else f"{split} rollouts"


def _end(tag: str, end: str) -> str:
    """``odp/figure/rest`` to ``odp/figure_low/rest``."""
    first, figure, *rest = tag.split("/")
    if figure == "probe":
        return f"{tag}_{end}"
    return "/".join([first, f"{figure}_{end}", *rest])


def write_hyperparameters(writer: Any, report: ProbeReport, prefix: str = "") -> None:
    """How the probes measure, in TensorBoard's page of hyperparameters."""
    from torch.utils.tensorboard.summary import hparams

    plain: Mapping[str, Any] = {
        f"odp/{name}": value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in report.settings.items()
        if name != "seed"
    }
    metrics = {f"{prefix}odp/predicted_gain/{teacher}/all": None for teacher in map(tagged, report.teachers)}
    for part in hparams(dict(plain), metrics):
        writer._get_file_writer().add_summary(part)


def table_text(report: ProbeReport) -> str:
    """The table as plain text."""
    try:
        from rich.console import Console

        from odp_callbacks.visualization.table import summary_table
    except ImportError:  # rich belongs to the extras
        return ""
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(summary_table(report))
    return out.getvalue()


def changes(before: ProbeReport, now: ProbeReport) -> str:
    """What changed in predicted gain since the probe before; of different questions, so as of independent ones."""
    old = {(s.teacher, s.split): s.figures["predicted_gain"] for s in summarise(before)}
    lines = ["predicted gain since the last probe", ""]
    for s in summarise(now):
        a, b = old[s.teacher, s.split], s.figures["predicted_gain"]
        value, half = b.value - a.value, math.hypot(a.half_width, b.half_width)
        if math.isnan(value):
            said = "cannot be compared"
        elif math.isnan(half):
            said = f"{value:+.3f}, without an interval"
        else:
            what = "rose" if value > half else "fell" if -value > half else "no measurable change"
            said = f"{value:+.3f} ({value - half:+.3f} to {value + half:+.3f}): {what}"
        lines.append(f"{s.teacher}, {s.split}: {a.value:+.3f} to {b.value:+.3f}, {said}")
    return "\n".join(lines)


def as_code(text: str) -> str:
    r"""Text for TensorBoard, which reads Markdown: indented, it is shown as it is.

    Examples:
        >>> as_code("a\n<b>")
        '    a\n    <b>'
    """
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))
