"""A gate in TRL's distillation trainers, without a subclass."""

from collections.abc import Mapping
from typing import Any

import torch

from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction, check_columns, check_reward
from odp_callbacks.gates.loss import check_gate
from odp_callbacks.gates.protocols import Gate, Router
from odp_callbacks.gates.trl_distillation import GatedDistillation
from odp_callbacks.gates.trl_gkd import GatedGKD
from odp_callbacks.gates.trl_weighting import BatchWeighting


def gate_trainer(
    trainer: Any,
    gate: Gate,
    reward: RewardFunction | None = None,
    *,
    success_threshold: float = 1.0,
    teacher: str = "teacher",
    strict: bool = False,
) -> None:
    """Let a gate weight each token in the loss of TRL's `DistillationTrainer` or `GKDTrainer`.

    The loss remains TRL's own, token by token; its terms are multiplied by the gate's weights, renormalised to a mean
    of 1 in each micro-batch, before they are summed. With a gate that gives every token the same weight, training is
    bit for bit what it would be without the gate. In evaluation nothing is gated.

    ``gate/token_share``, ``gate/rollout_share``, ``gate/effective_share``, ``gate/unscored_share``,
    ``gate/loss_before`` and ``gate/loss_after`` are logged with the trainer's own metrics. The gate becomes
    ``trainer.gate``, where a :class:`~odp_callbacks.GradientAlignmentTrainerCallback` finds it and lets it learn.

    Args:
        trainer: The trainer, before ``train()``.
        gate: Maps tokens to weights; see :mod:`odp_callbacks.gates`.
        reward: TRL reward function, for a gate that needs rewards or correctness. With `DistillationTrainer` it gets
            the dataset's columns. `GKDTrainer` keeps none of them: the function gets the decoded prompts, and as
            ``reference`` the decoded answer of the dataset.
            A rollout for which it returns None is trained without the gate; ``gate/unscored_share`` is their share.
        success_threshold: Reward from which a rollout counts as correct.
        teacher: Name of the teacher, for a gate that learns from probes; it must be the same there.
        strict: Raise the exception of a failing reward or gate. Otherwise it is warned about once, and the batch is
            trained without the gate.

    Raises:
        ValueError: If the trainer has no loss that can be gated, the gate needs something the trainer does not know, or
            the reward function a column that the trainer does not have.
        TypeError: If ``reward`` is no reward function.
        ImportError: If TRL is missing or too old.

    Examples:
        ::

            trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=rows)
            gate_trainer(trainer, IncorrectRolloutGate(), reward=exact_match)
            trainer.train()
    """
    try:
        from trl import DistillationTrainer
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        raise ImportError(
            "`gate_trainer` needs TRL with its `DistillationTrainer`: pip install 'trl>=1.16'."
        ) from error
    if isinstance(gate, Router):
        raise ValueError(
            "`gate` chooses among several teachers, but TRL's trainers have one; use an AlignmentGate, or "
            "OnPolicyDistillation(teachers={...}, gate=...)."
        )
    if hasattr(trainer, "gate"):
        raise ValueError("`trainer` already has a gate; call `gate_trainer` once for each trainer.")
    if reward is not None:
        check_reward(reward)
    check_gate(gate, rewards=reward is not None, teachers=(teacher,))
    weighting = BatchWeighting(trainer, gate, reward, success_threshold, teacher, strict)
    if isinstance(trainer, DistillationTrainer):
        _check_reward_columns(reward, _first_row(trainer))
        GatedDistillation(weighting).install()
    elif isinstance(trainer, GKDTrainer):
        _check_reward_columns(reward, {"prompt": "", "reference": ""})
        GatedGKD(weighting).install()
    else:
        raise ValueError(
            f"`trainer` must be TRL's DistillationTrainer or GKDTrainer, whose loss is a distillation loss, but "
            f"{type(trainer).__name__} was given."
        )
    trainer.gate, trainer.gate_teachers = gate, (teacher,)


def _first_row(trainer: Any) -> Row | None:
    """The first row of the training's data; None if its columns are not known before the training."""
    dataset = trainer.train_dataset
    if dataset is None or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or not len(dataset):
        return None
    row = dataset[0]
    return row if isinstance(row, Mapping) else None


def _check_reward_columns(reward: RewardFunction | None, row: Row | None) -> None:
    """Raise an error before training if the reward function needs a column that is not there."""
    if reward is not None and row is not None:
        check_columns(reward, [Question("0", row, torch.empty(0, dtype=torch.long))])
