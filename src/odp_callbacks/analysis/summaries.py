"""From nodes to figures of a class (teacher x correct or incorrect, depth, module), each with its interval."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import RANGE, gradient_figures, questions_of, token_mean
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, UNDETERMINED, statuses, teacher_advantage
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.analysis.token_intervals import alignment_intervals
from odp_callbacks.records import Floats, ProbeReport

SPLITS = ("all", "correct", "incorrect")
GAP = "incorrect-correct"
PREDICTORS = ("forward_kl", "reverse_kl", "js", "cosine", "teacher_entropy", "student_entropy")
GEOMETRIC = ("predicted_gain", "gain_weighted_alignment", "alignment", "step_alignment")
"""Those that depend on the geometry of the parameters."""
CORRECTED = ("alignment", "gain_weighted_alignment", "logit_alignment")
FIGURES = (
    "predicted_gain", "gain_weighted_alignment", "alignment", "step_alignment", "logit_alignment",
    "teacher_advantage", *PREDICTORS,
)  # fmt: skip


@dataclass(frozen=True)
class ClassSummary:
    """All figures of one teacher on one class of nodes, or of a difference.

    Attributes:
        teacher: Its name; ``"a - b"`` for a difference between two.
        split: Name of the class; ``"incorrect-correct"`` for the difference between those two.
        figures: By name, see :data:`FIGURES`.
        nodes: How many nodes the class has.
        undefined: How many of them have no alignment for certain.
        undetermined: For how many the continuations cannot tell.
    """

    teacher: str
    split: str
    figures: dict[str, Estimate]
    nodes: int
    undefined: int
    undetermined: int


class Analysis:
    """A report, ready to be summarised: what all its figures share is computed once.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If the level is not in (0, 1).
    """

    def __init__(self, report: ProbeReport, confidence: float = 0.95) -> None:
        self.report = report
        self.confidence = check_confidence(confidence)
        self.evidence = gather(report.nodes, teachers=len(report.teachers))
        self.model = fit_success_model(self.evidence)
        self.correction = correct_for_noise(self.evidence, self.model)
        logits = gather(report.nodes, logits=True, teachers=len(report.teachers))
        self._logits = (logits, correct_for_noise(logits, self.model))
        self._advantage = np.stack([teacher_advantage(node) for node in report.nodes]) if report.nodes else None
        self.status = statuses(self.evidence)
        self._kept: dict[tuple[int, str], dict[str, Estimator]] = {}
        self._summaries: dict[str, list[ClassSummary]] = {}

    def summaries(self, by: str = "correctness") -> list[ClassSummary]:
        """Figures of each teacher in each class.

        Args:
            by: What the nodes are split by: ``"correctness"`` of their rollout, ``"depth"``, ``"module"``,
                ``"question"`` or ``"rollout"``.

        Raises:
            ValueError: For another one.
        """
        if by not in self._summaries:  # several pictures show the same ones
            self._summaries[by] = self._modules() if by == "module" else self._split(by)
        return list(self._summaries[by])

    def _split(self, by: str) -> list[ClassSummary]:
        found = []
        for k, teacher in enumerate(self.report.teachers):
            parts = dict(self._classes(by))
            estimators = {name: self._estimators(k, name, chosen) for name, chosen in parts.items()}
            found += [self._summary(teacher, name, k, parts[name], estimators[name]) for name in parts]
            if by == "correctness":
                found.append(self._difference(teacher, GAP, estimators["incorrect"], estimators["correct"]))
        return found

    def contrasts(self) -> list[ClassSummary]:
        """Differences between every two teachers on the same nodes, in each class."""
        return [
            self._difference(
                f"{first} - {second}", name, self._estimators(i, name, chosen), self._estimators(j, name, chosen)
            )
            for (i, first), (j, second) in combinations(enumerate(self.report.teachers), 2)
            for name, chosen in self._classes("correctness")
        ]

    def token_intervals(self) -> tuple[Floats, Floats]:
        """Ends of the interval of each token's alignment with each teacher, ``(N, K)`` each.

        NaN where there is no alignment, and everywhere in the free mode: a rollout's own reward tells of the rollout.
        """
        return self._token_ends

    @cached_property
    def _token_ends(self) -> tuple[Floats, Floats]:
        low, high = alignment_intervals(self.evidence, self.confidence)
        none = (self.status != DEFINED) | self.report.free
        return np.where(none, np.nan, low), np.where(none, np.nan, high)

    def token_alignment(self) -> Floats:
        """Each token's alignment with each teacher as it is shown, ``(N, K)``: the estimate, cut to its interval.

        The estimate is noisier than the interval, which knows of the other branches and nodes, and may lie outside.
        """
        low, high = self.token_intervals()
        cosine = self.evidence.cosine
        return np.where(np.isnan(low), cosine, cosine.clip(low, high))

    def sure(self) -> NDArray[np.bool_]:
        """Whether a token tells on which side of 0 its alignment lies, ``(N, K)``: its interval excludes 0."""
        low, high = self.token_intervals()
        return (low > 0) | (high < 0)

    def sides(self) -> dict[tuple[str, str], tuple[int, int]]:
        """How many tokens surely have an alignment above 0, and below, by class and teacher."""
        low, high = self.token_intervals()
        return {
            (split, teacher): (int((low[chosen, k] > 0).sum()), int((high[chosen, k] < 0).sum()))
            for split, chosen in self._classes("correctness")
            for k, teacher in enumerate(self.report.teachers)
        }

    def _classes(self, by: str) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        evidence = self.evidence
        if by == "correctness":
            yield "all", np.ones(len(evidence.correct), bool)
            if not self.report.free:
                # A rollout's own reward made the split; where it is also the only evidence, a class holds nothing.
                yield "correct", evidence.correct
                yield "incorrect", ~evidence.correct
            else:
                yield "correct", np.zeros(len(evidence.correct), bool)
                yield "incorrect", np.zeros(len(evidence.correct), bool)
        elif by == "depth":
            window = np.frexp(evidence.depth.astype(float))[1]  # [0, 1), [1, 2), [2, 4), [4, 8), ...
            for w in np.unique(window):
                first, last = int(2.0 ** (w - 1)), int(2.0**w) - 1
                yield (f"depth {first}" if first == last else f"depth {first}-{last}"), window == w
        elif by in ("question", "rollout"):
            labels = np.array([str(getattr(node, by)) for node in self.report.nodes])
            for label in dict.fromkeys(labels.tolist()):
                yield f"{by} {label}", labels == label
        else:
            raise ValueError(
                f"`by` must be 'correctness', 'depth', 'module', 'question' or 'rollout', but {by!r} was given."
            )

    def _summary(
        self, teacher: str, name: str, k: int, chosen: NDArray[np.bool_], estimators: dict[str, Estimator]
    ) -> ClassSummary:
        status = self.status[chosen, k]
        return ClassSummary(
            teacher,
            name,
            {figure: jackknife(e, self.confidence) for figure, e in estimators.items()},
            nodes=int(chosen.sum()),
            undefined=int((status == UNDEFINED).sum()),
            undetermined=int((status == UNDETERMINED).sum()),
        )

    def _difference(
        self, teacher: str, name: str, first: dict[str, Estimator], second: dict[str, Estimator]
    ) -> ClassSummary:
        figures = {figure: jackknife(first[figure] - second[figure], self.confidence) for figure in first}
        return ClassSummary(teacher, name, figures, figures["predicted_gain"].nodes, 0, 0)

    def _modules(self) -> list[ClassSummary]:
        everything = np.ones(len(self.evidence.correct), bool)
        found: dict[tuple[int, int], ClassSummary] = {}
        for m, module in enumerate(self.report.modules):
            evidence = gather(self.report.nodes, module=m, teachers=len(self.report.teachers))
            correction, status = correct_for_noise(evidence, self.model), statuses(evidence)
            for k, teacher in enumerate(self.report.teachers):
                figures = gradient_figures(evidence, correction, k, everything, status[:, k])
                found[k, m] = self._summary(teacher, module, k, everything, figures)
        return [found[key] for key in sorted(found)]

    def _estimators(self, k: int, name: str, chosen: NDArray[np.bool_]) -> dict[str, Estimator]:
        """Every figure of teacher ``k`` on the chosen nodes, the class of that name; kept for the differences."""
        if (k, name) not in self._kept:
            self._kept[k, name] = self._estimate(k, chosen)
        return self._kept[k, name]

    def _estimate(self, k: int, chosen: NDArray[np.bool_]) -> dict[str, Estimator]:
        found = gradient_figures(self.evidence, self.correction, k, chosen, self.status[:, k])
        found["step_alignment"] = self._step(k, chosen)
        logits, correction = self._logits
        found["logit_alignment"] = gradient_figures(logits, correction, k, chosen, statuses(logits)[:, k])["alignment"]
        advantage = np.zeros(0) if self._advantage is None else self._advantage[:, k]
        found["teacher_advantage"] = token_mean(self.evidence, advantage, chosen, found["predicted_gain"].withheld)
        if self.report.free:
            # A rollout's own reward stands for the success: right in the mean of a linear figure, and only there.
            for name in (*CORRECTED, "teacher_advantage"):
                found[name] = replace(found[name], withheld="free mode")
        for name in PREDICTORS:
            values = np.array([node.predictors[name][k] for node in self.report.nodes])
            found[name] = token_mean(self.evidence, values, chosen)
        return {name: found[name] for name in FIGURES}

    def _step(self, k: int, chosen: NDArray[np.bool_]) -> Estimator:
        """Cosine of the summed gradients; the ideal one's norm from disjoint halves of the continuations."""
        step = self.report.step
        questions, count = questions_of(self.evidence, chosen), int(chosen.sum())
        if step is None:
            return Estimator(_nothing, questions, count, withheld="not measured")
        labels = {name: i for i, name in enumerate(dict.fromkeys(node.question for node in self.report.nodes))}
        kinds = set(self.evidence.correct[chosen].tolist())
        if not (chosen == np.isin(self.evidence.correct, list(kinds))).all():
            return Estimator(_nothing, questions, count, withheld="of correct and incorrect only")
        place = np.array([labels[q] for q in step.question], dtype=np.int64)
        inside = np.array([c in kinds for c in step.correct], dtype=float)

        def product(weights: Floats, i: int, j: int) -> Floats:
            w = weights[..., place] * inside
            total: Floats = np.einsum("...g,gh,...h->...", w, step.gram[:, i, :, j], w)
            return total

        def cosine(weights: Floats, ideal: Floats) -> Floats:
            inner = (product(weights, 0, 2 + k) + product(weights, 1, 2 + k)) / 2
            square = ideal * product(weights, 2 + k, 2 + k)
            blank = np.full(square.shape, np.nan)
            found: Floats = np.divide(inner, np.sqrt(square.clip(min=0)), out=blank, where=square > 0)
            return found

        def halves(weights: Floats) -> Floats:
            return cosine(weights, product(weights, 0, 1))

        all_ = np.ones(len(questions))
        whole = (product(all_, 0, 0) + product(all_, 1, 1) + 2 * product(all_, 0, 1)) / 4
        return Estimator(halves, questions, count, uncorrected=float(cosine(all_, whole)), ends=RANGE)


