"""What to do next in a sentence, for reports whose truth is known."""

import re
from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.advice import Advice, advise
from odp_callbacks.analysis.questions_needed import growth_to_decide
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from tests.helpers.records import HOSTILE, report_maker
from tests.helpers.updates import update_only

NAMES = ("solution", "contrastive", "answer", "wrong answer")


def report_of(gains: tuple[float, ...], noise: float = 0.1, questions: int = 12, seed: int = 0) -> ProbeReport:
    names = NAMES[: len(gains)]
    short = report_maker()(lambda correct, depth: gains, teachers=names, questions=questions)
    return update_only(short, lambda correct: gains, noise=noise, seed=seed)


def advice_on(report: ProbeReport) -> Advice:
    advice = advise(Analysis(report))
    assert "nan" not in advice.sentence
    assert advice.sentence.count(". ") == 0, "one sentence"
    assert advice.sentence.endswith(".")
    assert bool(advice.certainty) == bool(advice.teacher)
    return advice


def test_what_is_decided_is_said_in_one_sentence() -> None:
    advice = advice_on(report_of((0.6, 0.3, 0.02, -0.3)))
    assert advice.sentence.startswith("Distil with “solution”, on all rollouts; ")
    assert "“contrastive” helps less" in advice.sentence
    assert "“answer” adds nothing measurable" in advice.sentence
    assert "“wrong answer” harms" in advice.sentence
    assert re.search(r"leaving out (in)?correct rollouts would lose \d+% of the gain", advice.sentence)
    assert (advice.teacher, advice.where, advice.questions) == ("solution", "on all rollouts", None)


def test_two_that_may_be_equally_good_are_said_to_be_and_how_many_questions_would_tell() -> None:
    report = report_of((0.6, 0.5), noise=0.2)
    (contrast,) = [one for one in Analysis(report).contrasts() if one.split == "all"]
    growth = growth_to_decide(contrast.figures["update_gain"])
    advice = advice_on(report)
    assert advice.questions is not None
    assert 12 * growth <= advice.questions <= 1.1 * 12 * growth + 1
    assert growth < 20
    assert (
        f"“contrastive” cannot be told from it yet (about {advice.questions} questions in all would tell)"
        in advice.sentence
    )


def test_undecided_asks_for_a_number_of_questions() -> None:
    report = report_of((0.15, 0.0), noise=0.5)
    gain = Analysis(report).summaries()[0].figures["update_gain"]
    assert gain.low < 0 < gain.high
    advice = advice_on(report)
    assert advice.sentence.startswith("Measure more before you distil: 12 questions leave ")
    assert f"about {advice.questions} would tell whether “" in advice.sentence
    assert (advice.teacher, advice.where) == ("", "")
    assert advice.questions is not None
    assert advice.questions > 12


def test_where_far_more_questions_would_hardly_tell_another_teacher_is_advised() -> None:
    report = report_of((0.0, 0.0), noise=0.2)
    (update,) = report.updates
    quiet = replace(update.gram, cross=0.05 * (update.gram.cross - update.gram.cross.mean(axis=(0, 1))))
    advice = advice_on(replace(report, updates=(replace(update, gram=quiet),)))
    assert advice.sentence.startswith("Try another teacher or context: 12 questions show no gain from ")
    assert "20 times as many would hardly tell" in advice.sentence
    assert advice.questions is None


def test_teachers_that_all_harm_are_not_recommended() -> None:
    advice = advice_on(report_of((-0.3, -0.5)))
    assert advice.sentence == "Try another teacher or context: “solution” and “contrastive” measurably harm."
    assert advice.teacher == ""


def test_one_that_harms_is_named_beside_what_is_undecided() -> None:
    advice = advice_on(report_of((0.02, -0.9), noise=0.3, seed=1))
    assert advice.sentence.endswith("; “contrastive” measurably harms.")


def test_a_single_teacher_has_no_others() -> None:
    advice = advice_on(report_of((0.6,)))
    assert re.fullmatch(
        r"Distil with “solution”, on all rollouts; leaving out \w+ rollouts would lose \d+% of the gain \(.*\)\.",
        advice.sentence,
    )


def test_a_teacher_that_helps_on_one_class_only_is_used_there() -> None:
    short = report_maker()(lambda correct, depth: (0.1,), teachers=("near",), questions=12)
    report = update_only(short, lambda correct: (-0.3 if correct else 0.3,))
    gain = Analysis(report).summaries()[0].figures["update_gain"]
    assert not gain.low > 0
    advice = advice_on(report)
    assert advice.sentence == (
        "Distil with “near”, on incorrect rollouts only; on all rollouts it is not measured to help."
    )


