"""The callback that adds a gate's weights to the batch, for training steps that read them there."""

from collections.abc import MutableMapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from odp_callbacks.functional.tokens import tokens_of
from odp_callbacks.gates.loss import gate_weights
from odp_callbacks.gates.protocols import Gate


class LossWeightCallback(Callback):
    """Add a gate's weights to every training batch, under a key of your choice.

    Use it for a module that samples its rollouts elsewhere and whose training step multiplies per-token losses by
    ``batch[key]``: ``(batch[key] * losses).sum() / mask.sum()``. The weights have a mean of 1 over the batch's tokens,
    so that the loss keeps its scale; they are all 0 if the gate gives no token a weight. If the training step computes
    rollouts and losses itself, call :func:`~odp_callbacks.gate_loss` there instead, which also knows the policies'
    probabilities.

    The shares ``train/gate/token_share``, ``train/gate/rollout_share`` and ``train/gate/effective_share`` are logged
    (:class:`~odp_callbacks.gates.GatedLoss`).

    Args:
        gate: The gate. One that learns from probes must be given to the
            :class:`~odp_callbacks.GradientAlignmentCallback` as well.
        key: Key under which the weights ``(B, T)``, float32, are added.
        mask: Key of the batch's mask of response tokens, ``(B, T)``.
        rewards: Key of the batch's rewards, ``(B,)``; the batch may lack them if the gate does not need them.
        questions: Key of ``B`` labels that are equal for rollouts of the same question, for pass rates.
        success_threshold: Reward from which a rollout counts as correct.
        teacher: Name of the teacher, as the probes have it.
        strict: Raise the exception of a gate that fails after it has worked. Otherwise it is warned about once, and the
            batch is trained with weights of 1.

    Raises:
        ValueError: At the first batch, if it is not a mapping, has no mask, or lacks what the gate needs.

    Examples:
        >>> from odp_callbacks import LossWeightCallback, IncorrectRolloutGate
        >>> LossWeightCallback(IncorrectRolloutGate(), mask="completion_mask").key
        'loss_weights'
    """

    def __init__(
        self,
        gate: Gate,
        *,
        key: str = "loss_weights",
        mask: str = "completion_mask",
        rewards: str = "rewards",
        questions: str | None = None,
        success_threshold: float = 1.0,
        teacher: str = "teacher",
        strict: bool = False,
    ) -> None:
        if not callable(gate):
            raise ValueError(f"`gate` must be a function from tokens to weights, but {gate!r} was given.")
        self.gate, self.key, self.mask, self.rewards, self.questions = gate, key, mask, rewards, questions
        self.success_threshold, self.teacher, self.strict = success_threshold, teacher, strict
        self._has_worked = False
        self._warnings_issued: set[str] = set()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, MutableMapping):
            raise ValueError(f"`batch` must be a mapping to which weights can be added, but is {type(batch).__name__}.")
        if self.mask not in batch:
            raise ValueError(
                f"`mask` is {self.mask!r}, but the batch has no such entry; it has {sorted(map(str, batch))}."
            )
        mask = batch[self.mask]
        try:
            batch[self.key], logs = self._weights(batch, mask)
        except Exception as error:
            if self.strict or not self._has_worked:
                raise
            self._warn_once(f"`gate` failed, and a batch was not gated: {type(error).__name__}: {error}")
            batch[self.key] = mask.to(torch.promote_types(mask.dtype, torch.float32))
            return
        self._has_worked = True
        pl_module.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(mask))

    def _weights(self, batch: MutableMapping[Any, Any], mask: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The weights of a batch's tokens, and what to log."""
        labels: Any = None if self.questions is None else batch[self.questions]
        tokens = tokens_of(
            mask,
            batch.get(self.rewards),
            labels.tolist() if hasattr(labels, "tolist") else labels,
            success_threshold=self.success_threshold,
            teachers=(self.teacher,),
        )
        return gate_weights(self.gate, mask, tokens)

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings_issued:
            self._warnings_issued.add(message)
            rank_zero_warn(f"odp-callbacks: {message}")
