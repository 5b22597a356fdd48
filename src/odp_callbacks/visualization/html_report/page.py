"""From a report to one HTML file that needs nothing else."""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.ranking import rank_analysis
from odp_callbacks.analysis.summaries import GAP, SPLITS, Analysis, success_rate
from odp_callbacks.gates.scoring import score_rules
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import shown
from odp_callbacks.visualization import plots
from odp_callbacks.visualization.html_report.data import page_data


def write_report(
    reports: ProbeReport | Sequence[tuple[str, ProbeReport]],
    path: str | os.PathLike[str],
    *,
    title: str = "Is my teacher helping?",
    confidence: float = 0.95,
) -> Path:
    """Write the report of a probe, or of a run's probes, as one HTML file that loads nothing.

    First the answer: which teacher helps, where, how sure that is. Then pictures, the rollouts with their tokens
    coloured by alignment, and tables. Whatever a model or a user wrote is shown as text, never as markup.

    Args:
        reports: A probe's report; or several with a name each (their steps, say), of which the last is shown whole and
            all in a picture of how things went.
        path: Where to.
        title: Headline.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        The path.

    Raises:
        ValueError: If there is no report, or one has no nodes.
    """
    several = [("", reports)] if isinstance(reports, ProbeReport) else list(reports)
    if not several or not several[-1][1].nodes:
        raise ValueError("`reports` must hold a probe with nodes, but there is nothing to show.")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(several, title, confidence), encoding="utf-8")
    return target


def render(several: Sequence[tuple[str, ProbeReport]], title: str, confidence: float) -> str:
    """The page as text."""
    report = several[-1][1]
    analysis = Analysis(report, confidence)
    summaries = [s for s in analysis.summaries() if s.split in (*SPLITS, GAP)]
    ranking = rank_analysis(analysis)
    teachers = [shown(name) for name in report.teachers]
    environment = Environment(
        loader=PackageLoader("odp_callbacks.visualization.html_report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"figure": show, "shown": shown}
    source = files("odp_callbacks.visualization.html_report")
    trend = None
    alike = [(name, other) for name, other in several if other.teachers == report.teachers]
    if len(alike) > 1:
        trend = Markup(plots.svg(plots.over_steps([(shown(name), other) for name, other in alike], confidence)))
    modules = plots.by_module(analysis)
    return environment.get_template("page.html.jinja").render(
        title=title,
        confidence=confidence,
        report=report,
        teachers=teachers,
        ranking=ranking,
        summaries=summaries,
        sides=analysis.sides(),
        rate=success_rate(report, confidence),
        rules=[] if report.free else score_rules(report, confidence=confidence),
        gains=Markup(plots.svg(plots.gains(summaries, report.teachers))),
        depth=Markup(plots.svg(plots.over_depth(analysis))),
        modules=None if modules is None else Markup(plots.svg(modules)),
        divergence=Markup(plots.svg(plots.against_divergence(analysis))),
        trend=trend,
        strangers=len(several) - len(alike),
        probe=shown(several[-1][0]),
        # Both are ours; the data is made harmless for the place where it stands.
        style=Markup(source.joinpath("page.css").read_text("utf-8")),
        script=Markup(source.joinpath("page.js").read_text("utf-8")),
        data=Markup(as_script(page_data(analysis))),
    )


def as_script(data: Any) -> str:
    r"""JSON for a script element: nothing in it can end the element, or be read as markup.

    Examples:
        >>> as_script({"piece": "</script>&"})
        '{"piece":"\\u003c/script\\u003e\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def show(figure: Estimate) -> str:
    """A figure with its interval in words."""
    if figure.value != figure.value:  # NaN
        return f"undefined{f' ({figure.note})' if figure.note else ''}"
    if figure.low != figure.low:
        return f"{figure.value:+.3f} (no interval{f': {figure.note}' if figure.note else ''})"
    return f"{figure.value:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})"
