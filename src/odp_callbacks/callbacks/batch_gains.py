"""The gain that a batch of the training's rollouts shows between two copies of the student's parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.reward_memory import RewardMemory
from odp_callbacks.callbacks.step_curves import BatchGain
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.rewards import RewardHost
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly
from odp_callbacks.engine.training_rollouts import TrainingRollout
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.update.response_log_probs import response_log_probs
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.engine.update.taken_step import KeptParameters
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.functional.updates import step_gain

TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-2, 0.1
"""How much the training's log-probabilities may differ from the student's own, in nats (root mean square)."""


class BatchGains:
    """Measures the gain of batches of one student.

    Args:
        failures: Warns if the training's log-probabilities are not the student's.
        rewards: Scores rollouts that the training did not score.
    """

    def __init__(self, failures: FailureHandler, rewards: RewardMemory) -> None:
        self.failures, self.rewards = failures, rewards
        self._model: SplitModel | None = None
        self._trusts_training: bool | None = None

    def measure(
        self,
        context: TrainerContext,
        probe: Probe,
        given: Sequence[TrainingRollout],
        reference: KeptParameters,
        sampled: KeptParameters,
    ) -> BatchGain:
        """Return the gain of this process's rollouts; those without a reward are left out.

        Args:
            context: The trainer.
            probe: The student with its tokenizer and verifier.
            given: The rollouts.
            reference: The parameters at the start of the gain. Where they are ``sampled``, there is no gain yet.
            sampled: The parameters that the rollouts were sampled from.
        """
        if not given:
            return BatchGain((), 0.0, 0)
        probe.reward_host = RewardHost(context.trainer_state, context.step)
        temperature = next((one.temperature for one in given if one.temperature is not None), probe.config.temperature)
        with (
            remembering_user_defaults(),
            probe.student_in_place(),
            preserving_training_state(probe.student),
            context.precision_context(),
        ):
            given = self.rewards.scored(probe, given)
            every = probe.given_rollouts(given)
            scored = [index for index, rollout in enumerate(every) if rollout.reward == rollout.reward]  # not NaN
            rollouts, given = [every[index] for index in scored], [given[index] for index in scored]
            rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
            reward_sum = float(rewards.sum())
            if not rollouts:
                return BatchGain((), 0.0, 0)
            self._model = self._model or SplitModel(probe.student)
            of_training = _training_log_probs(given)
            if reference is sampled:  # the first batch has no step before it, and shows whether both agree
                if of_training is not None:
                    of_student = response_log_probs(self._model, rollouts, temperature, sampled.values)
                    self._compare(context, probe, of_training, of_student)
                return BatchGain((), reward_sum, len(rollouts))
            before = response_log_probs(self._model, rollouts, temperature, reference.values)
            after = of_training if of_training is not None and self._trusts_training else None
            if after is None:
                after = response_log_probs(self._model, rollouts, temperature, sampled.values)
        return BatchGain(_gains_of_questions(rollouts, rewards, after, before), reward_sum, len(rollouts))

    def _compare(
        self, context: TrainerContext, probe: Probe, of_training: Sequence[Tensor], of_student: Sequence[Tensor]
    ) -> None:
        """Find out whether the training's log-probabilities are those of the student itself."""
        tolerance = TOLERANCE if computes_exactly(probe.student) else HALF_PRECISION_TOLERANCE
        difference = float((torch.cat(list(of_training)) - torch.cat(list(of_student))).square().mean().sqrt())
        self._trusts_training = difference <= tolerance
        if not self._trusts_training:
            self.failures.warn_once(
                context,
                f"the training's log-probabilities of its rollouts differ by {difference:.2g} nats per token from the "
                "student's own, so `odp/step/gain` takes one more forward pass; the prompt, the temperature or dropout "
                "may differ.",
            )


def _training_log_probs(given: Sequence[TrainingRollout]) -> list[Tensor] | None:
    """The log-probabilities that the training has, ``(T,)`` of each rollout; None unless it has them for all tokens."""
    log_probs = []
    for rollout in given:
        if rollout.log_probs is None or len(rollout.log_probs) != len(rollout.response_ids):
            return None
        log_probs.append(torch.as_tensor(rollout.log_probs, dtype=torch.float64).cpu())
    return log_probs


def _gains_of_questions(
    rollouts: Sequence[Rollout], rewards: Tensor, after: Sequence[Tensor], before: Sequence[Tensor]
) -> tuple[float, ...]:
    """For each question the sum of its rollouts' gains."""
    questions = torch.tensor(question_indices(rollouts))
    sums_after, sums_before = (torch.stack([one.sum() for one in log_probs]) for log_probs in (after, before))
    gains = step_gain(rewards, questions, sums_after, sums_before)
    return tuple(torch.zeros(int(questions.max()) + 1, dtype=gains.dtype).index_add(0, questions, gains).tolist())
