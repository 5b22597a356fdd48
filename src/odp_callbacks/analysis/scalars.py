"""The scalars that a probe logs: every figure of a report under a name of its own."""

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.predictors import POLICY_PREDICTORS
from odp_callbacks.analysis.summaries import (
    GEOMETRY_DEPENDENT,
    INCORRECT_MINUS_CORRECT,
    NOISE_CORRECTED,
    UPDATE_FIGURES,
    Analysis,
    ClassSummary,
)
from odp_callbacks.analysis.teacher_coverage import teacher_coverage
from odp_callbacks.analysis.time_shortage import response_limit
from odp_callbacks.records import ProbeReport


def scalars(report: ProbeReport, confidence: float = 0.95) -> dict[str, float]:
    """Every scalar of a report by the name under which it is logged; NaN where a figure does not exist.

    - ``odp/<figure>/<teacher>/<split>``, with the ends of its interval as ``odp/<figure>_low/…`` and
      ``odp/<figure>_high/…``, and as ``odp/<figure>_uncorrected/…`` the value before the correction for noise;
    - ``odp/questions/…``, ``odp/nodes/…``, ``odp/undefined_share/…`` and ``odp/undetermined_share/…`` of each class;
    - ``odp/correlation_<predictor>/<teacher>``, its correlation with alignment, with the ends of its interval;
    - ``odp/probe/…`` about the probe as a whole;
    - ``odp/<geometry>/<figure>/…``, such as ``odp/adam/alignment/answer/all``, in the second geometry if there is one.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
    """
    analysis = Analysis(report, confidence)
    summaries = analysis.summaries()
    logged: dict[str, float] = {}
    for summary in summaries:
        if summary.split == INCORRECT_MINUS_CORRECT:
            logged |= _difference_scalars(summary)
        else:
            logged |= _class_scalars(summary)
    for contrast in analysis.contrasts():
        logged |= _difference_scalars(contrast)
    if report.nodes or not report.updates:  # of an update alone, these would be empty cards before all others
        for (teacher, predictor), estimate in correlations(report, confidence).items():
            logged |= _with_interval(f"odp/correlation_{predictor}", f"/{teacher}", estimate)
    logged |= _probe_scalars(report, summaries, success_rate(report, confidence))
    if report.preconditioned is not None:
        geometry = report.preconditioned.settings["geometry"]
        for name, value in scalars(report.preconditioned, confidence).items():
            if name.split("/")[1].removesuffix("_low").removesuffix("_high") in GEOMETRY_DEPENDENT:
                logged[name.replace("odp/", f"odp/{geometry}/", 1)] = value
    return logged


def update_scalars(report: ProbeReport, confidence: float = 0.95) -> dict[str, float]:
    """Scalars of an update that was measured on the training's own rollouts.

    ``odp/training/<figure>/<teacher>/<split>`` for each figure of the update, and ``odp/training/success_rate``, with
    the ends of their intervals; and the number of questions behind them.

    Args:
        report: Report without nodes.
        confidence: Level of the intervals, in (0, 1).
    """
    logged = {
        **_with_interval("odp/training/success_rate", "", success_rate(report, confidence)),
        "odp/training/questions": float(len({rollout.question for rollout in report.rollouts})),
    }
    analysis = Analysis(report, confidence)
    for summary in [*analysis.summaries(), *analysis.contrasts()]:
        for figure in UPDATE_FIGURES:
            suffix = f"/{summary.teacher}/{summary.split}"
            logged |= _with_interval(f"odp/training/{figure}", suffix, summary.figures[figure])
    return logged


def _class_scalars(summary: ClassSummary) -> dict[str, float]:
    """All figures of one teacher in one class, and how many nodes they rest on."""
    suffix = f"/{summary.teacher}/{summary.split}"
    logged: dict[str, float] = {}
    for figure, estimate in summary.figures.items():
        logged |= _with_interval(f"odp/{figure}", suffix, estimate)
        if figure in NOISE_CORRECTED:
            logged[f"odp/{figure}_uncorrected{suffix}"] = estimate.uncorrected
    if "predicted_gain" not in summary.figures:
        return logged
    logged[f"odp/questions{suffix}"] = float(summary.figures["predicted_gain"].questions)
    logged[f"odp/nodes{suffix}"] = float(summary.nodes)
    logged[f"odp/undefined_share{suffix}"] = _share(summary.undefined, summary.nodes)
    logged[f"odp/undetermined_share{suffix}"] = _share(summary.undetermined, summary.nodes)
    return logged


def _difference_scalars(summary: ClassSummary) -> dict[str, float]:
    """Differences of the figures between two teachers or two classes, without those of the predictors."""
    suffix = f"/{summary.teacher}/{summary.split}"
    logged: dict[str, float] = {}
    for figure, estimate in summary.figures.items():
        if figure not in POLICY_PREDICTORS:
            logged |= _with_interval(f"odp/{figure}", suffix, estimate)
    return logged


def _probe_scalars(report: ProbeReport, summaries: list[ClassSummary], rate: Estimate) -> dict[str, float]:
    """Scalars about the probe as a whole."""
    on_all_nodes = [summary for summary in summaries if summary.split == "all"]
    node_teacher_pairs = sum(summary.nodes for summary in on_all_nodes)  # of a node and a teacher
    responses = len(report.rollouts) + report.continuations
    return {
        **_with_interval("odp/probe/success_rate", "", rate),
        "odp/probe/undefined_share": _share(sum(summary.undefined for summary in on_all_nodes), node_teacher_pairs),
        "odp/probe/undetermined_share": _share(
            sum(summary.undetermined for summary in on_all_nodes), node_teacher_pairs
        ),
        "odp/probe/truncated_share": _share(report.truncated, responses),
        "odp/probe/nodes": float(len(report.nodes)),
        "odp/probe/unused_questions": float(report.left_out.get("questions", 0)),
        "odp/probe/unscored_responses": float(report.left_out.get("responses", 0)),
        "odp/probe/response_limit": float(response_limit(report) or "nan"),
        "odp/probe/questions_without_time": float(
            report.left_out.get("unsampled_questions", 0) + report.left_out.get("questions_without_update", 0)
        ),
        "odp/probe/generated_tokens": float(sum(report.generated_tokens.values())),
        "odp/probe/seconds": sum(report.stage_seconds.values()),
        **{f"odp/probe/seconds_{stage}": seconds for stage, seconds in report.stage_seconds.items()},
        **({"odp/probe/slot_occupancy": report.slot_occupancy} if report.slot_steps.get("available") else {}),
        **_coverage_scalars(report),
    }


def _coverage_scalars(report: ProbeReport) -> dict[str, float]:
    """What of the policies of served teachers did not come back."""
    logged: dict[str, float] = {}
    for teacher, coverage in teacher_coverage(report).items():
        logged[f"odp/probe/missing_mass/{teacher}"] = coverage.missing_mass
        logged[f"odp/probe/largest_missing_mass/{teacher}"] = coverage.largest_missing_mass
        logged[f"odp/probe/unaligned_share/{teacher}"] = coverage.unaligned_share
    return logged


def _with_interval(prefix: str, suffix: str, estimate: Estimate) -> dict[str, float]:
    return {
        f"{prefix}{suffix}": estimate.value,
        f"{prefix}_low{suffix}": estimate.low,
        f"{prefix}_high{suffix}": estimate.high,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
