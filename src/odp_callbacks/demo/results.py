"""What the demo found, and what that means: who helps, whether the step kept the promise, what is undecided."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isnan

from odp_callbacks.analysis.advice import LARGEST_GROWTH, advise
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.questions_needed import growth_to_decide, rounded_up
from odp_callbacks.analysis.ranking import RankedTeacher, Ranking, rank_analysis
from odp_callbacks.analysis.ranking import verdict as judge
from odp_callbacks.analysis.realised_gain import RealisedGain, mean_over_questions, realised_gain
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.analysis.update_gain import direction_cosine
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.text import quoted_names


@dataclass(frozen=True)
class DemoResults:
    """Predictions from some questions, and what steps did to others.

    Attributes:
        report: Of the questions that the teachers were measured on.
        length: Length of the steps.
        before: ``(N,)``, success on each held-out question before a step.
        after: The same after the step along each teacher's update; teachers without a direction are left out.
        control: Name of the teacher that should not come first.
    """

    report: ProbeReport
    length: float
    before: Floats
    after: Mapping[str, Floats]
    control: str

    @cached_property
    def analysis(self) -> Analysis:
        """Of the report."""
        return Analysis(self.report, self.report.confidence)

    @cached_property
    def ranking(self) -> Ranking:
        """The teachers in the predicted order."""
        return rank_analysis(self.analysis)

    @property
    def places(self) -> list[RankedTeacher]:
        """The teachers in the predicted order."""
        return self.ranking.classes["all"]

    @cached_property
    def gains(self) -> dict[str, RealisedGain]:
        """Predicted beside realised, in the predicted order."""
        confidence = self.analysis.confidence
        return {
            place.teacher: realised_gain(
                place.teacher, place.gain, self.length, self.before, self.after[place.teacher], confidence
            )
            for place in self.places
            if place.teacher in self.after
        }

    @property
    def advice(self) -> str:
        """What to do next, as the report says it."""
        return advise(self.analysis, self.ranking).sentence

    def difference(self, first: str, second: str) -> Estimate:
        """Realised change of one teacher's step minus that of another's."""
        changes = self.gains[first].changes - self.gains[second].changes
        return mean_over_questions(changes, self.analysis.confidence, (-2.0, 2.0))

    @property
    def decided_pairs(self) -> list[tuple[str, str]]:
        """Pairs of teachers that the prediction tells apart, the better one first; both took a step."""
        pairs = []
        for contrast in self.analysis.contrasts():
            first, second = contrast.teacher.split(" - ")
            gain = contrast.figures["update_gain"]
            if contrast.split == "all" and {first, second} <= self.gains.keys():
                pairs += [(first, second)] if gain.low > 0 else [(second, first)] if gain.high < 0 else []
        return pairs


def headline(results: DemoResults) -> str:
    """What to do: as the report advises, or as the step of the best teacher says where the prediction is undecided."""
    best = next(iter(results.gains.values()), None)
    if best is None or judge(best.predicted) != "undecided" or judge(best.change) == "undecided":
        return results.advice
    name = quoted_names([best.teacher])
    what = f"Distil with {name}, whose" if judge(best.change) == "helps" else f"Do not distil with {name}: its"
    outcome = "gained" if judge(best.change) == "helps" else "lost"
    return f"{what} step {outcome}. The prediction alone would say: {results.advice}"


def confirmation(results: DemoResults) -> str:
    """Whether the step along the best teacher's update did what was predicted."""
    if not results.gains:
        return "No step could be taken, because no teacher differs from the student on its responses."
    best = next(iter(results.gains.values()))
    predicted, seen = judge(best.predicted), judge(best.change)
    name = quoted_names([best.teacher])
    moved = (
        f"a step along {name} took success on {len(results.before)} other questions from {best.before.value:.0%} to "
        f"{best.after.value:.0%} ({_with_interval(best.change)}; predicted: {_with_interval(best.predicted)})"
    )
    if seen == "undecided":
        open_matter = "it either" if predicted == "undecided" else "whether it was right"
        return f"The step does not decide {open_matter}: {moved}{_more_held_out(results, best.change)}."
    if predicted == "undecided":
        return f"The step decides it, {name} {seen}: {moved}."
    if predicted != seen:
        return f"It was wrong: {moved}."
    return f"It was right: {moved}." if best.agrees else f"It was right about the sign, not about the size: {moved}."


