"""Probes with a limit of their seconds end in time, in every mode, and say what they left out."""

import logging
import math

import pytest

from odp_callbacks.analysis.time_shortage import response_limit, time_shortage
from odp_callbacks.engine.teachers import ServedTeacher
from odp_callbacks.engine.teachers.served import SCORED_TOKENS
from tests.helpers.clocks import clock_of
from tests.helpers.models import tiny, tiny_base
from tests.helpers.probes import make_probe
from tests.helpers.served import ModelClient

ROWS = [{"prompt": " ".join(letters), "answer": "a"} for letters in ("ab", "cd", "ef", "fa", "bd", "ce", "da", "eb")]
LONG = {"max_new_tokens": 200, "rollouts_per_question": 2, "continuations": 2}


def parity_reward(prompts, completions, **columns):
    return [float(len(text) % 4 < 2) for text in completions]


@pytest.fixture(scope="module")
def student():
    """A student whose responses have 3 to 200 tokens, where the limit cuts them."""
    return tiny(seed=7, max_position_embeddings=512)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({"budget": 0}, id="update alone"),
        pytest.param({"budget": 0, "influence": False, "rules": None}, id="gain alone"),
        pytest.param({}, id="nodes by time"),
        pytest.param({"budget": 400}, id="nodes by budget"),
        pytest.param({"update": False}, id="nodes alone"),
        pytest.param({"nodes": "every"}, id="every token"),
    ],
)
@pytest.mark.parametrize("seconds", [20.0, 100.0])
def test_a_probe_ends_in_time_with_figures(student, mode, seconds, monkeypatch):
    """At 10 ms a token, all of it would take hundreds of seconds."""
    probe = make_probe(student, parity_reward, seconds=seconds, **{**LONG, **mode})
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock:
        report = probe.run(ROWS)
    assert clock.seconds <= 1.1 * seconds
    assert clock.seconds >= 0.5 * seconds
    assert report.updates or report.nodes
    assert "for lack of time" in time_shortage(report) or seconds == 100.0


def test_all_responses_are_cut_at_one_length_and_continuations_too(student, monkeypatch):
    with clock_of(student, monkeypatch, seconds_per_token=0.01):
        report = make_probe(student, parity_reward, seconds=60.0, **LONG).run(ROWS)
    limit = response_limit(report)
    assert {len(rollout.pieces) for rollout in report.rollouts if rollout.truncated} == {limit}
    assert max(len(rollout.pieces) for rollout in report.rollouts) == limit < LONG["max_new_tokens"]
    assert report.settings["max_new_tokens"] == LONG["max_new_tokens"]
    assert all(node.depth < limit for node in report.nodes)


@pytest.mark.parametrize("update", [True, False])
def test_the_limit_of_one_run_holds_with_equal_continuations(student, update, monkeypatch):
    probe = make_probe(student, parity_reward, update=update, **LONG)
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock:
        report = probe.run(ROWS, seconds=50.0)
    assert clock.seconds <= 55.0
    assert report.updates or report.nodes
    assert probe.config.seconds is None


def test_given_responses_leave_out_whole_questions(student, monkeypatch):
    responses = [[[6 + (row + place) % 5 for place in range(40)], [7 + row % 4] * 40] for row in range(len(ROWS))]
    probe = make_probe(student, parity_reward, seconds=8.0, budget=0, **LONG)
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock:
        report = probe.run(ROWS, responses=responses)
    measured = int(report.updates[0].gram.questions.sum())
    assert 3 <= measured < len(ROWS)
    assert report.left_out["questions_without_update"] == len(ROWS) - measured
    assert clock.seconds <= 8.8
    assert len(report.rollouts) == 2 * len(ROWS), "those that were left out are reported, too"


def test_a_time_that_is_too_short_for_one_question_is_said(student, monkeypatch, caplog):
    responses = [[[6] * 190, [7] * 190]] * len(ROWS)
    probe = make_probe(student, parity_reward, seconds=2.0, budget=0, **LONG)
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock, caplog.at_level(logging.WARNING):
        report = probe.run(ROWS, responses=responses)
    assert clock.seconds <= 2.2
    assert not report.updates
    assert f"update gain leaves out {len(ROWS)} questions" in caplog.text
    assert math.isnan(report.summary()[0].figures["predicted_gain"].value)


def test_with_enough_time_nothing_is_cut_and_the_figures_are_those_without_a_limit(student):
    options = {**LONG, "max_new_tokens": 6, "budget": 0}
    limited = make_probe(student, parity_reward, seconds=1000.0, **options).run(ROWS, seed=3)
    free = make_probe(student, parity_reward, **options).run(ROWS, seed=3)
    assert [one.text for one in limited.rollouts] == [one.text for one in free.rollouts]
    assert time_shortage(limited) == ""
    for teacher in range(2):
        ours, theirs = (report.summary()[teacher].figures["update_gain"].value for report in (limited, free))
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)


def test_a_second_probe_knows_what_the_first_one_measured(student, monkeypatch):
    probe = make_probe(student, parity_reward, budget=0, **LONG)
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock:
        probe.run(ROWS, seconds=30.0)
        before = clock.seconds
        report = probe.run(ROWS, seconds=30.0)
    assert 15.0 <= clock.seconds - before <= 33.0
    assert report.updates[0].gram.questions.sum() >= 3


def test_rules_and_influences_are_dropped_before_the_gain(student, monkeypatch):
    responses = [[[6 + (row + place) % 5 for place in range(20)], [7 + row % 4] * 20] for row in range(len(ROWS))]
    rules = {"first": lambda tokens: tokens.depth < 2}
    dropped = {}
    for seconds in (12.0, 60.0):
        probe = make_probe(student, parity_reward, seconds=seconds, budget=0, rules=rules, **LONG)
        with clock_of(student, monkeypatch, seconds_per_token=0.01):
            report = probe.run(ROWS, responses=responses)
        update = report.updates[0]
        dropped[seconds] = update.influence is None, update.rules is None, int(update.gram.questions.sum())
        assert report.left_out.get("updates_without_influence", 0) == (update.influence is None)
    assert dropped[60.0] == (False, False, len(ROWS))
    assert dropped[12.0][0]
    assert dropped[12.0][2] >= 3


@pytest.mark.parametrize("mode", [{"budget": 0}, {"update": False}, {}], ids=["update alone", "nodes alone", "both"])
def test_the_time_of_a_teachers_server_is_planned(student, mode, monkeypatch):
    """A server that takes ten times as long for a token as the student does for a pass over it."""
    with clock_of(student, monkeypatch, seconds_per_token=0.002) as clock:

        class SlowClient(ModelClient):
            def get_sequence_logprobs(self, sequences, *arguments, **options):
                clock.seconds += 0.02 * sum(map(len, sequences))
                return super().get_sequence_logprobs(sequences, *arguments, **options)

        teacher = ServedTeacher(SlowClient(tiny_base(seed=11, max_position_embeddings=512)), top_k=6)
        teacher.clock = clock
        report = make_probe(student, parity_reward, {"served": teacher}, seconds=20.0, **{**LONG, **mode}).run(ROWS)
        assert teacher.costs.predict(SCORED_TOKENS, 1.0) == pytest.approx(0.02)
    assert clock.seconds <= 1.1 * 20.0
    assert report.nodes if not mode.get("update", True) else report.updates
    assert (
        len({rollout.question for rollout in report.rollouts}) - report.left_out.get("questions_without_update", 0) >= 3
    )
