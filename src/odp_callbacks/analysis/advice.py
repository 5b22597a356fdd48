"""What to do next, in one sentence that follows from the intervals of a report: with which teacher, on which rollouts.

Nothing is said without an interval that says it. What the intervals leave open is called undecided, with the number of
questions that would about decide it.
"""

import math
from dataclasses import dataclass

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.questions_needed import POWER, decided_again, growth_to_decide, growth_to_repeat, rounded_up
from odp_callbacks.analysis.ranking import (
    NO_GAIN,
    RankedTeacher,
    Ranking,
    distinct_rewards,
    judged_gain,
    rank_analysis,
    teacher_difference,
)
from odp_callbacks.analysis.rollout_choice import RolloutChoice, choose_rollouts
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.analysis.update_gain import EQUAL_TEACHER
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import quoted_names
from odp_callbacks.update_records import CLASSES

LARGEST_GROWTH = 20.0
"""If it took more than this many times as many questions to decide, the reader is told to stop asking."""
INFORMATIVE_QUESTIONS = 8
"""Questions with unequal rewards that are wanted where there are too few for any interval."""


@dataclass(frozen=True)
class Advice:
    """What to do next.

    Attributes:
        sentence: All of it, in one sentence.
        certainty: How sure it is that the teacher helps there, in a sentence; empty without a teacher.
        teacher: The teacher to distil with; empty if none is measured to help.
        where: On which rollouts, such as ``"on all rollouts"``; empty without a teacher.
        questions: About how many questions would decide what the sentence leaves open, those of the report included;
            None if nothing is open, or if no number within reach would decide it.
    """

    sentence: str
    certainty: str = ""
    teacher: str = ""
    where: str = ""
    questions: int | None = None


def advise(analysis: Analysis, ranking: Ranking | None = None) -> Advice:
    """Say what to do next, from the intervals of a report.

    Teachers are judged by update gain, or by the predicted gain of single tokens where no update was measured.

    Args:
        analysis: Analysis of a report.
        ranking: Of the same analysis, if it was computed before.

    Examples:
        >>> from odp_callbacks.records import ProbeReport
        >>> advise(Analysis(ProbeReport(("base",), (), (), (), {}, 0, 0, {}))).sentence
        'Nothing was measured: there is no rollout.'
    """
    return _Adviser(analysis, rank_analysis(analysis) if ranking is None else ranking).advice()


