"""A monitor without any trainer, and the gate that learns from its probes."""

import math
from typing import Any

import pytest

from tests.helpers.models import word_tokenizer
from tests.helpers.monitors import RecordingTrainer, make_monitor, run_steps
from tests.helpers.training import (
    TEACHERS,
    LearningGate,
    contains_answer_reward,
    make_callback,
    make_loader,
    make_module,
    make_trainer,
)


def test_it_needs_no_trainer() -> None:
    trainer = run_steps(make_monitor(at_start=True), 5)
    assert [step for step, _ in trainer.logged] == [0, 2, 4]
    assert all("odp/alignment/answer/all" in metrics for _, metrics in trainer.logged)


def test_a_gate_observes_every_report_and_is_restored_with_the_state() -> None:
    gate = LearningGate()
    monitor = make_monitor(gate=gate)
    run_steps(monitor, 4, LearningGate(broken=True))  # the given gate is preferred to the training's
    assert gate.count == 2
    assert gate.reports[-1] is monitor.last_report
    restored = LearningGate()
    make_monitor(gate=restored).load_state_dict(monitor.state_dict())
    assert restored.count == 2


def test_a_gate_found_after_the_state_was_loaded_is_restored_once() -> None:
    saved_gate = LearningGate()
    saved_gate.count = 7
    saved = make_monitor(gate=saved_gate)
    monitor, gate = make_monitor(), LearningGate()
    monitor.load_state_dict(saved.state_dict())
    run_steps(monitor, 2, gate)
    assert gate.count == 8
    monitor.prepare(monitor.probe.student, word_tokenizer(), gate)  # type: ignore[union-attr]
    assert gate.count == 8


def test_a_failing_gate_causes_one_warning_and_the_probe_counts() -> None:
    monitor = make_monitor(gate=LearningGate(broken=True), strict=False)
    trainer = run_steps(monitor, 4)
    assert trainer.warnings == ["odp-callbacks: `gate` failed to learn from a probe: RuntimeError: no"]
    assert monitor.last_report is not None
    with pytest.raises(RuntimeError, match="no"):
        run_steps(make_monitor(gate=LearningGate(broken=True)), 2)


def test_a_gate_learns_nothing_from_a_failed_probe() -> None:
    def broken_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if any(completions):
            raise RuntimeError("verifier")
        return [0.0] * len(completions)

    gate = LearningGate()
    monitor = make_monitor(broken_reward, gate, every_n_steps=1, strict=False)
    (warning,) = run_steps(monitor, 1).warnings
    assert "RuntimeError: verifier" in warning
    assert gate.count == 0
    assert monitor.last_report is None


def test_a_failed_probe_keeps_the_last_report() -> None:
    verifier_works = True

    def unreliable_reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        if not verifier_works:
            raise RuntimeError("verifier")
        return contains_answer_reward(prompts, completions, answer)

    monitor = make_monitor(unreliable_reward, strict=False, every_n_steps=1)
    run_steps(monitor, 1)
    last_report = monitor.last_report
    assert last_report is not None
    verifier_works = False
    trainer = RecordingTrainer()
    monitor.on_batch_end(trainer.context(2))
    assert "RuntimeError: verifier" in trainer.warnings[0]
    assert monitor.probe_count == 2
    assert monitor.last_report is last_report


def test_lightning_uses_the_module_s_gate() -> None:
    module, gate = make_module(), LearningGate()
    module.gate = gate  # type: ignore[assignment]
    with pytest.raises(ValueError, match="distils from 'self'; give the teachers the same names"):
        make_callback().setup(make_trainer(), module, "fit")
    callback = make_callback(teachers={"self": TEACHERS["answer"]})
    callback.setup(make_trainer(), module, "fit")
    assert callback.monitor.gate_learning.gate is gate
    given_gate = LearningGate()
    callback = make_callback(gate=given_gate)
    make_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert given_gate.count == 1


@pytest.mark.parametrize(
    ("options", "figures"),
    [({"budget": 0}, {"update_gain"}), ({"update": False}, {"alignment"}), ({}, {"update_gain", "alignment"})],
    ids=["update", "nodes", "both"],
)
def test_a_failed_probe_logs_nan_for_what_it_would_have_measured(options: dict[str, Any], figures: set[str]) -> None:
    def failing(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        if any(completions):
            raise RuntimeError("no rewards today")
        return [0.0] * len(completions)

    trainer = run_steps(make_monitor(failing, strict=False, **options), 2)
    ((_, metrics),) = [entry for entry in trainer.logged if "odp/probe/left_out" in entry[1]]
    missing = [name for name in metrics if "/probe/" not in name]
    assert all(math.isnan(metrics[name]) for name in missing)
    assert {name.split("/")[1] for name in missing} == figures
