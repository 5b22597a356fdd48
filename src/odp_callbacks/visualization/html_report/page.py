"""The HTML page of a report: one file that loads nothing else."""

import json
import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from odp_callbacks.analysis.advice import advise
from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.ranking import rank_analysis, verdict
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.analysis.teacher_accuracy import student_accuracy, teacher_accuracies
from odp_callbacks.files import local_path, write_atomically
from odp_callbacks.gates.scoring import RuleScore, score_rules
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import displayable
from odp_callbacks.visualization import contribution_plots, module_maps, plots, predictor_plots, run_plots
from odp_callbacks.visualization.html_report.data import page_data
from odp_callbacks.visualization.plot_style import to_svg
from odp_callbacks.visualization.wording import class_title, figure_title, gain_figure, level

TABULATED = (
    "update_gain", "update_contribution", "update_alignment", "predicted_gain", "gain_weighted_alignment", "alignment",
)  # fmt: skip
"""Figures in the page's table of all figures."""
PACKAGE = "odp_callbacks.visualization.html_report"


def write_report(
    reports: ProbeReport | Sequence[tuple[str, ProbeReport]],
    path: str | os.PathLike[str],
    *,
    title: str = "Is my teacher helping?",
    confidence: float | None = None,
) -> Path:
    """Write the report of a probe, or of the probes of a run, as one HTML file that loads nothing else.

    The page begins with what to do next, and with the answer: which teacher helps, where, and how certain that is. The
    gains of all teachers, plots, rollouts with tokens coloured by influence or alignment, and tables follow. Whatever a
    model or a user wrote appears as text, never as markup.

    Args:
        reports: The report of a probe; or several reports, each with a name, such as its step. The page shows the last
            one in full, and how the gain developed over all of them.
        path: Path of the file; missing folders are created.
        title: Headline.
        confidence: Level of the intervals, in (0, 1); None for that which the last probe was asked for.

    Returns:
        The path.

    Raises:
        ValueError: If there is no report, if the last one has neither an update nor nodes, or if ``confidence`` is not
            in (0, 1).
    """
    named_reports = [("", reports)] if isinstance(reports, ProbeReport) else list(reports)
    if not named_reports or not (named_reports[-1][1].nodes or named_reports[-1][1].updates):
        raise ValueError("`reports` must hold a probe with an update or with nodes, but there is nothing to show.")
    target_path = local_path("path", path)
    asked_for = named_reports[-1][1].confidence if confidence is None else confidence
    write_atomically(target_path, render_page(named_reports, title, asked_for))
    return target_path


def render_page(named_reports: Sequence[tuple[str, ProbeReport]], title: str, confidence: float) -> str:
    """Render the page.

    Args:
        named_reports: At least one report, each with a name.
        title: Headline.
        confidence: Level of the intervals, in (0, 1).
    """
    name, report = named_reports[-1]
    analysis = Analysis(report, confidence)
    comparable = [
        (displayable(report_name), other) for report_name, other in named_reports if other.teachers == report.teachers
    ]
    summaries, contrasts = analysis.summaries(), analysis.contrasts()
    gain, ranking = gain_figure(summaries), rank_analysis(analysis)
    advice = advise(analysis, ranking)
    figures = [figure for figure in TABULATED if any(figure in summary.figures for summary in summaries)]
    environment = Environment(loader=PackageLoader(PACKAGE, "."), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "estimate": describe_estimate, "displayable": displayable, "class_title": class_title,
        "figure_title": figure_title, "verdict": verdict,
    }  # fmt: skip
    resources = files(PACKAGE)
    return environment.get_template("page.html.jinja").render(
        title=title,
        level=level(confidence),
        one_in=round(1 / (1 - confidence)),
        report=report,
        teachers=[displayable(teacher) for teacher in report.teachers],
        ranking=ranking,
        advice=advice,
        first_teacher=report.teachers.index(advice.teacher or ranking.classes["all"][0].teacher),
        gain=gain,
        figures=figures,
        summaries=summaries,
        contrasts=contrasts,
        significant_tokens=significant_token_counts(analysis),
        influence=analysis.influence,
        success_rate=success_rate(report, confidence),
        student_accuracy=student_accuracy(report, confidence),
        accuracies=teacher_accuracies(report, confidence),
        rules=scored_rules(report, confidence),
        plots=_plots(analysis, comparable),
        contributions=list(analysis.contributions()),
        omitted_reports=len(named_reports) - len(comparable),
        probe=displayable(name),
        # Style and script are part of this package; the data is escaped for its place in the page.
        style=Markup(resources.joinpath("page.css").read_text("utf-8")),
        script=Markup(page_script()),
        data=Markup(json_for_script(page_data(analysis))),
    )


