"""The first probe of a training is limited by the planned run, and says so where that cuts something."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from odp_callbacks.callbacks import time_budget
from odp_callbacks.callbacks.planned_steps import planned_steps
from tests.helpers.clocks import clock_of
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.monitors import RecordingTrainer, make_monitor

SECONDS = 12.0


@pytest.mark.parametrize("seconds_per_token", [1e-6, 0.01])
def test_the_first_probe_keeps_to_what_the_planned_run_allows(seconds_per_token, monkeypatch):
    monkeypatch.setattr(time_budget, "FIRST_SECONDS", SECONDS)
    monkeypatch.setattr(time_budget, "ASSUMED_RUN_SECONDS", 1.0)
    monitor = make_monitor(max_overhead=0.1, at_start=True, max_new_tokens=200, budget=0)
    said = []
    context = replace(RecordingTrainer().context(0), inform=said.append)
    student = tiny(seed=7, max_position_embeddings=512)
    with clock_of(student, monkeypatch, seconds_per_token) as clock:
        monitor.prepare(student, word_tokenizer())
        monitor.on_train_start(context)
    assert monitor.probe_count == 1
    assert clock.seconds <= 1.1 * SECONDS
    cuts = [message for message in said if "for lack of time" in message]
    assert len(cuts) == (seconds_per_token == 0.01)
    for message in cuts:
        assert "the probe at step 0: for lack of time, responses were cut at" in message
        assert "It could take 12 s, the least that a first probe gets, as 25% of what `max_overhead` = 0.1" in message


@pytest.mark.parametrize(
    ("estimated", "max_steps", "expected"),
    [(120, -1, 120), (float("inf"), -1, None), (-1, -1, None), (50, 50, 50)],
)
def test_the_planned_steps_are_what_lightning_knows(estimated, max_steps, expected):
    trainer = SimpleNamespace(train_dataloader=[1], estimated_stepping_batches=estimated, max_steps=max_steps)
    assert planned_steps(trainer) == expected


def test_planned_steps_load_nothing_and_raise_nothing():
    class Trainer:
        train_dataloader = None
        max_steps = 70

        @property
        def estimated_stepping_batches(self):
            raise RuntimeError("different accumulations at different epochs")

    assert planned_steps(Trainer()) == 70
    trainer = Trainer()
    trainer.train_dataloader = [1]
    assert planned_steps(trainer) == 70