def _nothing(weights: Floats) -> Floats:
    return np.full(weights.shape[:-1], np.nan)


def summarise(report: ProbeReport, confidence: float = 0.95, by: str = "correctness") -> list[ClassSummary]:
    """Summarise a report for each teacher and class; :class:`Analysis` keeps what several summaries share.

    Means are over tokens: each node counts with the inverse of its inclusion probability.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
        by: See :meth:`Analysis.summaries`.
    """
    return Analysis(report, confidence).summaries(by)


def correlations(report: ProbeReport, confidence: float = 0.95) -> dict[tuple[str, str], Estimate]:
    """Pearson correlation of alignment with each predictor over the defined nodes, by (teacher, predictor).

    NaN with fewer than three nodes, or where either does not vary. Source: arXiv:2605.10889.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1); clustered by question.
    """
    evidence = gather(report.nodes, teachers=len(report.teachers))
    cosine, status = evidence.cosine, statuses(evidence)
    found = {}
    for k, teacher in enumerate(report.teachers):
        defined = status[:, k] == DEFINED
        alignment = np.where(defined, cosine[:, k], 0)
        for name in PREDICTORS:
            predictor = np.array([node.predictors[name][k] for node in report.nodes])
            estimator = _correlation(evidence, alignment, predictor, defined)
            found[teacher, name] = jackknife(estimator, confidence)
    return found


