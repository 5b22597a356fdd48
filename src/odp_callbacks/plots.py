"""Plots of a probe, for TensorBoard and for the report, where they are SVG that reads on light and on dark ground."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from odp_callbacks.estimates import DEFINED, statuses
from odp_callbacks.evidence import gather
from odp_callbacks.records import ProbeReport
from odp_callbacks.summaries import SPLITS, Analysis, ClassSummary, correlations

GREY = "#808080"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
"""Told apart by colour-blind eyes; the first seven after Okabe and Ito. Every teacher has a marker of its own, too."""
MARKERS = "osD^vPX*"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "odp-callbacks", "font.size": 10, "text.color": GREY,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "font.family": "sans-serif",
}  # fmt: skip


def gains(summaries: Sequence[ClassSummary], teachers: Sequence[str]) -> Figure:
    """Predicted gain of each teacher in each class, with its interval."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0, 1.3 + 0.28 * len(teachers) * 3), layout="constrained")
        axes = figure.add_subplot()
        found = {(s.teacher, s.split): s.figures["predicted_gain"] for s in summaries}
        for i, split in enumerate(SPLITS):
            for k, teacher in enumerate(teachers):
                figure_ = found[teacher, split]
                y = i * (len(teachers) + 1) + k
                _whisker(axes, figure_.value, y, figure_.low, figure_.high, k, horizontal=True)
        axes.set_yticks(
            [i * (len(teachers) + 1) + (len(teachers) - 1) / 2 for i in range(len(SPLITS))],
            [f"{split} rollouts" for split in SPLITS],
        )
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xlabel("harms  ←  predicted gain: success gained per unit step  →  helps")
        _legend(axes, teachers)
        return figure


def over_depth(analysis: Analysis) -> Figure:
    """Predicted gain over depth windows."""
    summaries = analysis.summaries("depth")
    names = list(dict.fromkeys(s.split for s in summaries))
    return _lines(
        summaries, analysis.report.teachers, names, [n.removeprefix("depth ") for n in names], "response token"
    )


def over_steps(reports: Sequence[tuple[str, ProbeReport]], confidence: float) -> Figure:
    """Predicted gain on all rollouts, probe after probe."""
    summaries = []
    for name, report in reports:
        for s in Analysis(report, confidence).summaries():
            if s.split == "all":
                summaries.append(ClassSummary(s.teacher, name, s.figures, s.nodes, s.undefined, s.undetermined))
    names = [name for name, _ in reports]
    return _lines(summaries, reports[-1][1].teachers, names, names, "probe")


def by_module(analysis: Analysis, most: int = 16) -> Figure | None:
    """Predicted gain of each teacher in each LoRA module, the strongest first; None where modules are not apart."""
    report = analysis.report
    if len(report.modules) < 2:
        return None
    found = {(s.teacher, s.split): s.figures["predicted_gain"].value for s in analysis.summaries("module")}
    strength = {m: np.nanmax([abs(found[t, m]) for t in report.teachers] + [0.0]) for m in report.modules}
    names = sorted(report.modules, key=lambda m: -float(strength[m]))[:most]
    values = np.array([[found[t, m] for t in report.teachers] for m in names])
    finite = np.abs(values[np.isfinite(values)])
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0, 1.2 + 0.24 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        picture = axes.pcolormesh(
            np.ma.masked_invalid(values), cmap="PuOr", vmin=-top, vmax=top, edgecolor=GREY, lw=0.3
        )
        axes.set_yticks(np.arange(len(names)) + 0.5, [_short(m) for m in names], fontsize=8)
        axes.set_xticks(np.arange(len(report.teachers)) + 0.5, list(report.teachers))
        axes.invert_yaxis()
        figure.colorbar(picture, ax=axes, label="predicted gain")
        return figure


def against_divergence(report: ProbeReport, predictor: str = "reverse_kl", confidence: float = 0.95) -> Figure:
    """Alignment of each token against a divergence between student and teacher there, with its correlation."""
    evidence = gather(report.nodes, teachers=len(report.teachers))
    status = statuses(evidence)
    found = correlations(report, confidence)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for k, teacher in enumerate(report.teachers):
            here = status[:, k] == DEFINED
            x = np.array([node.predictors[predictor][k] for node in report.nodes])[here]
            r = found[teacher, predictor]
            told = f"{r.value:+.2f} ({r.low:+.2f} to {r.high:+.2f})" if np.isfinite(r.value) else "undefined"
            axes.plot(
                x, evidence.cosine[here, k], MARKERS[k % 8], color=COLOURS[k % 8], alpha=0.5, markersize=4,
                label=f" {teacher}: correlation {told}",
            )  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_ylim(-1.05, 1.05)
        axes.set_xscale("symlog", linthresh=1e-2)
        axes.set_xlabel(f"{predictor.replace('_', ' ')} (nats)")
        axes.set_ylabel("alignment")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 + (len(report.teachers) > 4))
        return figure


def _lines(
    summaries: Sequence[ClassSummary], teachers: Sequence[str], names: Sequence[str], labels: Sequence[str], axis: str
) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        found = {(s.teacher, s.split): s.figures["predicted_gain"] for s in summaries}
        for k, teacher in enumerate(teachers):
            offset = (k - (len(teachers) - 1) / 2) * min(0.12, 0.6 / len(teachers))
            xs = [i + offset for i, name in enumerate(names) if (teacher, name) in found]
            ys = [found[teacher, name] for name in names if (teacher, name) in found]
            axes.plot(xs, [f.value for f in ys], color=COLOURS[k % 8], linewidth=1, alpha=0.6)
            for x, f in zip(xs, ys, strict=True):
                _whisker(axes, f.value, x, f.low, f.high, k, horizontal=False)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xticks(range(len(names)), labels, rotation=30 if max(map(len, labels), default=0) > 8 else 0)
        axes.set_xlabel(axis)
        axes.set_ylabel("predicted gain")
        _legend(axes, teachers)
        return figure


def _whisker(axes: object, value: float, place: float, low: float, high: float, k: int, *, horizontal: bool) -> None:
    ends = [[max(0.0, value - low)], [max(0.0, high - value)]] if np.isfinite([value, low, high]).all() else None
    x, y = (value, place) if horizontal else (place, value)
    error = {"xerr" if horizontal else "yerr": ends}
    axes.errorbar(  # type: ignore[attr-defined]
        [x], [y], **error, fmt=MARKERS[k % 8], color=COLOURS[k % 8], capsize=3, markersize=6,
        markerfacecolor=COLOURS[k % 8] if ends else "none",
    )  # fmt: skip


def _legend(axes: object, teachers: Sequence[str]) -> None:
    for k, teacher in enumerate(teachers):
        axes.plot([], [], MARKERS[k % 8], color=COLOURS[k % 8], label=f" {teacher}")  # type: ignore[attr-defined]
    axes.legend(  # type: ignore[attr-defined]
        frameon=False, ncols=min(4, len(teachers)), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )


def _short(module: str) -> str:
    return module.removeprefix("model.").replace("layers.", "layer ").replace("self_attn.", "").replace("mlp.", "")


def svg(figure: Figure) -> str:
    """A figure as SVG for a page: no ground of its own, text as text."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with rc_context(STYLE):
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
