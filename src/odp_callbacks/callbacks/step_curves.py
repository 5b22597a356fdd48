"""The gain that the steps of a run were expected to bring, summed, beside the reward that was realised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class BatchGain:
    """What one process knows of a batch of rollouts.

    Attributes:
        gains: For each question the sum of its rollouts' gains; empty if there was no earlier student to compare with.
        reward: Sum of the rewards.
        rollouts: How many rollouts there are.
    """

    gains: tuple[float, ...]
    reward: float
    rollouts: int


@dataclass
class StepCurves:
    """Two curves that start at 0 with the first batch: the gain that was expected, and the change of the reward.

    Attributes:
        gain_sum: Sum of all gains.
        variance: Of ``gain_sum``; NaN once a batch had a single question, which has none.
        first_reward: Mean reward of the first batch; NaN before it.

    Examples:
        >>> curves = StepCurves()
        >>> curves.add([BatchGain((), 2.0, 4)], 0.95)
        {}
        >>> figures = curves.add([BatchGain((0.1, 0.3), 3.0, 4)], 0.95)
        >>> figures["gain"], figures["gain_sum"], figures["reward_change"]
        (0.1, 0.1, 0.25)
    """

    gain_sum: float = 0.0
    variance: float = 0.0
    first_reward: float = math.nan

    def add(self, batches: Sequence[BatchGain], confidence: float) -> dict[str, float]:
        """Add the batch of one step, in the parts that the processes have.

        Args:
            batches: The part of each process.
            confidence: Level of the sum's interval, in (0, 1).

        Returns:
            The figures of the step; none at the first batch.
        """
        rollouts = sum(batch.rollouts for batch in batches)
        if not rollouts:
            return {}
        reward = sum(batch.reward for batch in batches) / rollouts
        if math.isnan(self.first_reward):
            self.first_reward = reward
        gains = [gain for batch in batches for gain in batch.gains]
        if not gains:
            return {}
        gain, count = sum(gains) / rollouts, len(gains)
        mean = sum(gains) / count
        squares = sum((of_question - mean) ** 2 for of_question in gains)
        self.gain_sum += gain
        self.variance += squares * count / (count - 1) / rollouts**2 if count > 1 else math.nan
        figures = {
            "gain": gain,
            "gain_sum": self.gain_sum,
            "reward": reward,
            "reward_change": reward - self.first_reward,
        }
        if math.isfinite(self.variance):
            half_width = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(self.variance)
            figures |= {"gain_sum_low": self.gain_sum - half_width, "gain_sum_high": self.gain_sum + half_width}
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        restored = {field.name: float(state[field.name]) for field in fields(self)}
        for name, value in restored.items():
            setattr(self, name, value)