class _Adviser:
    """Finds the clauses of one advice."""

    def __init__(self, analysis: Analysis, ranking: Ranking) -> None:
        self.analysis, self.report, self.ranking = analysis, analysis.report, ranking
        self.questions = len({rollout.question for rollout in self.report.rollouts})
        self.places = [place for place in ranking.classes["all"] if place.gain.note not in NO_GAIN]
        self.wanted: list[float] = []  # how many questions each open matter would take

    def advice(self) -> Advice:
        if not self.places or len(distinct_rewards(self.report)) <= 1:
            return Advice(self._without_gain())
        best, choice = self._recommended()
        clauses = self._without_recommendation() if best is None else self._recommendation(best.teacher, choice)
        if not self.report.updates:
            clauses.append("measure the update (`update=True`) before you decide")
        sentence = "; ".join(clauses) + "."
        certainty = "" if best is None else self._certainty(best)
        questions = rounded_up(max(self.wanted)) if self.wanted else None
        if best is None:
            return Advice(sentence, questions=questions)
        return Advice(sentence, certainty, best.teacher, choice.where, questions)

    def _recommendation(self, teacher: str, choice: RolloutChoice) -> list[str]:
        """Clauses on the recommended teacher, the others, and the rollouts."""
        name = quoted_names([teacher])
        if not self.report.updates:
            main = f"As far as single tokens tell, distil with {name}, {choice.where}"
        elif self._is_small():
            main = f"Measure more before you distil: so far {name} is ahead, {choice.where}"
        else:
            main = f"Distil with {name}, {choice.where}"
        clauses = [main, *self._others(teacher)]
        return [*clauses, _with_note(choice.reason, self._question_note(choice.growth))] if choice.reason else clauses

    def _certainty(self, best: RankedTeacher) -> str:
        """The gain of the recommended teacher with its interval, and how often a repetition would show it again."""
        gain, level = best.gain, 100 * self.analysis.confidence
        figure = "Update gain" if self.report.updates else "Predicted gain"
        unit = "success probability gained per unit step"
        split = next(split for split, places in self.ranking.classes.items() if best in places)
        unequal = _questions_with_unequal_rewards(self.report)
        evidence = f", on {unequal} of which the rollouts' rewards differ" if self.report.updates else ""
        caution = self._few_questions(gain, unequal) if self._is_small() else self._repetitions(gain)
        return (
            f"{figure} of {quoted_names([best.teacher])} on {split} rollouts ({unit}): {gain.value:+.2g}, {level:g}% "
            f"interval {gain.low:+.2g} to {gain.high:+.2g}, from {self.questions} questions{evidence}; {caution}."
        )

    def _few_questions(self, gain: Estimate, unequal: int) -> str:
        """What to do before an interval of few questions is relied on: such intervals are too short."""
        growth = max(2.0, INFORMATIVE_QUESTIONS / max(1, unequal), growth_to_repeat(gain, self.analysis.confidence))
        return (
            f"with fewer than {INFORMATIVE_QUESTIONS} such questions an interval is often too narrow, so measure about "
            f"{self._needed(growth)} questions in all before you rely on it"
        )

    def _is_small(self) -> bool:
        """Whether an update was measured on too few questions for its interval to be relied on."""
        return bool(self.report.updates) and _questions_with_unequal_rewards(self.report) < INFORMATIVE_QUESTIONS

    def _repetitions(self, gain: Estimate) -> str:
        """In how many repetitions the interval would exclude 0 again, and how many questions a weak case takes."""
        share = decided_again(gain, self.analysis.confidence)
        times = "at least 95" if share >= 0.95 else f"about {5 * round(20 * share)}"
        clause = f"{times} of 100 repetitions with as many new questions would show again that it helps"
        if share >= POWER:
            return clause
        needed = rounded_up(growth_to_repeat(gain, self.analysis.confidence) * self.questions)
        return f"{clause}, and {100 * POWER:.0f} of 100 with {needed}"

    def _without_gain(self) -> str:
        answer = self.ranking.answer
        notes = {place.gain.note for place in self.ranking.classes["all"]}
        return f"Try another teacher or context: {answer}" if notes == {EQUAL_TEACHER} else answer

    def _recommended(self) -> tuple[RankedTeacher | None, RolloutChoice]:
        """The first teacher that is measured to help on all rollouts, or else on one class; None if there is none."""
        for place in self.places:
            if place.verdict == "helps":
                return place, choose_rollouts(self.analysis, place.teacher)
        known = {place.teacher for place in self.places}
        for split in CLASSES:
            for place in self.ranking.classes.get(split, ()):
                if place.verdict == "helps" and place.teacher in known:
                    return place, RolloutChoice(
                        f"on {split} rollouts only", "on all rollouts it is not measured to help"
                    )
        return None, RolloutChoice("")

    def _others(self, recommended: str) -> list[str]:
        """Clauses on the other teachers, those of one fate together."""
        differences = {
            (contrast.split, contrast.teacher): judged_gain(contrast) for contrast in self.analysis.contrasts()
        }
        fates: dict[str, list[str]] = {fate: [] for fate in FATES}
        growths: dict[str, float] = {}
        for place in self.places:
            if place.teacher != recommended:
                ahead = teacher_difference(differences, "all", recommended, place.teacher)
                fate, growths[place.teacher] = _fate(place, ahead, self.analysis.confidence)
                fates[fate].append(place.teacher)
        fates["as student"] = [
            place.teacher for place in self.ranking.classes["all"] if place.gain.note == EQUAL_TEACHER
        ]
        clauses = []
        for fate, teachers in fates.items():
            if teachers:
                one, several = FATES[fate]
                is_open = fate in ("open", "alike")
                note = self._question_note(max(growths[name] for name in teachers)) if is_open else ""
                clauses.append(_with_note(f"{quoted_names(teachers)} {one if len(teachers) == 1 else several}", note))
        return clauses

    def _without_recommendation(self) -> list[str]:
        """What to do if no teacher is measured to help: how many questions would tell, or to try something else."""
        undecided = [place for place in self.places if place.verdict == "undecided"]
        harming = [place.teacher for place in self.places if place.verdict == "harms"]
        harm = f"{quoted_names(harming)} measurably {'harms' if len(harming) == 1 else 'harm'}" if harming else ""
        if not undecided:
            return [f"Try another teacher or context: {harm}"]
        names = quoted_names([place.teacher for place in undecided])
        growths = {place.teacher: growth_to_decide(place.gain, self.analysis.confidence) for place in undecided}
        with_interval = {teacher: growth for teacher, growth in growths.items() if not math.isnan(growth)}
        if not with_interval:
            return [self._too_few_questions(), *filter(None, [harm])]
        soonest = min(with_interval, key=lambda teacher: with_interval[teacher])
        if with_interval[soonest] > LARGEST_GROWTH:
            largest = max(place.gain.high for place in undecided if place.teacher in with_interval)
            main = (
                f"Try another teacher or context: {self.questions} questions show no gain from {names} "
                f"(at most {largest:+.2g}), and even {LARGEST_GROWTH:.0f} times as many would hardly tell"
            )
            return [main, *filter(None, [harm])]
        needed = self._needed(with_interval[soonest])
        sign = next(place.gain.value for place in undecided if place.teacher == soonest)
        main = (
            f"Measure more before you distil: {self.questions} questions leave {names} undecided, and about "
            f"{needed} would tell whether {quoted_names([soonest])} {'helps' if sign > 0 else 'harms'}"
            f"{self._duration(with_interval[soonest])}"
        )
        return [main, *filter(None, [harm])]

    def _too_few_questions(self) -> str:
        unequal = _questions_with_unequal_rewards(self.report)
        needed = self._needed(max(2.0, INFORMATIVE_QUESTIONS / max(1, unequal)))
        return (
            f"Measure more questions, about {needed}: of {self.questions}, {unequal} "
            f"{'has' if unequal == 1 else 'have'} rewards that differ, which is too few for an interval"
        )

    def _needed(self, growth: float) -> int:
        self.wanted.append(growth * self.questions)
        return rounded_up(growth * self.questions)

    def _question_note(self, growth: float) -> str:
        """How many questions would tell what is open; empty if nothing is."""
        if growth == 1 or math.isnan(growth):
            return ""
        if growth > LARGEST_GROWTH:
            return f"even {LARGEST_GROWTH:.0f} times as many questions hardly would"
        return f"about {self._needed(growth)} questions in all would tell"

    def _duration(self, growth: float) -> str:
        seconds = growth * sum(self.report.stage_seconds.values())
        if seconds < 1:
            return ""
        amount, unit = (
            (seconds, "s") if seconds < 90 else (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
        )
        return f" ({amount:.0f} {unit} at this pace)"


FATES = {
    "open": ("cannot be told from it yet", "cannot be told from it yet"),
    "alike": ("cannot be told from it", "cannot be told from it"),
    "less": ("helps less", "help less"),
    "nothing": ("adds nothing measurable", "add nothing measurable"),
    "harms": ("harms", "harm"),
    "unknown": ("was measured on too few questions", "were measured on too few questions"),
    "as student": ("does not differ from the student", "do not differ from the student"),
}
"""What the sentence says of teachers that it does not recommend, of one and of several."""


def _fate(place: RankedTeacher, ahead: Estimate | None, confidence: float) -> tuple[str, float]:
    """What is known of a teacher beside the recommended one, and how many times as many questions would tell more.

    Args:
        place: The teacher.
        ahead: Gain of the recommended teacher minus this one's.
        confidence: Level of the intervals.
    """
    if place.verdict == "harms":
        return "harms", 1.0
    if ahead is None or math.isnan(ahead.low):
        return "unknown", 1.0
    if ahead.low > 0:
        return ("less" if place.verdict == "helps" else "nothing"), 1.0
    growth = growth_to_decide(ahead, confidence)
    return ("open" if growth <= LARGEST_GROWTH else "alike"), growth


def _with_note(clause: str, note: str) -> str:
    """Add a note in brackets to a clause, which may end in brackets itself."""
    if not note:
        return clause
    return f"{clause.removesuffix(')')}; {note})" if clause.endswith(")") else f"{clause} ({note})"


def _questions_with_unequal_rewards(report: ProbeReport) -> int:
    rewards: dict[str, set[float]] = {}
    for rollout in report.rollouts:
        rewards.setdefault(rollout.question, set()).add(rollout.reward)
    return sum(len(of_question) > 1 for of_question in rewards.values())
