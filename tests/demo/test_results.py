"""What the demo says: each sentence, for results of which it is known what they mean."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.update_gain import direction_cosine
from odp_callbacks.demo.printing import gain_table
from odp_callbacks.demo.results import DemoResults, confirmation, control_check, headline, order, verdict
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only

NAMES = ("good", "control")
HELD_OUT = 40
MakeResults = Callable[..., DemoResults]


@pytest.fixture
def make_results(make_report: MakeReport) -> MakeResults:
    def make(
        gains: tuple[float, float] = (0.6, -0.5), changes: tuple[float, float] = (0.18, -0.1), **options: float
    ) -> DemoResults:
        """Update gains of the two teachers, and by how much their steps change success."""
        report = make_report(lambda correct, depth: (0.0, 0.0), teachers=NAMES, questions=12)
        report = update_only(report, lambda correct: gains, **options)
        generator = np.random.default_rng(0)
        before = generator.uniform(0.3, 0.6, HELD_OUT)
        noise = options.get("noise", 0.1)
        after = {
            name: before + change + noise * generator.normal(size=HELD_OUT)
            for name, change in zip(NAMES, changes, strict=True)
        }
        return DemoResults(report, 0.3, before, after, "control")

    return make


def test_a_prediction_that_comes_true_is_said_to_be_right(make_results: MakeResults) -> None:
    results = make_results()
    assert headline(results) == results.advice
    assert results.advice.startswith("Distil with “good”")
    assert confirmation(results).startswith(
        "It was right: a step along “good” took success on 40 other questions from "
    )
    assert results.decided_pairs == [("good", "control")]
    assert order(results) == (
        "Of 1 pair of contexts that the prediction tells apart, 1 came out in that order, 1 of them significantly."
    )
    assert [verdict(results, place) for place in results.places] == ["helps\nstep: gained", "harms\nstep: lost"]


def test_a_prediction_that_does_not_come_true_is_said_to_be_wrong(make_results: MakeResults) -> None:
    assert confirmation(make_results(changes=(-0.2, 0.1))).startswith("It was wrong: ")
    assert "0 came out in that order" in order(make_results(changes=(-0.2, 0.1)))
    much_less = make_results(changes=(0.05, 0.0), noise=0.01)
    assert confirmation(much_less).startswith("It was right about the sign, not about the size: ")


def test_a_step_can_decide_what_the_prediction_left_open(make_results: MakeResults) -> None:
    results = make_results()
    wide = replace(results.places[0], verdict="undecided", gain=replace(results.places[0].gain, low=-0.5, high=1.5))
    for change, outcome in ((0.2, "helps"), (-0.2, "harms")):
        undecided = make_results(changes=(change, 0.0))
        undecided.ranking.classes["all"][0] = wide
        assert confirmation(undecided).startswith(f"The step decides it, “good” {outcome}: ")
        start = {
            "helps": "Distil with “good”, whose step gained.",
            "harms": "Do not distil with “good”: its step lost.",
        }
        assert headline(undecided) == f"{start[outcome]} The prediction alone would say: {undecided.advice}"
        assert verdict(undecided, wide).startswith("undecided\nstep: ")
    flat = replace(results, after={**results.after, "good": results.before + np.tile([0.2, -0.19], HELD_OUT // 2)})
    flat.ranking.classes["all"][0] = wide
    assert confirmation(flat).startswith("The step does not decide it either: ")
    assert headline(flat) == flat.advice


def test_what_the_step_leaves_undecided_comes_with_how_much_more_it_takes(make_results: MakeResults) -> None:
    def changed_by(*pattern: float) -> str:
        results = make_results()
        changes = np.tile(pattern, HELD_OUT // len(pattern))
        return confirmation(replace(results, after={**results.after, "good": results.before + changes}))

    sentence = changed_by(0.23, -0.17)
    assert sentence.startswith("The step does not decide whether it was right: ")
    count = int(sentence.partition("; about ")[2].partition(" held-out questions")[0])
    # With 80 % power at the level of 5 %; Student's interval takes a few more.
    assert count == pytest.approx((2.8 * 0.2 / 0.03) ** 2, rel=0.15)
    assert "20 times as many held-out questions would hardly tell" in changed_by(0.2, -0.199)


def test_the_control_is_judged_by_its_distance_to_the_best(make_results: MakeResults) -> None:
    seen = control_check(make_results())
    assert seen.startswith("The negative control “control” is seen to be one: it stays behind “good” by +")
    assert "(predicted), and by +" in seen
    assert "is seen to be one: " in control_check(make_results((0.6, 0.1)))
    assert "comes first, so do not believe this ranking" in control_check(make_results((0.1, 0.6)))
    assert control_check(replace(make_results(), control="none of them")) == ""


def test_a_control_that_the_prediction_does_not_tell_apart_can_be_seen_by_its_step(make_results: MakeResults) -> None:
    def open_prediction(changes: tuple[float, float]) -> str:
        results = make_results(changes=changes)
        place = results.places[1]
        wide = Estimate(0.2, -0.1, 0.5, questions=12, nodes=12)
        results.ranking.classes["all"][1] = replace(place, verdict="undecided", behind=wide, worse=False)
        return control_check(results)

    assert "is seen to be one by its step alone: " in open_prediction((0.2, -0.2))
    undecided = open_prediction((0.1, 0.1))
    assert undecided.startswith("It is undecided whether the negative control “control” is one: ")
    assert re.search(r"; about \d+ questions \(--questions\) would tell\.$", undecided)


def test_a_teacher_like_the_control_is_named(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.0,) * 3, teachers=("good", "like it", "control"), questions=12)
    report = update_only(report, lambda correct: (0.9, 0.1, 0.1))
    before = np.random.default_rng(0).uniform(0.3, 0.6, HELD_OUT)
    results = DemoResults(report, 0.3, before, dict.fromkeys(report.teachers, before + 0.1), "control")
    cosine = direction_cosine([update.gram for update in report.updates], 1, 2)
    assert control_check(results).endswith(
        f"“like it” is not measured to do better than the control; the cosine of their updates is {cosine:.2f}."
    )


def test_without_any_step_that_is_said(make_results: MakeResults) -> None:
    results = replace(make_results(), after={})
    assert confirmation(results).startswith("No step could be taken")
    assert order(results) == ""
    assert verdict(results, results.places[0]) == "helps\nno step taken"


def test_without_a_prediction_no_number_is_made_up(make_results: MakeResults) -> None:
    results = make_results()
    rewards = tuple(replace(rollout, reward=0.0) for rollout in results.report.rollouts)
    gram = results.report.updates[0].gram
    equal = replace(gram, success=0 * gram.success, cross=0 * gram.cross)
    updates = (replace(results.report.updates[0], gram=equal),)
    results = replace(results, report=replace(results.report, rollouts=rewards, updates=updates))
    assert results.advice.startswith("Nothing can be told")
    assert "; predicted: nothing)" in confirmation(results)
    printed = " ".join(
        [confirmation(results), control_check(results), *(map(str, gain_table(results).columns[1].cells))]
    )
    assert "nan" not in printed
    assert "no estimate\nequal rewards" in printed


def test_predicted_and_realised_are_of_the_same_step(make_results: MakeResults) -> None:
    results = make_results()
    for place in results.places:
        gain = results.gains[place.teacher]
        assert gain.predicted.value == pytest.approx(0.3 * place.gain.value)
        assert isinstance(gain.change, Estimate)
        assert gain.change.value == pytest.approx(float((results.after[place.teacher] - results.before).mean()))
