"""The progress that a probe shows: in a log, and in the real bars of the trainers."""

import io
import sys
from contextlib import redirect_stderr
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, OnPolicyDistillation
from odp_callbacks.callbacks import progress
from odp_callbacks.callbacks.progress import Bar, ProbeProgress, RichTask, display_beside
from tests.helpers.models import tiny, word_tokenizer


class RecordingDisplay:
    """A display that keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int, str]] = []
        self.closed = False

    def show(self, stage: str, done: int, total: int, time_left: str) -> None:
        self.shown.append((stage, done, total, time_left))

    def time_left(self) -> dict[tuple[str, int], str]:
        return {(stage, done): time_left for stage, done, _, time_left in self.shown}

    def close(self) -> None:
        self.closed = True


def simulate_probe(display: Any, last_seconds: dict[str, float] | None = None) -> list[str]:
    """The log lines of a probe: 40 s of its gradients, 100 s of continuations, and 20 s of the other gradients."""
    log_lines: list[str] = []
    current_time = 0.0
    with ProbeProgress(display, log_lines.append, last_seconds, lambda: current_time) as report:
        for second in range(41):
            current_time = float(second)
            report("gradients", second, 60)
        for second in range(101):
            current_time = 40.0 + second
            report("continuations", second, 100)
        for second in range(21):
            current_time = 140.0 + second
            report("gradients", 40 + second, 60)
    return log_lines


def test_a_log_gets_a_line_every_half_minute_with_the_time_left() -> None:
    log_lines = simulate_probe(None)
    assert len(log_lines) == 5
    assert log_lines[0] == "odp-callbacks: probe, gradients 30 of 60, 30 s so far, gradients done in about 30 s"
    assert (
        log_lines[2] == "odp-callbacks: probe, continuations 50 of 100, 90 s so far, continuations done in about 50 s"
    )
    assert "gradients 50 of 60, 150 s so far, gradients done in about 10 s" in log_lines[4]


def test_from_the_second_probe_on_the_time_left_is_that_of_the_whole_probe() -> None:
    display = RecordingDisplay()
    assert not simulate_probe(display, {"gradients": 60.0, "continuations": 100.0, "verifier": 5.0})
    time_left = display.time_left()
    assert time_left["gradients", 10] == "about 155 s left", "50 of gradients, 100 of continuations, 5 of the verifier"
    assert time_left["continuations", 50] == "about 70 s left", "the wait for the verifier is included"
    assert time_left["gradients", 60] == "about 0 s left"
    assert display.closed
    of_slower_probe = RecordingDisplay()
    simulate_probe(of_slower_probe, {"gradients": 30.0, "continuations": 50.0})
    assert of_slower_probe.time_left()["continuations", 80] == "about 40 s left", "at its own speed"


def test_a_bar_shows_stage_and_time_left_and_disappears() -> None:
    screen = io.StringIO()
    with redirect_stderr(screen):
        assert not simulate_probe(Bar())
    output = screen.getvalue()
    assert "probe: continuations 50/100" in output
    assert "None" not in output
    assert "continuations done in about 50 s" in output
    assert not output.split("\r")[-1].strip()
    assert not output.split("\r")[-2].strip(), "the line is cleared"


def test_a_bar_that_cannot_be_drawn_does_not_fail_the_probe() -> None:
    class BrokenDisplay(RecordingDisplay):
        def show(self, stage: str, done: int, total: int, time_left: str) -> None:
            raise BrokenPipeError("gone")

    log_lines = simulate_probe(BrokenDisplay())
    assert log_lines[0] == "odp-callbacks: no progress bar of the probe: BrokenPipeError: gone"


class DisplayCollector(Callback):
    """Collects the display that a probe would have after each step."""

    def __init__(self) -> None:
        self.displays: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.displays.append(display_beside(trainer.progress_bar_callback))


def fit(bar: Any, monkeypatch: pytest.MonkeyPatch) -> DisplayCollector:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    seed_everything(0, verbose=False)
    rows = [{"prompt": "a b"}, {"prompt": "c"}]
    collector = DisplayCollector()
    callback = GradientAlignmentCallback(
        {"base": BaseTeacher()},
        rows,
        lambda prompts, completions, **_: [float("a" in completion.split()) for completion in completions],
        every_n_steps=1,
        max_overhead=None,
        questions_per_probe=2,
        rollouts_per_question=2,
        max_new_tokens=4,
        continuations=2,
        strict=True,
    )
    module = OnPolicyDistillation(tiny("llama").float().train(), word_tokenizer(), BaseTeacher(), max_new_tokens=4)
    Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar is not None,
        callbacks=[collector, callback] if bar is None else [bar, collector, callback],
    ).fit(module, DataLoader(rows, batch_size=2, collate_fn=list))
    return collector


def test_below_lightning_s_tqdm_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    collector = fit(TQDMProgressBar(), monkeypatch)
    output = capsys.readouterr()
    assert all(isinstance(display, Bar) and display.file is sys.stdout for display in collector.displays)
    assert "probe: rollouts" in output.out, "where Lightning's own bar is"
    assert "probe: gradients" in output.out
    assert " s left" in output.out
    assert "probe:" not in output.err
    first_line = next(line for line in output.out.split("\n") if "probe: rollouts" in line)
    assert "Epoch" not in first_line.split("probe: rollouts")[1].split("\r")[0], "a line of its own"
    assert "Epoch" in output.out.split("probe:")[-1], "Lightning's bar is drawn after it"


def test_in_lightning_s_live_display_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich

    screen = io.StringIO()
    monkeypatch.setattr(rich, "_console", None)
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 140})
    collector = fit(bar, monkeypatch)
    assert all(isinstance(display, RichTask) for display in collector.displays)
    output = screen.getvalue()
    assert "probe: rollouts" in output
    assert "s left" in output
    assert bar.progress is not None
    tasks = [task for task in bar.progress.tasks if task.description.startswith("probe")]
    assert len(tasks) == 3
    assert not any(task.visible for task in tasks)
    assert "probe" not in output.split("Epoch 2")[-1], "it disappears with the probe"
    assert bar.train_progress_bar.completed == bar.train_progress_bar.total


def test_lines_where_bars_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(None, monkeypatch).displays == [None] * 3
    assert fit(TQDMProgressBar(refresh_rate=0), monkeypatch).displays == [None] * 3
