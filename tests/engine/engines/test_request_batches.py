"""Rollouts and continuations by an engine: the same measurement as with the student's own model."""

import pytest
import torch

from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.engines import EngineError
from tests.helpers.clocks import clock_of
from tests.helpers.engines import OwnSampler
from tests.helpers.models import tiny
from tests.helpers.probes import ROWS, assert_same_measurements, measure, word_reward


@pytest.mark.parametrize("options", [{"max_new_tokens": 5}, {"budget": 200}], ids=["counted", "budget"])
def test_an_engine_that_draws_as_the_sampler_does_gives_the_same_report(student, options):
    engine = OwnSampler()
    of_engine = measure(student, {"base": "base"}, engine=engine, **options)
    assert_same_measurements(of_engine, measure(student, {"base": "base"}, **options))
    assert engine.calls[0] == len(ROWS)  # the check
    assert engine.calls[1] == len(of_engine.rollouts)
    assert of_engine.settings["engine"] == "own sampler"
    assert len(engine.synced) == engine.released == 1


def test_whole_waves_are_sent_at_once(student):
    engine = OwnSampler()
    report = measure(student, {"base": "base"}, engine=engine, continuations=3, max_new_tokens=4)
    assert sum(engine.calls[2:]) == report.continuations
    assert len(engine.calls) == 3


def test_each_probe_gets_the_adapter_of_the_moment(student, tokenizer):
    engine = OwnSampler()
    config = ProbeConfig(max_new_tokens=4, rollouts_per_question=2, budget=0, engine=engine)
    probe = Probe(student, tokenizer, word_reward, {"base": "base"}, config)
    for _ in range(2):
        probe.run(ROWS)
        name = next(name for name in engine.synced[-1] if "lora_B" in name)
        assert torch.equal(engine.synced[-1][name], student.state_dict()[name])
        student.state_dict()[name].add_(0.1)
    assert not torch.equal(engine.synced[0][name], engine.synced[1][name])
    assert engine.released == 2


def test_rollouts_that_exist_already_need_no_engine(student, tokenizer):
    engine = OwnSampler()
    config = ProbeConfig(max_new_tokens=4, budget=0, engine=engine)
    probe = Probe(student, tokenizer, word_reward, {"base": "base"}, config)
    probe.run(ROWS, responses=[[[6, 2], [7, 2]]] * len(ROWS))
    assert not engine.synced


def limited(student, monkeypatch, seconds):
    """A probe of so many seconds, of which each token of a pass takes a thousandth."""
    with clock_of(student, monkeypatch, seconds_per_token=0.001, seconds_per_pass=0.05) as clock:
        engine = OwnSampler(clock)
        options = {"max_new_tokens": 8, "batch_size": 8, "rollouts_per_question": 4}
        report = measure(student, {"base": "base"}, engine=engine, seconds=seconds, **options)
        assert clock.seconds <= seconds
    return engine, report


def test_at_a_deadline_rollouts_are_cut_at_a_common_length(student, monkeypatch):
    _, report = limited(student, monkeypatch, 10.0)
    limit = report.settings["response_limit"]
    assert 0 < limit < 8
    assert {len(rollout.pieces) for rollout in report.rollouts if rollout.truncated} == {limit}
    assert max(len(rollout.pieces) for rollout in report.rollouts) == limit


def test_at_a_deadline_continuations_are_dropped_by_whole_waves(student, monkeypatch):
    engine, report = limited(student, monkeypatch, 60.0)
    assert max(engine.calls[2:]) <= 8  # what is lost at the deadline is one batch
    assert report.left_out["continuations"] > 0
    assert report.continuations > 100


def test_an_engine_with_another_student_is_refused(student):
    class Stale(OwnSampler):
        def sync(self, student, step):
            super().sync(student, step)
            weights = {name: 0.0 * weight if "lora_B" in name else weight for name, weight in self.synced[-1].items()}
            self.student = tiny()
            self.student.load_state_dict(weights)

    engine = Stale()
    with pytest.raises(EngineError, match=r"does not sample from the student: .* differ by more than 0\.05 nats"):
        measure(student, {"base": "base"}, engine=engine)
    assert engine.released == 1