def page_script() -> str:
    """The page's script: the files of the folder ``script`` in the order of their names, in a scope of their own."""
    parts = sorted(files(PACKAGE).joinpath("script").iterdir(), key=lambda part: part.name)
    text = "".join(part.read_text("utf-8") for part in parts if part.name.endswith(".js"))
    return f'"use strict";\n(() => {{\n{text}}})();\n'


def _plots(analysis: Analysis, comparable: Sequence[tuple[str, ProbeReport]]) -> dict[str, Markup | None]:
    """Draw the page's plots as SVG; None for those that do not apply."""
    has_nodes = bool(analysis.report.nodes)
    drawn_plots: dict[str, Figure | None] = {
        "gains": plots.plot_gains(analysis.summaries(), analysis.report.teachers),
        "contributions": contribution_plots.plot_contributions(analysis),
        "module_contributions": contribution_plots.plot_module_contributions(analysis),
        "contribution_maps": module_maps.plot_contribution_maps(analysis),
        "depth": plots.plot_over_depth(analysis) if has_nodes else None,
        "modules": module_maps.plot_module_maps(analysis) if has_nodes else None,
        "divergence": plots.plot_alignment_against_divergence(analysis) if has_nodes else None,
        "predictors": predictor_plots.plot_predictors(analysis),
        "success": predictor_plots.plot_success_by_depth(analysis),
        "realised": run_plots.plot_realised([report for _, report in comparable], analysis.confidence),
        "trend": plots.plot_over_probes(comparable, analysis.confidence) if len(comparable) > 1 else None,
    }
    return {name: None if plot is None else Markup(to_svg(plot)) for name, plot in drawn_plots.items()}


def scored_rules(report: ProbeReport, confidence: float) -> list[RuleScore]:
    """The scores of the published rules; empty if the records have nothing that they could be scored by."""
    features = bool(report.updates) and all(update.features is not None for update in report.updates)
    return score_rules(report, confidence=confidence) if report.nodes or features else []


def significant_token_counts(analysis: Analysis) -> dict[tuple[str, str], tuple[int, int]]:
    """Number of tokens whose interval lies above 0 and of those below, by class and teacher.

    The intervals are those of the influence where it was measured, otherwise those of the alignment.
    """
    influence = analysis.influence
    if influence is None:
        return analysis.significant_token_counts()
    correct = np.repeat([rollout.correct for rollout in analysis.report.rollouts], np.diff(influence.starts))
    return {
        (split, teacher): (
            int((influence.low[chosen, teacher_index] > 0).sum()),
            int((influence.high[chosen, teacher_index] < 0).sum()),
        )
        for split, chosen in (("all", correct | True), ("correct", correct), ("incorrect", ~correct))
        for teacher_index, teacher in enumerate(analysis.report.teachers)
    }


def json_for_script(data: Any) -> str:
    r"""Write JSON for a script element: nothing in it can end the element or be read as markup.

    Examples:
        >>> json_for_script({"piece": "</script>&"})
        '{"piece":"\\u003c/script\\u003e\\u0026"}'
    """
    json_text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        json_text = json_text.replace(character, f"\\u{ord(character):04x}")
    return json_text.encode("utf-8", "replace").decode("utf-8")


def describe_estimate(estimate: Estimate) -> str:
    """Write an estimate with its interval, or with the reason why there is none."""
    if math.isnan(estimate.value):
        return f"no estimate{f' ({estimate.note})' if estimate.note else ''}"
    if math.isnan(estimate.low):
        return f"{estimate.value:+.3f} (no interval{f': {estimate.note}' if estimate.note else ''})"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
