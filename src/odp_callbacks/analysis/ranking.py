"""Ranking of the teachers by update gain or predicted gain, over all rollouts, by class and by question."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import SPLITS, Analysis, ClassSummary
from odp_callbacks.analysis.update_gain import EQUAL_REWARDS, EQUAL_TEACHER, ONE_QUESTION
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import quoted_names


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher's rank in one class.

    Attributes:
        teacher: Name of the teacher.
        gain: Update gain where an update was measured, otherwise predicted gain.
        verdict: ``"helps"`` or ``"harms"`` where the interval of the gain excludes 0, otherwise ``"undecided"``.
        behind: Gain of the best teacher of the class minus this one's, on the same nodes; None for the best.
        worse: Whether the interval of that difference lies above 0.
    """

    teacher: str
    gain: Estimate
    verdict: str
    behind: Estimate | None = None
    worse: bool = False


@dataclass(frozen=True)
class Ranking:
    """The teachers of a probe, best first.

    Attributes:
        classes: Ranked teachers of ``"all"``, ``"correct"``, ``"incorrect"`` and of each ``"question <id>"``.
        answer: The result in one or two sentences.
    """

    classes: dict[str, list[RankedTeacher]]
    answer: str


def rank(report: ProbeReport, confidence: float = 0.95) -> Ranking:
    """Rank the teachers of a probe by update gain, or by predicted gain where no update was measured.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
    """
    return rank_analysis(Analysis(report, confidence))


def rank_analysis(analysis: Analysis) -> Ranking:
    """Rank the teachers of an analysis that was computed before, see :func:`rank`."""
    gains: dict[str, dict[str, Estimate]] = {}
    for summary in [*analysis.summaries(), *analysis.summaries("question")]:
        if summary.split in SPLITS or summary.split.startswith("question "):
            gains.setdefault(summary.split, {})[summary.teacher] = judged_gain(summary)
    differences = {(contrast.split, contrast.teacher): judged_gain(contrast) for contrast in analysis.contrasts()}
    classes = {split: _rank_class(split, class_gains, differences) for split, class_gains in gains.items()}
    return Ranking(classes, _answer_without_differences(analysis.report) or _answer(classes["all"]))


NO_GAIN = {
    ONE_QUESTION: "Nothing can be told of one question, because the gain is that of other questions; give several.",
    EQUAL_REWARDS: "Nothing can be told, because all rollouts of a question have equal rewards, for every question; "
    "give questions that the student sometimes solves.",
    EQUAL_TEACHER: "{teachers} {differ} from the student on its rollouts, so there is no update to measure.",
}
"""Why no update gain exists, by the note of its estimate; other notes say that the data are not enough."""


def missing_gains(notes: Mapping[str, str]) -> str:
    """Say why teachers have no update gain; empty if they have one, or if the data are just not enough.

    Args:
        notes: Note of the update gain of each teacher.

    Examples:
        >>> missing_gains({"base": "teacher equals student", "answer": ""})
        '“base” does not differ from the student on its rollouts, so there is no update to measure.'
    """
    sentences = []
    for note, reason in NO_GAIN.items():
        if teachers := [teacher for teacher, of_teacher in notes.items() if of_teacher == note]:
            differ = "does not differ" if len(teachers) == 1 else "do not differ"
            sentences.append(reason.format(teachers=quoted_names(teachers), differ=differ))
    return " ".join(sentences)


def judged_gain(summary: ClassSummary) -> Estimate:
    """The figure that teachers are ranked by: update gain where it was measured, otherwise predicted gain."""
    return summary.figures["update_gain" if "update_gain" in summary.figures else "predicted_gain"]


def verdict(gain: Estimate) -> str:
    """Say whether a gain is significantly positive, significantly negative or neither."""
    return "helps" if gain.low > 0 else "harms" if gain.high < 0 else "undecided"


def _rank_class(
    split: str, gains: dict[str, Estimate], differences: dict[tuple[str, str], Estimate]
) -> list[RankedTeacher]:
    def value_or_last(teacher: str) -> float:
        value = gains[teacher].value
        return -math.inf if math.isnan(value) else value

    best_first = sorted(gains, key=value_or_last, reverse=True)
    ranked = []
    for teacher in best_first:
        behind = None if teacher == best_first[0] else teacher_difference(differences, split, best_first[0], teacher)
        worse = behind is not None and behind.low > 0
        ranked.append(RankedTeacher(teacher, gains[teacher], verdict(gains[teacher]), behind, worse))
    return ranked


def teacher_difference(
    differences: Mapping[tuple[str, str], Estimate], split: str, first: str, second: str
) -> Estimate | None:
    """Gain of one teacher minus another's; None if they were not compared.

    Args:
        differences: By class and pair, such as ``("all", "a - b")``; each pair stands in one order only.
        split: The class.
        first: Name of the one teacher.
        second: Name of the other.
    """
    if (split, f"{first} - {second}") in differences:
        return differences[split, f"{first} - {second}"]
    reverse = differences.get((split, f"{second} - {first}"))
    return None if reverse is None else reverse.scaled(-1.0)


def distinct_rewards(report: ProbeReport) -> set[float]:
    """The rewards of all rollouts, and the mean rewards of all branches."""
    means = {float(mean) for node in report.nodes for mean in node.total / node.count.clip(1)}
    return {rollout.reward for rollout in report.rollouts} | means


def _answer_without_differences(report: ProbeReport) -> str:
    """The answer for a probe in which success never differs, so that there is nothing to rank by; otherwise empty."""
    rewards = distinct_rewards(report)
    if not rewards:
        return "Nothing was measured: there is no rollout."
    if len(rewards) > 1:
        return ""
    return (
        f"Nothing can be told: every rollout and continuation has the reward {rewards.pop():g}. Use questions that "
        "the student sometimes solves, or check what the reward asks for."
    )


def _answer(ranked: list[RankedTeacher]) -> str:
    missing = missing_gains({place.teacher: place.gain.note for place in ranked})
    ranked = [place for place in ranked if place.gain.note not in NO_GAIN]
    by_verdict: dict[str, list[str]] = {"helps": [], "harms": [], "undecided": []}
    for place in ranked:
        by_verdict[place.verdict].append(place.teacher)
    helping, harming, undecided = by_verdict["helps"], by_verdict["harms"], by_verdict["undecided"]
    clauses = []
    if helping:
        clauses.append(f"{quoted_names(helping)} measurably {_conjugate('help', helping)}")
    if harming:
        clauses.append(f"{quoted_names(harming)} measurably {_conjugate('harm', harming)}")
    if undecided:
        clauses.append(f"the evidence does not show whether {quoted_names(undecided)} {_conjugate('help', undecided)}")
    if not clauses:
        return missing or "Nothing was measured."
    answer = "; ".join(clauses) + "."
    if len(ranked) > 1 and helping:
        best, equally_good = [ranked[0].teacher], [place.teacher for place in ranked[1:] if not place.worse]
        answer += (
            f" {quoted_names(best)} comes first, but {quoted_names(equally_good)} may be as good."
            if equally_good
            else f" {quoted_names(best)} measurably helps most."
        )
    answer = f"{answer} {missing}".strip()
    return answer[0].upper() + answer[1:]  # names are quoted, so a name's own first letter does not change


def _conjugate(verb: str, subjects: list[str]) -> str:
    return f"{verb}s" if len(subjects) == 1 else verb
