"""Warns if the reward function gives the same reward to everything, because no figure is defined then."""

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.records import ProbeReport


def warn_of_constant_reward(context: TrainerContext, failures: FailureHandler, report: ProbeReport) -> None:
    """Warn once if every rollout and every continuation of a probe got the same reward.

    Args:
        context: The trainer, which issues the warning.
        failures: Remembers whether the warning was issued before.
        report: The report of a probe.
    """
    rollout_rewards = {rollout.reward for rollout in report.rollouts}
    branch_rewards = {
        float(total / count) for node in report.nodes for total, count in zip(node.total, node.count, strict=True)
    }
    rewards = rollout_rewards | branch_rewards
    if len(rewards) == 1:
        failures.warn_once(
            context,
            f"`reward` gave {rewards.pop()} to every rollout and continuation of a probe, so neither update gain nor "
            "alignment is defined (NaN); use questions that the student sometimes solves, or more of them.",
        )