def test_without_an_update_the_sentence_says_so() -> None:
    report = report_maker()(lambda correct, depth: (0.6, -0.4 if correct else 0.1))
    advice = advice_on(report)
    assert advice.sentence.startswith("As far as single tokens tell, distil with “near”, on all rollouts; “far” ")
    assert advice.sentence.endswith("; measure the update (`update=True`) before you decide.")


def test_too_few_unequal_rewards_ask_for_questions() -> None:
    report = report_of((0.6, 0.3), questions=2)
    advice = advice_on(report)
    assert advice.sentence == (
        "Measure more questions, about 8: of 2, 2 have rewards that differ, which is too few for an interval."
    )
    assert advice.questions == 8


def test_equal_rewards_ask_for_other_questions() -> None:
    report = report_of((0.6,))
    rollouts = tuple(replace(rollout, reward=0.0, correct=False) for rollout in report.rollouts)
    advice = advise(Analysis(replace(report, rollouts=rollouts)))
    assert "Use questions that the student sometimes solves" in advice.sentence


def test_a_teacher_that_is_the_student_is_not_waited_for() -> None:
    def without_direction(report: ProbeReport, teachers: list[int]) -> ProbeReport:
        (update,) = report.updates
        cross, directions, between = (
            np.array(part) for part in (update.gram.cross, update.gram.directions, update.gram.between)
        )
        cross[:, :, teachers], directions[:, :, teachers] = 0, 0
        between[:, :, teachers], between[:, :, :, teachers] = 0, 0
        gram = replace(update.gram, cross=cross, directions=directions, between=between)
        return replace(report, updates=(replace(update, gram=gram),))

    report = report_of((0.6, 0.3))
    assert "“contrastive” does not differ from the student" in advice_on(without_direction(report, [1])).sentence
    advice = advice_on(without_direction(report, [0, 1]))
    assert advice.sentence.startswith("Try another teacher or context: “solution” and “contrastive” do not differ")


def test_how_sure_it_is_has_the_interval_and_what_a_repetition_would_show() -> None:
    report = report_of((0.6, 0.3), noise=0.1)
    gain = Analysis(report).summaries()[0].figures["update_gain"]
    assert advice_on(report).certainty == (
        f"Update gain of “solution” on all rollouts (success probability gained per unit step): {gain.value:+.2g}, 95% "
        f"interval {gain.low:+.2g} to {gain.high:+.2g}, from 12 questions, on 12 of which the rollouts' rewards "
        "differ; at least 95 of 100 repetitions with as many new questions would show again that it helps."
    )


def test_an_interval_that_barely_excludes_0_is_called_as_weak_as_it_is() -> None:
    reports = (report_of((0.2,), noise=0.3, seed=seed) for seed in range(50))
    gains = ((report, Analysis(report).summaries()[0].figures["update_gain"]) for report in reports)
    report = next(report for report, gain in gains if 0 < gain.low < 0.2 * gain.value)
    found = re.search(r"about (\d+) of 100 repetitions .*, and 80 of 100 with (\d+)\.$", advice_on(report).certainty)
    assert found is not None
    assert 50 <= int(found[1]) <= 70
    assert 12 < int(found[2]) < 30


def test_few_questions_that_tell_something_are_not_relied_on() -> None:
    report = report_of((0.6,), noise=0.05, questions=5)
    assert Analysis(report).summaries()[0].figures["update_gain"].low > 0
    advice = advice_on(report)
    assert advice.sentence.startswith("Measure more before you distil: so far “solution” is ahead, on all rollouts")
    assert "repetitions" not in advice.certainty
    assert advice.certainty.endswith("so measure about 10 questions in all before you rely on it.")
    assert advice.questions == 10


def test_two_notes_on_one_clause_share_their_brackets() -> None:
    for seed in range(10):
        assert ") (" not in advise(Analysis(report_of((0.6, 0.5), noise=0.4, seed=seed))).sentence


def test_names_are_shown_safely() -> None:
    report = replace(report_of((0.6, 0.3)), teachers=(HOSTILE[2], HOSTILE[3]))
    sentence = advise(Analysis(report)).sentence
    assert sentence.isprintable()


@pytest.mark.parametrize("noise", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("gains", [(0.6, 0.5), (0.1, -0.1), (0.0, 0.0), (-0.4, 0.3), (0.5,)])
def test_nobody_is_recommended_without_an_interval_above_0(gains: tuple[float, ...], noise: float) -> None:
    report = report_of(gains, noise=noise)
    advice, analysis = advise(Analysis(report)), Analysis(report)
    lower_ends = {
        (summary.teacher, summary.split): summary.figures["update_gain"].low for summary in analysis.summaries()
    }
    if advice.teacher:
        assert max(lower_ends[advice.teacher, split] for split in ("all", "correct", "incorrect")) > 0
    else:
        assert not any(low > 0 for low in lower_ends.values())