def _correlation(evidence: Evidence, x: Floats, y: Floats, chosen: NDArray[np.bool_]) -> Estimator:
    """Pearson's, each node counting once."""
    questions, count = questions_of(evidence, chosen), int(chosen.sum())
    if count < 3 or np.ptp(x[chosen]) == 0 or np.ptp(y[chosen]) == 0:
        return Estimator(_nothing, questions, count, withheld="no difference" if count else "")
    x, y = x - x[chosen].mean(), y - y[chosen].mean()
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)[chosen]
    sums = np.zeros((len(questions), 6))
    np.add.at(sums, evidence.question[chosen], columns)

    def function(weights: Floats) -> Floats:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(weights @ sums, -1, 0)
        spread: Floats = np.sqrt((n * sxx - sx * sx) * (n * syy - sy * sy))
        return np.asarray((n * sxy - sx * sy) / spread)

    return Estimator(function, questions, count, ends=RANGE)


def scalars(report: ProbeReport, confidence: float = 0.95) -> dict[str, float]:
    """Every scalar of a report under the name that it is logged by.

    ``odp/<figure>/<teacher>/<split>`` with ``odp/<figure>_low/…`` and ``_high`` beside it, ``_uncorrected`` where a
    figure is corrected for noise; ``odp/questions/…`` and ``odp/nodes/…``; ``odp/undefined_share/…`` and
    ``odp/undetermined_share/…``; ``odp/correlation_<predictor>/<teacher>`` with its interval; and ``odp/probe/…`` for
    the probe as a whole. NaN where a figure does not exist. Figures of a second geometry are
    ``odp/<geometry>/<figure>/…``, as in ``odp/adam/alignment/answer/all``.
    """
    logged: dict[str, float] = {}
    analysis = Analysis(report, confidence)
    summaries = analysis.summaries()
    for summary in [*summaries, *analysis.contrasts()]:
        end = f"{summary.teacher}/{summary.split}"
        whole = " - " not in summary.teacher and summary.split != GAP
        for name, figure in summary.figures.items():
            if not whole and name in PREDICTORS:
                continue
            logged |= _with_ends(f"odp/{name}", f"/{end}", figure)
            if name in CORRECTED and whole:
                logged[f"odp/{name}_uncorrected/{end}"] = figure.uncorrected
        if whole:
            logged[f"odp/questions/{end}"] = float(summary.figures["predicted_gain"].questions)
            logged[f"odp/nodes/{end}"] = float(summary.nodes)
            for name, count in (("undefined", summary.undefined), ("undetermined", summary.undetermined)):
                logged[f"odp/{name}_share/{end}"] = _share(count, summary.nodes)
    for (teacher, predictor), figure in correlations(report, confidence).items():
        logged |= _with_ends(f"odp/correlation_{predictor}", f"/{teacher}", figure)
    everything = [s for s in summaries if s.split == "all"]
    pairs = sum(s.nodes for s in everything)
    responses = len(report.rollouts) + report.continuations
    logged |= {
        **_with_ends("odp/probe/success_rate", "", success_rate(report, confidence)),
        "odp/probe/undefined_share": _share(sum(s.undefined for s in everything), pairs),
        "odp/probe/undetermined_share": _share(sum(s.undetermined for s in everything), pairs),
        "odp/probe/truncated_share": _share(report.truncated, responses),
        "odp/probe/nodes": float(len(report.nodes)),
        "odp/probe/generated_tokens": float(sum(report.generated_tokens.values())),
        "odp/probe/seconds": sum(report.seconds.values()),
    }
    for stage, seconds in report.seconds.items():
        logged[f"odp/probe/seconds_{stage}"] = seconds
    if report.preconditioned is not None:
        geometry = report.preconditioned.settings["geometry"]
        for name, value in scalars(report.preconditioned, confidence).items():
            if name.split("/")[1].removesuffix("_low").removesuffix("_high") in GEOMETRIC:
                logged[name.replace("odp/", f"odp/{geometry}/", 1)] = value
    return logged


