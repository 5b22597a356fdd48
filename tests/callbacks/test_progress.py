"""What a probe says while it works: in a log, and in the real bars of the trainers."""

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


class Screen:
    """A display that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, str]] = []
        self.closed = False

    def show(self, stage: str, done: int, total: int, left: str) -> None:
        self.seen.append((stage, done, total, left))

    def close(self) -> None:
        self.closed = True


def told(display: Any, last: dict[str, float] | None = None) -> list[str]:
    """Of a probe with 100 seconds of continuations between two parts of its gradients: 40 and then 20 seconds."""
    now, lines = [0.0], []
    with ProbeProgress(display, lines.append, last, lambda: now[0]) as report:
        for second in range(41):
            now[0] = float(second)
            report("gradients", second, 60)
        for second in range(101):
            now[0] = 40.0 + second
            report("continuations", second, 100)
        for second in range(21):
            now[0] = 140.0 + second
            report("gradients", 40 + second, 60)
    return lines


def test_a_log_gets_a_line_every_half_minute_with_the_time_left() -> None:
    lines = told(None)
    assert len(lines) == 5
    assert lines[0] == "odp-callbacks: probe, gradients 30 of 60, 30 s so far, gradients done in about 30 s"
    assert lines[2] == "odp-callbacks: probe, continuations 50 of 100, 90 s so far, continuations done in about 50 s"
    assert "gradients 50 of 60, 150 s so far, gradients done in about 10 s" in lines[4]


def test_from_the_second_probe_on_the_time_left_is_that_of_the_whole_probe() -> None:
    screen = Screen()
    assert not told(screen, {"gradients": 60.0, "continuations": 100.0, "verifier": 5.0})
    left = {(stage, done): said for stage, done, _, said in screen.seen}
    assert left["gradients", 10] == "about 155 s left", "50 of gradients, 100 of continuations, 5 of the verifier"
    assert left["continuations", 50] == "about 70 s left", "what the verifier keeps waiting is in it"
    assert left["gradients", 60] == "about 0 s left"
    assert screen.closed
    slower = Screen()
    told(slower, {"gradients": 30.0, "continuations": 50.0})
    assert {(s, d): said for s, d, _, said in slower.seen}["continuations", 80] == "about 40 s left", "as fast as it is"


def test_a_bar_shows_stage_and_time_left_and_goes() -> None:
    screen = io.StringIO()
    with redirect_stderr(screen):
        assert not told(Bar())
    said = screen.getvalue()
    assert "probe: continuations 50/100" in said
    assert "None" not in said
    assert "continuations done in about 50 s" in said
    assert not said.split("\r")[-1].strip()
    assert not said.split("\r")[-2].strip(), "the line is cleared"


def test_a_bar_that_cannot_be_drawn_costs_nothing_else() -> None:
    class Broken(Screen):
        def show(self, stage: str, done: int, total: int, left: str) -> None:
            raise BrokenPipeError("gone")

    lines = told(Broken())
    assert lines[0] == "odp-callbacks: no progress bar of the probe: BrokenPipeError: gone"


class Watch(Callback):
    """Which display a probe has, as the trainer runs."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(display_beside(trainer.progress_bar_callback))


def fit(bar: Any, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    seed_everything(0, verbose=False)
    rows = [{"prompt": "a b"}, {"prompt": "c"}]
    watch = Watch()
    probe = GradientAlignmentCallback(
        {"base": BaseTeacher()},
        rows,
        lambda prompts, completions, **_: [float("a" in c.split()) for c in completions],
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
        callbacks=[watch, probe] if bar is None else [bar, watch, probe],
    ).fit(module, DataLoader(rows, batch_size=2, collate_fn=list))
    return watch


def test_below_lightning_s_tqdm_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watch = fit(TQDMProgressBar(), monkeypatch)
    said = capsys.readouterr()
    assert all(isinstance(display, Bar) and display.file is sys.stdout for display in watch.found)
    assert "probe: rollouts" in said.out, "where Lightning's own bar is"
    assert "probe: gradients" in said.out
    assert " s left" in said.out
    assert "probe:" not in said.err
    rows = said.out.split("\n")
    first = next(row for row in rows if "probe: rollouts" in row)
    assert "Epoch" not in first.split("probe: rollouts")[1].split("\r")[0], "a line of its own"
    assert "Epoch" in said.out.split("probe:")[-1], "Lightning's bar is drawn after it"


def test_in_lightning_s_live_display_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich

    screen = io.StringIO()
    monkeypatch.setattr(rich, "_console", None)
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 140})
    watch = fit(bar, monkeypatch)
    assert all(isinstance(display, RichTask) for display in watch.found)
    said = screen.getvalue()
    assert "probe: rollouts" in said
    assert "s left" in said
    assert bar.progress is not None
    tasks = [task for task in bar.progress.tasks if task.description.startswith("probe")]
    assert len(tasks) == 3
    assert not any(task.visible for task in tasks)
    assert "probe" not in said.split("Epoch 2")[-1], "it goes with the probe"
    assert bar.train_progress_bar.completed == bar.train_progress_bar.total


def test_lines_where_bars_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(None, monkeypatch).found == [None] * 3
    assert fit(TQDMProgressBar(refresh_rate=0), monkeypatch).found == [None] * 3
