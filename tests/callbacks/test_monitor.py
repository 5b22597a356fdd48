"""A monitor without any trainer, and the gate that learns from its probes."""

from contextlib import nullcontext
from typing import Any

import pytest

from odp_callbacks.callbacks.monitor import Host, Monitor
from odp_callbacks.callbacks.processes import Processes
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import ROWS, TEACHERS, Gate, loader, make_callback, make_module, make_trainer, starts_right


class Log:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.warned: list[str] = []

    def host(self, step: int) -> Host:
        return Host(
            step=step,
            first=True,
            processes=Processes(),
            context=nullcontext,
            progress=lambda last: nullcontext(lambda stage, done, total: None),
            log=lambda metrics, report: self.logged.append((step, metrics)),
            warn=self.warned.append,
            note=lambda message: None,
        )


def make_monitor(**changes: Any) -> Monitor:
    options: dict[str, Any] = {"every_n_steps": 2, "max_overhead": None, "questions_per_probe": 2, "strict": True}
    probe = {"rollouts_per_question": 2, "max_new_tokens": 4, "continuations": 2}
    return Monitor(dict(TEACHERS), ROWS, starts_right, **(options | probe | changes))


def watch(monitor: Monitor, steps: int, gate: object = None) -> Log:
    log = Log()
    monitor.prepare(tiny("llama").float().train(), word_tokenizer(), gate)
    monitor.start(log.host(0))
    for step in range(1, steps + 1):
        monitor.advance(log.host(step))
        monitor.advance(log.host(step))  # a batch without an optimizer step
    monitor.stop()
    return log


def test_it_needs_no_trainer() -> None:
    log = watch(make_monitor(at_start=True), 5)
    assert [step for step, _ in log.logged] == [0, 2, 4]
    assert all("odp/alignment/answer/all" in metrics for _, metrics in log.logged)


def test_a_gate_sees_every_report_and_comes_back_with_the_state() -> None:
    gate = Gate()
    monitor = make_monitor(gate=gate)
    watch(monitor, 4, Gate(broken=True))  # the given one is preferred to the one found
    assert gate.count == 2
    assert gate.seen[-1] is monitor.last_report
    again = Gate()
    make_monitor(gate=again).load_state_dict(monitor.state_dict())
    assert again.count == 2


def test_a_gate_found_after_the_state_was_read_gets_its_part_once() -> None:
    saved = make_monitor(gate=Gate())
    saved.gate.count = 7  # type: ignore[attr-defined]
    monitor, gate = make_monitor(), Gate()
    monitor.load_state_dict(saved.state_dict())
    watch(monitor, 2, gate)
    assert gate.count == 8
    monitor.prepare(monitor.probe.student, word_tokenizer(), gate)  # type: ignore[union-attr]
    assert gate.count == 8


def test_a_gate_that_fails_is_said_once_and_the_probe_counts() -> None:
    monitor = make_monitor(gate=Gate(broken=True), strict=False)
    log = watch(monitor, 4)
    assert log.warned == ["odp-callbacks: `gate` did not learn from a probe: RuntimeError: no"]
    assert monitor.last_report is not None
    with pytest.raises(RuntimeError, match="no"):
        watch(make_monitor(gate=Gate(broken=True)), 2)


def test_a_probe_that_fails_teaches_nothing() -> None:
    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if any(completions):
            raise RuntimeError("verifier")
        return [0.0] * len(completions)

    gate = Gate()
    monitor = Monitor(dict(TEACHERS), ROWS, broken, every_n_steps=1, gate=gate, max_new_tokens=4)
    (warned,) = watch(monitor, 1).warned
    assert "RuntimeError: verifier" in warned
    assert gate.count == 0


def test_lightning_takes_the_modules_gate() -> None:
    module, gate = make_module(), Gate()
    module.gate = gate  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'self' teaches; name them alike"):
        make_callback().setup(make_trainer(), module, "fit")
    callback = make_callback(teachers={"self": TEACHERS["answer"]})
    callback.setup(make_trainer(), module, "fit")
    assert callback.monitor.gate is gate
    given = Gate()
    callback = make_callback(gate=given)
    make_trainer(callback, max_steps=2).fit(make_module(), loader())
    assert given.count == 1
