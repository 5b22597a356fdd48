"""Plots of a probe, for TensorBoard and for the report, where they are SVG that reads on light and on dark ground."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from odp_callbacks.analysis.jackknife import Estimate as Interval
from odp_callbacks.analysis.node_estimates import DEFINED
from odp_callbacks.analysis.summaries import SPLITS, Analysis, ClassSummary, correlations
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import middle, shown

GREY = "#808080"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
"""Told apart by colour-blind eyes; the first seven after Okabe and Ito. Every teacher has a marker of its own, too."""
MARKERS = "osD^vPX*"
WIDTH = 5.0
"""Inches: TensorBoard shrinks a picture to its card, and with it the words."""
MOST_KINDS = 12
"""Kinds of module that a map has rows for: the strongest, where there are more."""
MOST_LABELS = 12
"""On an axis."""
MOST_POINTS = 2000
"""Of a scatter plot: more hide each other, and make a page large."""
LINEAR = 0.01
"""Nats below which the axis of a divergence is linear."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "odp-callbacks", "font.size": 10, "text.color": GREY,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "font.family": "sans-serif",
}  # fmt: skip


def gains(summaries: Sequence[ClassSummary], teachers: Sequence[str]) -> Figure:
    """Predicted gain of each teacher in each class, with its interval."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.28 * len(teachers) * 3), layout="constrained")
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
        axes.set_ylim(len(SPLITS) * (len(teachers) + 1) - 1.4, -0.6)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xlabel("harms  ←  0  →  helps\npredicted gain: success per unit step")
        _legend(figure, teachers)
        return figure


def over_depth(analysis: Analysis, figure: str = "gain_weighted_alignment") -> Figure:
    """A figure over depth windows; see :func:`_known` for what stands where it is withheld."""
    summaries = analysis.summaries("depth")
    names = list(dict.fromkeys(s.split for s in summaries))
    labels = [n.removeprefix("depth ") for n in names]
    return _lines(summaries, figure, analysis.report.teachers, names, labels, "response token")


def over_steps(reports: Sequence[tuple[str, ProbeReport]], confidence: float) -> Figure:
    """Predicted gain on all rollouts, probe after probe."""
    summaries = []
    keys = [str(i) for i in range(len(reports))]  # names may repeat
    for key, (_, report) in zip(keys, reports, strict=True):
        for s in Analysis(report, confidence).summaries():
            if s.split == "all":
                summaries.append(ClassSummary(s.teacher, key, s.figures, s.nodes, s.undefined, s.undetermined))
    names = [name for name, _ in reports]
    return _lines(summaries, "predicted_gain", reports[-1][1].teachers, keys, names, "probe")


def by_module(analysis: Analysis, figure: str = "gain_weighted_alignment") -> Figure | None:
    """A figure in each LoRA module alone: layers across, kinds of module down, a map for each teacher.

    A dot marks cells whose interval excludes 0; where the figure is withheld, a striped cell shows it uncorrected. None
    where modules are not apart.
    """
    report = analysis.report
    if len(report.modules) < 2:
        return None
    summaries = {(s.teacher, s.split): s.figures[figure] for s in analysis.summaries("module")}
    found = {key: _known(f) for key, f in summaries.items()}
    named = {module: place(module) for module in report.modules}
    places = {module: (layer, kind) for module, (_, layer, kind) in named.items()}
    if len(set(places.values())) < len(places):
        # Layers of several towers: what stands before the number tells them apart.
        places = {m: (layer, f"{tower}.{kind}".strip(".")) for m, (tower, layer, kind) in named.items()}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    if len(kinds) > MOST_KINDS:
        strength = dict.fromkeys(kinds, 0.0)
        for (_, module), f in found.items():
            strength[places[module][1]] += abs(f.value) if np.isfinite(f.value) else 0.0
        kinds = sorted(sorted(kinds, key=lambda kind: -strength[kind])[:MOST_KINDS], key=kinds.index)
    values = np.full((len(report.teachers), len(kinds), len(layers)), np.nan)
    certain, rough = np.zeros(values.shape, bool), np.zeros(values.shape, bool)
    for k, teacher in enumerate(report.teachers):
        for module, (layer, kind) in places.items():
            if kind in kinds:
                f, at = found[teacher, module], (k, kinds.index(kind), layers.index(layer))
                values[at], certain[at] = f.value, f.low > 0 or f.high < 0
                rough[at] = np.isfinite(f.value) and not np.isfinite(summaries[teacher, module].value)
    finite = np.abs(values[np.isfinite(values)])
    top = 1.0 if figure != "predicted_gain" else float(finite.max(initial=0)) or 1.0
    with rc_context(STYLE):
        size = (WIDTH, max(2.4, 0.9 + (0.32 + 0.22 * len(kinds)) * len(report.teachers)))
        picture = Figure(figsize=size, layout="constrained")
        # Between many narrow cells there is no room for lines, and but little for dots.
        edge, dot = (GREY, 8.0) if len(layers) <= 40 else ("face", 320.0 / len(layers))
        rows = picture.subplots(len(report.teachers), sharex=True, squeeze=False)[:, 0]
        for k, axes in enumerate(rows):
            mesh = axes.pcolormesh(
                np.ma.masked_invalid(values[k]), cmap="PuOr", vmin=-top, vmax=top, edgecolor=edge, lw=0.3
            )
            for i, j in zip(*np.nonzero(rough[k]), strict=True):
                axes.add_patch(Rectangle((j, i), 1, 1, hatch="////", fill=False, edgecolor=GREY, lw=0, alpha=0.7))
            y, x = np.nonzero(certain[k])
            ink = ["white" if abs(values[k, i, j]) > 0.6 * top else "black" for i, j in zip(y, x, strict=True)]
            axes.scatter(x + 0.5, y + 0.5, s=dot, c=ink)
            axes.set_yticks(np.arange(len(kinds)) + 0.5, [shown(kind, 24) for kind in kinds], fontsize=8)
            axes.invert_yaxis()
            axes.set_title(shown(report.teachers[k], 40), fontsize=9, loc="left", pad=3)
        step = -(-len(layers) // 12)
        names = ["none" if layer < 0 else str(layer) for layer in layers]
        rows[-1].set_xticks(np.arange(0, len(layers), step) + 0.5, names[::step], fontsize=8)
        rows[-1].set_xlabel("layer · dot: interval excludes 0" + (" · striped: not corrected" if rough.any() else ""))
        picture.colorbar(mesh, ax=list(rows), label=_named(figure))
        return picture


def place(module: str) -> tuple[str, int, str]:
    """What a module's name says: what stands before its layer's number, that number (-1 if none), and what follows.

    Examples:
        >>> place("model.layers.3.self_attn.q_proj"), place("lm_head")
        (('model.layers', 3, 'self_attn.q_proj'), ('', -1, 'lm_head'))
    """
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", -1, module


def against_divergence(analysis: Analysis, predictor: str = "reverse_kl") -> Figure:
    """Alignment of each token against a divergence between student and teacher there, with its correlation.

    Filled where the token's interval excludes 0.
    """
    report, confidence = analysis.report, analysis.confidence
    alignment, sure = analysis.token_alignment(), analysis.sure()
    found = correlations(report, confidence)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0 + 0.2 * len(report.teachers)), layout="constrained")
        axes = figure.add_subplot()
        most, labels = LINEAR, []
        every = -(-len(report.nodes) * len(report.teachers) // MOST_POINTS) or 1
        drawn = np.arange(len(report.nodes)) % every == 0
        for k, teacher in enumerate(report.teachers):
            x = np.array([node.predictors[predictor][k] for node in report.nodes])
            here = (analysis.status[:, k] == DEFINED) & np.isfinite(x)
            most = max(most, float(x[here].max(initial=0)))
            r = found[teacher, predictor]
            told = f"{r.value:+.2f} ({r.low:+.2f} to {r.high:+.2f})" if np.isfinite(r.value) else "undefined"
            for certain in (False, True):
                chosen = here & drawn & (sure[:, k] == certain)
                axes.plot(
                    x[chosen], alignment[chosen, k], MARKERS[k % 8], color=COLOURS[k % 8], alpha=0.6, markersize=4,
                    markerfacecolor=COLOURS[k % 8] if certain else "none", zorder=2 + certain,
                )  # fmt: skip
            labels.append(f"{middle(teacher)}: correlation {told}")
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_ylim(-1.05, 1.05)
        # Linear near 0, where tokens on which both agree lie; logarithmic beyond.
        axes.set_xscale("symlog", linthresh=LINEAR)
        axes.set_xlim(-LINEAR / 20, 1.3 * most)
        ticks = [0.0, *(10.0**e for e in range(round(np.log10(LINEAR)), 3) if 10.0**e <= 1.3 * most)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        thinned = f"; one in {every} tokens" if every > 1 else ""
        axes.set_xlabel(
            f"{predictor.replace('_', ' ')} (nats); filled: {100 * confidence:g} % sure of the side{thinned}"
        )
        axes.set_ylabel("alignment")
        _legend(figure, report.teachers, labels)
        return figure


def _lines(
    summaries: Sequence[ClassSummary],
    figure: str,
    teachers: Sequence[str],
    names: Sequence[str],
    labels: Sequence[str],
    axis: str,
) -> Figure:
    with rc_context(STYLE):
        picture = Figure(figsize=(WIDTH, 2.8 + 0.2 * -(-len(teachers) // 4)), layout="constrained")
        axes = picture.add_subplot()
        found = {(s.teacher, s.split): _known(s.figures[figure]) for s in summaries}
        for k, teacher in enumerate(teachers):
            offset = (k - (len(teachers) - 1) / 2) * min(0.12, 0.6 / len(teachers))
            xs = [i + offset for i, name in enumerate(names) if (teacher, name) in found]
            ys = [found[teacher, name] for name in names if (teacher, name) in found]
            axes.plot(xs, [f.value for f in ys], color=COLOURS[k % 8], linewidth=1, alpha=0.6)
            for x, f in zip(xs, ys, strict=True):
                _whisker(axes, f.value, x, f.low, f.high, k, horizontal=False)
        axes.axhline(0, color=GREY, linewidth=1)
        if figure != "predicted_gain":
            axes.set_ylim(-1.05, 1.05)
        labels = [shown(label, 20) for label in labels]
        every = max(1, -(-len(labels) // MOST_LABELS))
        some = labels[::every]
        crowded = max(map(len, some), default=0) * len(some) > 50
        places = range(0, len(labels), every)
        axes.set_xticks(places, some, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        bare = any(np.isfinite(f.value) and not np.isfinite(f.low) for f in found.values())
        why = "no interval" if figure == "predicted_gain" else "not corrected for noise"
        axes.set_xlabel(f"{axis} (hollow: {why})" if bare else axis)
        axes.set_ylabel(_named(figure))
        _legend(picture, teachers)
        return picture


def _known(figure: Interval) -> Interval:
    """A figure; where its correction for noise is withheld, what it is without, which has no interval."""
    if np.isfinite(figure.value) or not np.isfinite(figure.uncorrected):
        return figure
    return replace(figure, value=figure.uncorrected, low=np.nan, high=np.nan)


def _named(figure: str) -> str:
    return figure.replace("_", " ").replace("gain weighted", "gain-weighted")


def _whisker(axes: Axes, value: float, place: float, low: float, high: float, k: int, *, horizontal: bool) -> None:
    ends = [[max(0.0, value - low)], [max(0.0, high - value)]] if np.isfinite([value, low, high]).all() else None
    x, y = (value, place) if horizontal else (place, value)
    axes.errorbar(
        [x],
        [y],
        xerr=ends if horizontal else None,
        yerr=None if horizontal else ends,
        fmt=MARKERS[k % 8],
        color=COLOURS[k % 8],
        capsize=3,
        markersize=6,
        markerfacecolor=COLOURS[k % 8] if ends else "none",
    )


def _legend(figure: Figure, teachers: Sequence[str], labels: Sequence[str] = ()) -> None:
    """Above the axes, in as many columns as there is room for."""
    labels = labels or [middle(teacher) for teacher in teachers]
    handles = [Line2D([], [], ls="", marker=MARKERS[k % 8], color=COLOURS[k % 8]) for k in range(len(labels))]
    columns = max(1, min(4, len(labels), 62 // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=columns, loc="outside upper left")


def svg(figure: Figure) -> str:
    """A figure as SVG for a page: no ground of its own, text as text."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with rc_context(STYLE):
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
