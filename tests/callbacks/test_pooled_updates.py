"""Update gain pooled over the probes of a training."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from odp_callbacks.analysis.confidence_sequences import ConfidenceSequence
from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.callbacks.pooled_updates import PooledUpdates, gain_estimators
from odp_callbacks.callbacks.schedule import ProbeSchedule
from odp_callbacks.records import ProbeReport
from tests.helpers.monitors import make_monitor, run_steps
from tests.helpers.records import MakeReport
from tests.helpers.training import make_callback, make_loader, make_module, make_trainer
from tests.helpers.updates import update_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
]


def every_response_differs(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that two different responses hardly share, so that every question tells something."""
    return [crc32(completion.encode()) / 2**32 for completion in completions]


def gains_of(correct: bool) -> tuple[float, float]:
    return (0.3, 0.6) if correct else (0.7, 0.4)


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    """Of six questions, without an update."""
    return make_report(lambda correct, depth: (0.0, 0.0))


def test_every_figure_of_the_probes_is_pooled_under_its_own_name(report: ProbeReport) -> None:
    reports = [update_only(report, gains_of, noise=0.2, seed=seed) for seed in range(3)]
    pooled = PooledUpdates(decay=0.8, confidence=0.95)
    for of_probe in reports:
        metrics = pooled.observe(of_probe)
    values: dict[str, list[float]] = {}
    for of_probe in reports:
        for summary in summarise(of_probe):
            values.setdefault(f"{summary.teacher}/{summary.split}", []).append(summary.figures["update_gain"].value)
    for name, of_probes in values.items():
        expected = sum(value * 0.8**age for age, value in enumerate(reversed(of_probes))) / (1 + 0.8 + 0.64)
        assert metrics[f"odp/pooled/update_gain/{name}"] == pytest.approx(expected)
        low, high = (metrics[f"odp/pooled/update_gain_{end}/{name}"] for end in ("low", "high"))
        assert low < expected < high
    first, second = reports[0].teachers
    both = [metrics[f"odp/pooled/update_gain/{name}"] for name in (f"{first}/all", f"{second}/all")]
    assert metrics[f"odp/pooled/update_gain/{first} - {second}/all"] == pytest.approx(both[0] - both[1])


def test_a_look_counts_with_the_variance_and_the_degrees_of_freedom_of_its_estimator(report: ProbeReport) -> None:
    measured = update_only(report, gains_of, noise=0.2)
    metrics = PooledUpdates(1.0, 0.9).observe(measured)
    for name, estimator in gain_estimators(measured):
        sequence = ConfidenceSequence()
        sequence.add(estimator.value, estimator.variance, estimator.degrees_of_freedom)
        assert metrics[f"odp/pooled/update_gain_low/{name}"] == sequence.interval(0.9)[1]


def test_a_probe_without_an_update_logs_nothing_and_one_with_equal_rewards_counts_as_zero(report: ProbeReport) -> None:
    pooled = PooledUpdates(1.0, 0.95)
    assert pooled.observe(report) == {}
    measured = update_only(report, gains_of, noise=0.2)
    before = pooled.observe(measured)
    (update,) = measured.updates
    equal_rewards = replace(update.gram, success=np.zeros((6, 6)), cross=np.zeros_like(update.gram.cross))
    after = pooled.observe(replace(measured, updates=(replace(update, gram=equal_rewards),)))
    for name in (f"odp/pooled/update_gain/{report.teachers[0]}/{split}" for split in ("all", "correct")):
        assert after[name] == pytest.approx(before[name] / 2)


def test_a_new_training_starts_anew_and_every_probe_is_one_look() -> None:
    monitor = make_monitor(every_response_differs, questions_per_probe=4, budget=0)
    trainer = run_steps(monitor, 4)
    names = {name for _, metrics in trainer.logged for name in metrics if name.startswith("odp/pooled/")}
    assert "odp/pooled/update_gain/answer/all" in names
    assert monitor.pooled_updates.sequences["answer/all"].looks == 2
    run_steps(monitor, 2)
    assert monitor.pooled_updates.sequences["answer/all"].looks == 1


OPTIONS: dict[str, Any] = {
    "reward": every_response_differs,
    "questions_per_probe": 4,
    "every_n_steps": 1,
    "budget": 0,
}


def test_a_lightning_run_that_is_resumed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    callback = make_callback(**OPTIONS)
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(make_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert callback.monitor.pooled_updates.sequences["answer/all"].looks == 2
    resumed = make_callback(**OPTIONS)
    resumed_trainer = make_trainer(resumed, max_steps=3, max_epochs=-1)
    resumed_trainer.fit(make_module(), make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert resumed.monitor.pooled_updates.sequences["answer/all"].looks == 3


def test_a_transformers_run_that_is_resumed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    from tests.helpers.trainers import add_callback, plain_trainer

    trainer = plain_trainer(tmp_path / "whole", save_strategy="steps", save_steps=2, max_steps=2)
    callback = add_callback(trainer, **OPTIONS)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "odp/pooled/update_gain/answer/all" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    resumed = plain_trainer(tmp_path / "resumed", max_steps=3)
    second = add_callback(resumed, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert callback.monitor.pooled_updates.sequences["answer/all"].looks == 2
    assert second.monitor.pooled_updates.sequences["answer/all"].looks == 3


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                "base/all": {
                    "decay": 0.5,
                    "looks": 1,
                    "weight": 1,
                    "total": 1,
                    "variance": 1,
                    "spread": 1,
                    "informative": 1,
                }
            },
            "pooled_decay",
        ),
        ({"base/all": {"decay": 0.9, "looks": 1}}, "`weight` must be a number"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state: Any, message: str) -> None:
    pooled = PooledUpdates(0.9, 0.95)
    with pytest.raises(ValueError, match=message):
        pooled.load_state_dict(state)
    assert pooled.state_dict() == {}


def test_the_decay_is_checked_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"`pooled_decay` must lie in \(0, 1\], where 1 forgets nothing, but 0"):
        ProbeSchedule(pooled_decay=0)
