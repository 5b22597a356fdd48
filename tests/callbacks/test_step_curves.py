"""The curves of expected gain and realised reward, and the interval of the sum."""

import math

import numpy as np
import pytest

from odp_callbacks.callbacks.step_curves import BatchGain, StepCurves


def test_both_curves_start_at_0_with_the_first_batch() -> None:
    curves = StepCurves()
    assert curves.add([BatchGain((), 1.0, 4)], 0.95) == {}
    first = curves.add([BatchGain((0.2, 0.4), 2.0, 4)], 0.95)
    second = curves.add([BatchGain((0.1, -0.1), 3.0, 4)], 0.95)
    assert first["gain"] == pytest.approx(0.15)
    assert first["reward"] == 0.5
    assert first["reward_change"] == 0.25
    assert second["gain"] == 0
    assert second["gain_sum"] == pytest.approx(0.15)
    assert second["reward_change"] == 0.5


def test_the_parts_of_processes_count_by_their_rollouts() -> None:
    parts, whole = StepCurves(), StepCurves()
    for curves, batches in ((parts, [BatchGain((0.2,), 1.0, 2), BatchGain((0.6, 0.1), 1.0, 6)]),):
        found = curves.add(batches, 0.95)
    assert found == whole.add([BatchGain((0.2, 0.6, 0.1), 2.0, 8)], 0.95)
    assert found["gain"] == pytest.approx(0.9 / 8)


def test_a_batch_without_rollouts_changes_nothing() -> None:
    curves = StepCurves(gain_sum=1.0, first_reward=0.5)
    assert curves.add([], 0.95) == {}
    assert (curves.gain_sum, curves.first_reward) == (1.0, 0.5)


def test_a_single_question_has_no_interval() -> None:
    curves = StepCurves(first_reward=0.5)
    assert not any("low" in name for name in curves.add([BatchGain((0.1,), 1.0, 4)], 0.95))
    later = curves.add([BatchGain((0.1, 0.2), 1.0, 4)], 0.95)
    assert later["gain_sum"] == pytest.approx(0.1)
    assert not any(math.isnan(value) for value in later.values())


def test_the_interval_of_the_sum_covers() -> None:
    """2,000 runs of 5 steps; each question's gain is drawn with the mean 0.01."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        curves = StepCurves(first_reward=0.0)
        for _ in range(5):
            gains = generator.normal(0.04, 0.2, size=16)  # of questions with 4 rollouts
            figures = curves.add([BatchGain(tuple(gains), 0.0, 64)], 0.9)
        covered += figures["gain_sum_low"] <= 0.05 <= figures["gain_sum_high"]
    assert covered / 2000 == pytest.approx(0.9, abs=0.03)


def test_a_checkpoint_keeps_them() -> None:
    curves, restored = StepCurves(1.0, 2.0, 0.5), StepCurves()
    restored.load_state_dict(curves.state_dict())
    assert restored == curves
    with pytest.raises(KeyError):
        restored.load_state_dict({"gain_sum": 3.0})
    assert restored == curves
