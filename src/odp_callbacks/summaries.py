"""From nodes to figures of a class (teacher x correct or incorrect), each with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from odp_callbacks.estimates import DEFINED, UNDEFINED, UNDETERMINED, NodeEstimate, estimate
from odp_callbacks.records import Floats, NodeRecord, ProbeReport

SPLITS = ("all", "correct", "incorrect")
PREDICTORS = ("forward_kl", "reverse_kl", "js", "cosine", "teacher_entropy", "student_entropy")
FIGURES = ("alignment", "predicted_gain", "logit_alignment", "teacher_advantage", *PREDICTORS)


@dataclass(frozen=True)
class Figure:
    """One number with its interval.

    Attributes:
        value: The estimate; NaN where nothing defines it.
        low: Lower end of the interval; NaN where there are too few questions for one.
        high: Upper end.
        questions: How many questions it rests on.
        nodes: How many nodes.
    """

    value: float
    low: float
    high: float
    questions: int
    nodes: int


@dataclass(frozen=True)
class ClassSummary:
    """All figures of one teacher on one class of nodes.

    Attributes:
        teacher: Its name.
        split: ``"all"``, ``"correct"`` or ``"incorrect"``: of the rollout that the nodes lie on.
        figures: By name, see :data:`FIGURES`.
        nodes: How many nodes the class has.
        undefined: How many of them have no alignment for certain.
        undetermined: For how many the continuations cannot tell.
    """

    teacher: str
    split: str
    figures: dict[str, Figure]
    nodes: int
    undefined: int
    undetermined: int


def summarise(report: ProbeReport, confidence: float = 0.95) -> list[ClassSummary]:
    """Summarise a report for each teacher and split.

    Means are over tokens: each node counts with the inverse of its inclusion probability. Nodes without an alignment
    are left out of its mean, and counted. Where success did not differ at any node of a class, nothing is known of the
    teacher there: its predicted gain and advantage are NaN, not 0.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), but {confidence!r} was given.")
    estimates = [estimate(node) for node in report.nodes]
    summaries = []
    for k, teacher in enumerate(report.teachers):
        for split in SPLITS:
            chosen = [
                (node, e)
                for node, e in zip(report.nodes, estimates, strict=True)
                if split == "all" or node.correct == (split == "correct")
            ]
            status = [str(e.status[k]) for _, e in chosen]
            figures = {name: _figure(chosen, FIGURE_VALUES[name], k, confidence) for name in FIGURES}
            if not any(e.ideal_norm > 0 for _, e in chosen):
                # Nowhere in this class did success differ: its 0 with an interval of no width would be no finding.
                for name in ("predicted_gain", "teacher_advantage"):
                    figures[name] = replace(figures[name], value=np.nan, low=np.nan, high=np.nan)
            summaries.append(
                ClassSummary(
                    teacher,
                    split,
                    figures,
                    nodes=len(chosen),
                    undefined=status.count(UNDEFINED),
                    undetermined=status.count(UNDETERMINED),
                )
            )
    return summaries


FIGURE_VALUES: dict[str, Callable[[NodeRecord, NodeEstimate, int], float]] = {
    "alignment": lambda node, e, k: float(e.alignment[k]),
    "predicted_gain": lambda node, e, k: float(e.predicted_gain[k]),
    "logit_alignment": lambda node, e, k: float(e.logit_alignment[k]) if e.status[k] == DEFINED else np.nan,
    "teacher_advantage": lambda node, e, k: float(e.teacher_advantage[k]),
    **{name: lambda node, e, k, name=name: float(node.predictors[name][k]) for name in PREDICTORS},  # type: ignore[misc]
}


def _figure(
    chosen: Sequence[tuple[NodeRecord, NodeEstimate]],
    value: Callable[[NodeRecord, NodeEstimate, int], float],
    teacher: int,
    confidence: float,
) -> Figure:
    values = np.array([value(node, e, teacher) for node, e in chosen])
    weights = np.array([1 / node.inclusion for node, _ in chosen])
    questions = np.array([node.question for node, _ in chosen])
    defined = ~np.isnan(values)
    return jackknife_mean(values[defined], weights[defined], questions[defined], confidence)


