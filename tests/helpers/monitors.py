"""A monitor without any trainer."""

from contextlib import nullcontext
from typing import Any

from odp_callbacks.callbacks.monitor import Monitor
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.callbacks.schedule import resolve_options
from odp_callbacks.callbacks.trainer_context import TrainerContext
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import ROWS, TEACHERS, contains_answer_reward


class RecordingTrainer:
    """Takes the place of a trainer, and keeps what the monitor logs and warns about."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.warnings: list[str] = []

    def context(self, step: int) -> TrainerContext:
        return TrainerContext(
            step=step,
            is_global_zero=True,
            processes=Processes(),
            precision_context=nullcontext,
            progress=lambda last_seconds: nullcontext(lambda stage, done, total: None),
            log=lambda metrics, report: self.logged.append((step, metrics)),
            warn=self.warnings.append,
            inform=lambda message: None,
        )


def make_monitor(reward: Any = contains_answer_reward, gate: object | None = None, **changes: Any) -> Monitor:
    schedule_options = {"every_n_steps": 2, "max_overhead": None, "questions_per_probe": 2, "strict": True}
    probe_options = {"rollouts_per_question": 2, "max_new_tokens": 4, "continuations": 2}
    schedule, config = resolve_options(None, schedule_options | probe_options | changes)
    return Monitor(dict(TEACHERS), ROWS, reward, schedule=schedule, config=config, gate=gate)


def run_steps(monitor: Monitor, steps: int, training_gate: object = None) -> RecordingTrainer:
    trainer = RecordingTrainer()
    monitor.prepare(tiny("llama").float().train(), word_tokenizer(), training_gate)
    monitor.on_train_start(trainer.context(0))
    for step in range(1, steps + 1):
        monitor.on_batch_end(trainer.context(step))
        monitor.on_batch_end(trainer.context(step))  # a batch without an optimizer step
    monitor.on_train_end(trainer.context(steps))
    return trainer


def warning_of_failed_probes(monitor: Monitor) -> str:
    """Run two steps whose probes fail alike, and return what is said of both, once."""
    trainer = run_steps(monitor, 2)
    assert monitor.probe_count == 2
    (warning,) = trainer.warnings
    return warning
