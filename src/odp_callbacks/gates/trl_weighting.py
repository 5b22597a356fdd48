"""The weights of a batch in any of TRL's trainers: rewards, weights, logs, and what happens if one of them fails."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction, RewardHost, score
from odp_callbacks.engine.user_defaults import UserDefaults
from odp_callbacks.functional.tokens import tokens_of
from odp_callbacks.gates.loss import check_gate, gate_weights
from odp_callbacks.gates.protocols import Gate


class BatchWeighting:
    """Computes rewards and weights for a trainer's batches, and logs what the gate does.

    Args:
        trainer: TRL's trainer.
        gate: Maps tokens to weights.
        reward: TRL reward function; None if the gate needs no rewards.
        success_threshold: Reward from which a rollout counts as correct.
        teacher: Name of the teacher.
        strict: Raise the exception of a failing reward or gate, instead of warning once.
    """

    def __init__(
        self,
        trainer: Any,
        gate: Gate,
        reward: RewardFunction | None,
        success_threshold: float,
        teacher: str,
        strict: bool,
    ) -> None:
        self.trainer, self.gate, self.reward = trainer, gate, reward
        self.success_threshold, self.teacher, self.strict = success_threshold, teacher, strict
        self.needs_policies = self._needs_policies()
        self.user_defaults = UserDefaults()
        self._warnings_issued: set[str] = set()

    @property
    def training(self) -> bool:
        """Whether the trainer trains at present, rather than evaluates."""
        training: bool = self.trainer.model.training
        return training

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decode sequences of token ids, without special tokens."""
        tokenizer: Any = self.trainer.processing_class
        texts: list[str] = tokenizer.batch_decode(
            [list(token_ids) for token_ids in sequences], skip_special_tokens=True
        )
        return texts

    def score(self, rows: Sequence[Row], completions: Sequence[Sequence[int]]) -> list[float] | None:
        """Return the rewards of completions; None if there is no reward function, or it failed.

        A reward is NaN where the function gave None.
        """
        if self.reward is None:
            return None
        no_ids = torch.empty(0, dtype=torch.long)
        questions = [Question(str(index), row, no_ids) for index, row in enumerate(rows)]
        try:
            texts = self.decode(completions)
            with self.user_defaults.applied():  # the trainer autocasts in a training step
                return score(self.reward, questions, texts, completions, self.reward_host())
        except Exception as error:
            self._handle_failure("`reward` failed", error)
            return None

    def reward_host(self) -> RewardHost:
        """What TRL passes to reward functions; metrics go to the trainer's own logs."""
        return RewardHost(
            self.trainer.state, log_metric=lambda name, value: self.trainer._metrics["train"][name].append(float(value))
        )

    def weights(
        self,
        mask: Tensor,
        rewards: Sequence[float] | None,
        questions: Sequence[str],
        policy_features: Callable[[], dict[str, Tensor]],
        losses: Tensor,
    ) -> Tensor:
        """Return the weights of a batch's tokens, or ones if the gate or the reward function failed.

        Args:
            mask: ``(B, T)``, 1 where there is one of the ``N`` tokens.
            rewards: ``(B,)``; None if they are not known.
            questions: ``B`` labels, equal for rollouts of the same question.
            policy_features: Computes what :func:`~odp_callbacks.gates.policy_features` returns; called only if the gate
                needs it.
            losses: ``(N,)``, for the logs.

        Returns:
            ``(N,)``.
        """
        ones = torch.ones_like(losses)
        if self.reward is not None and rewards is None:  # the failure of the reward function was warned about
            return ones
        try:
            tokens = tokens_of(
                mask, rewards, questions, success_threshold=self.success_threshold, teachers=(self.teacher,)
            )
            if self.needs_policies:
                features: dict[str, Any] = {**policy_features()}
                tokens = replace(tokens, **features)
            batch_weights, gate_logs = gate_weights(self.gate, mask, tokens)
        except Exception as error:
            self._handle_failure("`gate` failed", error)
            return ones
        weights = batch_weights[mask.bool()].to(losses)
        if len(losses):
            gate_logs |= {"gate/loss_before": float(losses.mean()), "gate/loss_after": float((losses * weights).mean())}
            with self.guarded("the shares of the gate could not be logged"):
                for name, value in gate_logs.items():
                    self.trainer._metrics["train"][name].append(value)
        return weights

    def _needs_policies(self) -> bool:
        """Whether the gate fails without the policies' features."""
        try:
            check_gate(self.gate, rewards=self.reward is not None, policies=False, teachers=(self.teacher,))
        except ValueError:
            return True
        return False

    @contextmanager
    def guarded(self, failure: str) -> Iterator[None]:
        """Turn an exception into a warning, unless strict.

        Args:
            failure: What has failed, as a clause.
        """
        try:
            yield
        except Exception as error:
            self._handle_failure(failure, error, consequence="")

    def _handle_failure(self, failure: str, error: Exception, consequence: str = ", and a batch was not gated") -> None:
        if self.strict:
            raise error
        message = f"odp-callbacks: {failure}{consequence}: {type(error).__name__}: {error}"
        if message not in self._warnings_issued and self.trainer.is_world_process_zero():
            self._warnings_issued.add(message)
            warnings.warn(message, stacklevel=2)
