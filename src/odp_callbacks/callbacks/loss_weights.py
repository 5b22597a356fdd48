"""A gate for a training step that takes its weights from the batch."""

from collections.abc import MutableMapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from odp_callbacks.gates.loss import gate_weights
from odp_callbacks.gates.tokens import Gate, tokens_of


class LossWeightCallback(Callback):
    """Place a gate's weights in every training batch, under a key of your choice.

    For a module that samples its rollouts elsewhere and whose training step multiplies per-token losses by
    ``batch[key]``: ``(batch[key] * losses).sum() / mask.sum()``. Weights have a mean of 1 over the batch's tokens, so
    the loss keeps its scale; they are all 0 where nothing is let through. Where the step computes rollouts and losses
    itself, call :func:`~odp_callbacks.gate_loss` on them instead, which also knows what the policies say.

    Logs ``train/gate/token_share``, ``rollout_share`` and ``effective_share`` where the trainer logs.

    Args:
        gate: The gate. One that learns from probes must be given to the
            :class:`~odp_callbacks.GradientAlignmentCallback` as well.
        key: Where the weights ``(B, T)`` float32 go.
        mask: Where the batch has its mask of response tokens, ``(B, T)``.
        rewards: Where the batch has its rewards, ``(B,)``; gates that do not need them do without.
        questions: Where the batch has what tells rollouts of one question from others, ``B`` labels; for pass rates.
        success_threshold: Reward from which a rollout counts as correct.
        teacher: Name of the teacher, as the probes have it.

    Raises:
        ValueError: At the first batch, if it is no mapping, has no mask, or the gate needs what is not there.

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
        if not isinstance(batch, MutableMapping) or self.mask not in batch:
            what = sorted(map(str, batch)) if isinstance(batch, MutableMapping) else type(batch).__name__
            raise ValueError(f"`mask` is {self.mask!r}, but the batch has no such entry; it is {what}.")
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