def jackknife_mean(values: Floats, weights: Floats, groups: NDArray[np.str_], confidence: float = 0.95) -> Figure:
    """Weighted mean with an interval clustered by group: the delete-one-group jackknife with Student's t.

    Nodes of one question are not independent, so questions are what is left out in turn.

    Args:
        values: ``(n,)``.
        weights: ``(n,)``, positive.
        groups: ``(n,)`` labels.
        confidence: In (0, 1).

    Returns:
        The mean is NaN without values, the interval NaN with fewer than two groups.

    Example:
        >>> import numpy as np
        >>> f = jackknife_mean(np.array([0.0, 1.0, 2.0]), np.ones(3), np.array(["a", "b", "c"]))
        >>> round(f.value, 2), round(f.low, 2), round(f.high, 2)
        (1.0, -1.48, 3.48)
    """
    labels, index = np.unique(groups, return_inverse=True)
    m = len(labels)
    if m == 0:
        return Figure(np.nan, np.nan, np.nan, 0, 0)
    numerator = np.bincount(index, weights * values, minlength=m)
    denominator = np.bincount(index, weights, minlength=m)
    mean = float(numerator.sum() / denominator.sum())
    if m < 2:
        return Figure(mean, np.nan, np.nan, m, len(values))
    left_out = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    error = np.sqrt((m - 1) / m * ((left_out - left_out.mean()) ** 2).sum())
    half = float(stats.t.ppf((1 + confidence) / 2, m - 1) * error)
    return Figure(mean, mean - half, mean + half, m, len(values))


def correlations(report: ProbeReport) -> dict[tuple[str, str], float]:
    """Pearson correlation of alignment with each predictor over the defined nodes, by (teacher, predictor).

    NaN with fewer than three nodes, or where either does not vary. Source: arXiv:2605.10889.
    """
    estimates = [estimate(node) for node in report.nodes]
    found = {}
    for k, teacher in enumerate(report.teachers):
        pairs = [(n, e) for n, e in zip(report.nodes, estimates, strict=True) if e.status[k] == DEFINED]
        alignment = np.array([e.alignment[k] for _, e in pairs])
        for name in PREDICTORS:
            predictor = np.array([n.predictors[name][k] for n, _ in pairs])
            varies = len(pairs) > 2 and np.ptp(alignment) > 0 and np.ptp(predictor) > 0
            found[teacher, name] = float(np.corrcoef(alignment, predictor)[0, 1]) if varies else float("nan")
    return found


def scalars(report: ProbeReport, confidence: float = 0.95) -> dict[str, float]:
    """Every scalar of a report under the name that it is logged by.

    ``odp/<figure>/<teacher>/<split>`` with ``odp/<figure>_low/…`` and ``_high`` beside it;
    ``odp/undefined_share/…`` and ``odp/undetermined_share/…``; ``odp/correlation_<predictor>/<teacher>``; and
    ``odp/probe/…`` for the probe as a whole. NaN where a figure does not exist.
    """
    logged: dict[str, float] = {}
    summaries = summarise(report, confidence)
    for summary in summaries:
        end = f"{summary.teacher}/{summary.split}"
        for name, figure in summary.figures.items():
            logged[f"odp/{name}/{end}"] = figure.value
            logged[f"odp/{name}_low/{end}"] = figure.low
            logged[f"odp/{name}_high/{end}"] = figure.high
        for name, count in (("undefined", summary.undefined), ("undetermined", summary.undetermined)):
            logged[f"odp/{name}_share/{end}"] = _share(count, summary.nodes)
    for (teacher, predictor), value in correlations(report).items():
        logged[f"odp/correlation_{predictor}/{teacher}"] = value
    whole = [s for s in summaries if s.split == "all"]
    pairs = sum(s.nodes for s in whole)
    responses = len(report.rollouts) + report.continuations
    logged |= {
        "odp/probe/success_rate": success_rate(report),
        "odp/probe/undefined_share": _share(sum(s.undefined for s in whole), pairs),
        "odp/probe/undetermined_share": _share(sum(s.undetermined for s in whole), pairs),
        "odp/probe/truncated_share": _share(report.truncated, responses),
        "odp/probe/nodes": float(len(report.nodes)),
        "odp/probe/generated_tokens": float(sum(report.generated_tokens.values())),
        "odp/probe/seconds": sum(report.seconds.values()),
    }
    for stage, seconds in report.seconds.items():
        logged[f"odp/probe/seconds_{stage}"] = seconds
    return logged


def success_rate(report: ProbeReport) -> float:
    """Mean reward of the rollouts; NaN without rollouts."""
    return float(np.mean([r.reward for r in report.rollouts])) if report.rollouts else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
