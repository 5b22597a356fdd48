"""Rewards of the training's rollouts, each asked for once although two measurements need them."""

from collections.abc import Sequence
from dataclasses import replace

from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.training_rollouts import TrainingRollout


class RewardMemory:
    """Scores rollouts that the training did not score, and remembers the rewards until :meth:`clear` is called."""

    def __init__(self) -> None:
        # The rollouts are kept, so that no other object gets the identity of one of them.
        self._scored: dict[int, tuple[TrainingRollout, float]] = {}

    def scored(self, probe: Probe, rollouts: Sequence[TrainingRollout]) -> list[TrainingRollout]:
        """Return the rollouts, each with its reward; NaN where the reward function gave None.

        Args:
            probe: The student with its verifier.
            rollouts: With at least one token each.
        """
        missing = [rollout for rollout in rollouts if rollout.reward is None and id(rollout) not in self._scored]
        if missing:
            for rollout, found in zip(missing, probe.given_rollouts(missing), strict=True):
                self._scored[id(rollout)] = rollout, found.reward
        return [
            replace(rollout, reward=self._scored[id(rollout)][1]) if rollout.reward is None else rollout
            for rollout in rollouts
        ]

    def clear(self) -> None:
        """Forget all rewards: a step has ended."""
        self._scored = {}