def free_scalars(report: ProbeReport, confidence: float = 0.95) -> dict[str, float]:
    """What the free mode logs: ``odp/free/predicted_gain/<teacher>`` with its interval, and how much it rests on."""
    logged = {
        **_with_ends("odp/free/success_rate", "", success_rate(report, confidence)),
        "odp/free/questions": float(len({r.question for r in report.rollouts})),
        "odp/free/nodes": float(len(report.nodes)),
    }
    for summary in summarise(report, confidence):
        if summary.split == "all":
            logged |= _with_ends("odp/free/predicted_gain", f"/{summary.teacher}", summary.figures["predicted_gain"])
    return logged


def success_rate(report: ProbeReport, confidence: float = 0.95) -> Estimate:
    """Mean reward of the rollouts, its interval clustered by question."""
    labels, index = np.unique([r.question for r in report.rollouts], return_inverse=True)
    sums = np.zeros((len(labels), 2))
    np.add.at(sums, index, [(r.reward, 1.0) for r in report.rollouts] or np.zeros((0, 2)))

    def function(weights: Floats) -> Floats:
        total = weights @ sums
        return np.asarray(total[..., 0] / total[..., 1])

    return jackknife(Estimator(function, np.ones(len(labels), bool), len(report.rollouts), ends=(0.0, 1.0)), confidence)


def _with_ends(name: str, end: str, figure: Estimate) -> dict[str, float]:
    return {f"{name}{end}": figure.value, f"{name}_low{end}": figure.low, f"{name}_high{end}": figure.high}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
