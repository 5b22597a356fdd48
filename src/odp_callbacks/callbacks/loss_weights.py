"""The callback that adds a gate's weights to the batch, for training steps that read them there."""

from collections.abc import MutableMapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from odp_callbacks.gates.loss import gate_weights
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.tokens import tokens_of


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
    ) -> None:
        if not callable(gate):
            raise ValueError(f"`gate` must be a function from tokens to weights, but {gate!r} was given.")
        self.gate, self.key, self.mask, self.rewards, self.questions = gate, key, mask, rewards, questions
        self.success_threshold, self.teacher = success_threshold, teacher

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, MutableMapping):
            raise ValueError(f"`batch` must be a mapping to which weights can be added, but is {type(batch).__name__}.")
        if self.mask not in batch:
            raise ValueError(
                f"`mask` is {self.mask!r}, but the batch has no such entry; it has {sorted(map(str, batch))}."
            )
        mask = batch[self.mask]
        labels: Any = None if self.questions is None else batch[self.questions]
        tokens = tokens_of(
            mask,
            batch.get(self.rewards),
            labels.tolist() if hasattr(labels, "tolist") else labels,
            success_threshold=self.success_threshold,
            teachers=(self.teacher,),
        )
        batch[self.key], logs = gate_weights(self.gate, mask, tokens)
        pl_module.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(mask))
