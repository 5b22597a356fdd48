"""Numbers that the user leaves open follow from the last probe; those that are set are kept."""

import pytest

from odp_callbacks.analysis.probe_plan import plan_probe
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.probe_design import design_probe
from tests.helpers.clocks import clock_of
from tests.helpers.models import tiny
from tests.helpers.probes import make_probe

ROWS = [{"prompt": " ".join(letters), "answer": "a"} for letters in ("ab", "cd", "ef", "fa", "bd", "ce", "da", "eb")]
OPTIONS = {"max_new_tokens": 24, "update": False, "step_alignment": False}


def parity_reward(prompts, completions, **columns):
    return [float(len(text) % 4 < 2) for text in completions]


@pytest.fixture(scope="module")
def earlier():
    """A student with the report of a first probe, at 10 ms a token."""
    student, patch = tiny(seed=7, max_position_embeddings=512), pytest.MonkeyPatch()
    with clock_of(student, patch, seconds_per_token=0.01):
        report = make_probe(student, parity_reward, continuations=2, **OPTIONS).run(ROWS)
    patch.undo()
    assert report.settings["rollouts_per_question"] == 4
    assert report.settings["nodes"] == "balanced"
    return student, report


def test_without_a_limit_or_an_earlier_probe_the_numbers_are_the_usual_ones(earlier):
    for seconds, report in ((None, earlier[1]), (60.0, None)):
        design = design_probe(ProbeConfig(**OPTIONS, seconds=seconds), seconds, 8, report)
        assert (design.config.rollouts_per_question, design.config.nodes, design.questions) == (4, "balanced", 8)


@pytest.mark.parametrize(
    ("given", "fixed"),
    [({}, {}), ({"rollouts_per_question": 3}, {"rollouts": 3}), ({"nodes": 2}, {"nodes": 2})],
)
def test_open_numbers_are_those_of_the_plan(earlier, given, fixed):
    report = earlier[1]
    design = design_probe(ProbeConfig(**OPTIONS, seconds=120.0, **given), 120.0, 8, report)
    plan = plan_probe(report, 120.0, 8, fixed).design
    assert (design.config.rollouts_per_question, design.config.nodes) == (plan.rollouts, plan.nodes)
    assert design.questions == plan.questions


def test_equal_continuations_are_a_number_that_the_plan_keeps(earlier):
    report = earlier[1]
    design = design_probe(ProbeConfig(**OPTIONS, continuations=5), 120.0, 8, report)
    plan = plan_probe(report, 120.0, 8, {"continuations": 5}).design
    assert (design.config.rollouts_per_question, design.config.nodes) == (plan.rollouts, plan.nodes)


def test_a_probe_plans_by_its_own_last_report_and_ends_in_time(earlier, monkeypatch):
    student, _ = earlier
    probe = make_probe(student, parity_reward, seconds=60.0, **OPTIONS)
    with clock_of(student, monkeypatch, seconds_per_token=0.01) as clock:
        first = probe.run(ROWS, seed=0)
        start = clock.seconds
        second = probe.run(ROWS, seed=1)
        taken = clock.seconds - start
    plan = plan_probe(first, 60.0, len(ROWS))
    assert first.settings["nodes"] == "balanced"
    assert second.settings["nodes"] == plan.design.nodes
    assert second.settings["rollouts_per_question"] == plan.design.rollouts
    assert len({rollout.question for rollout in second.rollouts}) <= plan.design.questions
    assert second.left_out.get("unsampled_questions", 0) >= len(ROWS) - plan.design.questions
    assert taken <= 66.0
    assert second.nodes
