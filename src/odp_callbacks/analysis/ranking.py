"""Which teacher helps: by predicted gain, on all rollouts, by class and by question, and what cannot be told."""

import math
from dataclasses import dataclass, replace

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import SPLITS, Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import shown


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher's place in one class.

    Attributes:
        teacher: By name.
        gain: Predicted gain, which ranks.
        verdict: ``"helps"`` or ``"harms"`` where the interval excludes 0, else ``"undecided"``.
        behind: By how much it is behind the best of its class, on the same nodes; None for the best.
        worse: Whether that difference excludes 0.
    """

    teacher: str
    gain: Estimate
    verdict: str
    behind: Estimate | None = None
    worse: bool = False


@dataclass(frozen=True)
class Ranking:
    """Teachers of a probe, the best first.

    Attributes:
        classes: ``"all"``, ``"correct"``, ``"incorrect"`` and each ``"question <id>"``.
        answer: The result in a sentence or two.
    """

    classes: dict[str, list[RankedTeacher]]
    answer: str


def rank(report: ProbeReport, confidence: float = 0.95) -> Ranking:
    """Rank the teachers of a probe by predicted gain; differences are taken on the same nodes.

    Args:
        report: A probe's report.
        confidence: Level of the intervals.
    """
    return rank_analysis(Analysis(report, confidence))


def rank_analysis(analysis: Analysis) -> Ranking:
    """The same, from an analysis that is there already."""
    gains: dict[str, dict[str, Estimate]] = {}
    for summary in [*analysis.summaries(), *analysis.summaries("question")]:
        if summary.split in SPLITS or summary.split.startswith("question "):
            gains.setdefault(summary.split, {})[summary.teacher] = summary.figures["predicted_gain"]
    behind = {(c.split, c.teacher): c.figures["predicted_gain"] for c in analysis.contrasts()}
    classes = {split: _places(split, found, behind) for split, found in gains.items()}
    return Ranking(classes, _never(analysis.report) or _answer(classes["all"]))


def _never(report: ProbeReport) -> str:
    """Where success never differs there is nothing to rank by, and that is what must be said."""
    rewards = {r.reward for r in report.rollouts} | {float(x) for n in report.nodes for x in n.total / n.count.clip(1)}
    if len(rewards) > 1:
        return ""
    return (
        f"Nothing can be told: every rollout and continuation has the reward {rewards.pop():g}. Take questions that "
        "the student sometimes solves, or look at what the reward asks for."
    )


def verdict(figure: Estimate) -> str:
    """What an interval says of a sign."""
    return "helps" if figure.low > 0 else "harms" if figure.high < 0 else "undecided"


def _places(split: str, gains: dict[str, Estimate], behind: dict[tuple[str, str], Estimate]) -> list[RankedTeacher]:
    def key(name: str) -> float:
        value = gains[name].value
        return -math.inf if math.isnan(value) else value

    order = sorted(gains, key=key, reverse=True)
    places = []
    for name in order:
        first, difference = order[0], None
        if name != first:
            difference = behind.get((split, f"{first} - {name}"))
            if difference is None and (turned := behind.get((split, f"{name} - {first}"))) is not None:
                difference = replace(turned, value=-turned.value, low=-turned.high, high=-turned.low)
        worse = difference is not None and difference.low > 0
        places.append(RankedTeacher(name, gains[name], verdict(gains[name]), difference, worse))
    return places


def _answer(places: list[RankedTeacher]) -> str:
    helping = [p.teacher for p in places if p.verdict == "helps"]
    harming = [p.teacher for p in places if p.verdict == "harms"]
    rest = [p.teacher for p in places if p.verdict == "undecided"]
    parts = []
    if helping:
        parts.append(f"{_list(helping)} measurably {_verb(helping, 'help')}")
    if harming:
        parts.append(f"{_list(harming)} measurably {_verb(harming, 'harm')}")
    if rest:
        they = "it helps" if len(rest) == 1 else "they help"
        parts.append(f"of {_list(rest)} the evidence cannot tell whether {they}")
    text = "; ".join(parts) + "." if parts else "Nothing was measured."
    if len(places) > 1 and helping:
        close = [p.teacher for p in places[1:] if not p.worse]
        text += (
            f" {_list([places[0].teacher])} comes first, but {_list(close)} may be as good."
            if close
            else f" {_list([places[0].teacher])} measurably helps most."
        )
    return text[0].upper() + text[1:]  # a name stands in quotes, and keeps its own


def _list(names: list[str]) -> str:
    names = [f"“{shown(name)}”" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(names: list[str], verb: str) -> str:
    return f"{verb}s" if len(names) == 1 else verb