def order(results: DemoResults) -> str:
    """How many of the predicted differences between teachers came out with that sign; empty if none was predicted."""
    pairs = results.decided_pairs
    if not pairs:
        return ""
    kept = [pair for pair in pairs if results.difference(*pair).value > 0]
    significant = [pair for pair in kept if results.difference(*pair).low > 0]
    noun = "pair" if len(pairs) == 1 else "pairs"
    return (
        f"Of {len(pairs)} {noun} of contexts that the prediction tells apart, {len(kept)} came out in that order, "
        f"{len(significant)} of them significantly."
    )


def control_check(results: DemoResults) -> str:
    """Whether the negative control is seen to be one."""
    place = next((place for place in results.places if place.teacher == results.control), None)
    if place is None:
        return ""
    name = quoted_names([place.teacher])
    if place.behind is None:
        return f"The negative control {name} comes first, so do not believe this ranking."
    best = results.places[0].teacher
    realised = results.difference(best, place.teacher) if {best, place.teacher} <= results.gains.keys() else None
    gaps = [] if isnan(place.behind.value) else [f"{_with_interval(place.behind.scaled(results.length))} (predicted)"]
    gaps += [] if realised is None else [f"{_with_interval(realised)} (realised)"]
    behind = f"it stays behind {quoted_names([best])} by {', and by '.join(gaps) or 'nothing that was measured'}"
    others = _no_better_than_control(results, best)
    if place.worse or place.verdict == "harms":
        return f"The negative control {name} is seen to be one: {behind}.{others}"
    if realised is not None and realised.low > 0:
        return f"The negative control {name} is seen to be one by its step alone: {behind}.{others}"
    count = len({rollout.question for rollout in results.report.rollouts})
    needed = _needed(growth_to_decide(place.behind, results.analysis.confidence), count, "questions", " (--questions)")
    return f"It is undecided whether the negative control {name} is one: {behind}{needed}."


def _no_better_than_control(results: DemoResults, best: str) -> str:
    """A sentence on each other teacher that is predicted to gain no more than the control, in the same direction."""
    report = results.report
    grams = [update.gram for update in report.updates]
    better_than_control = {first for first, second in results.decided_pairs if second == results.control}
    sentences = []
    for teacher in results.gains:
        if teacher not in {best, results.control, *better_than_control}:
            cosine = direction_cosine(grams, *map(report.teachers.index, (teacher, results.control)))
            sentences.append(
                f" {quoted_names([teacher])} is not measured to do better than the control; the cosine of their "
                f"updates is {cosine:.2f}."
            )
    return "".join(sentences)


def verdict(results: DemoResults, place: RankedTeacher) -> str:
    """A few words about a teacher: what was predicted, and what the step showed."""
    behind = {"helps": "helps less", "undecided": "behind"}
    predicted = behind.get(place.verdict, place.verdict) if place.worse else place.verdict
    gain = results.gains.get(place.teacher)
    if gain is None:
        return f"{predicted}\nno step taken"
    seen = {"helps": "gained", "harms": "lost", "undecided": "unclear"}[judge(gain.change)]
    return f"{predicted}\nstep: {seen}"


def _more_held_out(results: DemoResults, change: Estimate) -> str:
    growth = growth_to_decide(change, results.analysis.confidence)
    return _needed(growth, len(results.before), "held-out questions", " (--held_out)")


def _needed(growth: float, count: int, what: str, option: str = "") -> str:
    """How many questions would tell, as the end of a sentence."""
    if isnan(growth):
        return ""
    if growth > LARGEST_GROWTH:
        return f"; {LARGEST_GROWTH:.0f} times as many {what} would hardly tell"
    return f"; about {rounded_up(growth * count)} {what}{option} would tell"


def _with_interval(estimate: Estimate) -> str:
    """An estimate in percentage points with its interval."""
    if isnan(estimate.value):
        return "nothing"
    value = f"{100 * estimate.value:+.1f}"
    if isnan(estimate.low):
        return f"{value} points"
    return f"{value} points, {100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"
