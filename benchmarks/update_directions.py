"""Success gradients and weighted distillation gradients of questions, by plain autograd on the LoRA parameters.

`realised.py` steps along them. It does not take them from the library's engine, whose prediction it tests: losses are
those of `functional.distillation_losses`, and each direction is one backward of the weighted loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import Teacher, teacher_logits, teacher_prompt_ids
from odp_callbacks.functional import leave_one_out_advantages
from odp_callbacks.functional.distillation_losses import distillation_loss
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.functional.tokens import Tokens, policy_features, tokens_of


@dataclass(frozen=True)
class QuestionGradients:
    """Gradients of ``N`` questions.

    Attributes:
        success: ``(N, P)`` float32, each question's mean of advantage times score.
        directions: ``(N, K, W, P)`` float32: descent directions of each teacher's loss under each weighting, summed
            over tokens.
        share: ``(K, W)``, each weighting's sum of weights as a share of the tokens.
    """

    success: Tensor
    directions: Tensor
    share: Tensor


def success_gradients(student: nn.Module, rollouts: Sequence[Rollout]) -> Tensor:
    """``(N, P)``: the success gradient of each question."""
    return torch.stack(
        [_flat_gradient(student, _score_of(student, of_question)) for of_question in by_question(rollouts)]
    )


def question_gradients(
    student: nn.Module,
    tokenizer: Any,
    teachers: Mapping[str, Teacher],
    rollouts: Sequence[Rollout],
    weightings: Mapping[str, Any],
) -> QuestionGradients:
    """Gradients of each question for each teacher and weighting.

    Args:
        student: In evaluation mode.
        tokenizer: Its tokenizer.
        teachers: By name.
        rollouts: Scored, those of one question together.
        weightings: Rules of :mod:`odp_callbacks.gates.rules` by name.
    """
    targets = [_teacher_logits(teacher, student, tokenizer, rollouts) for teacher in teachers.values()]
    tokens = _tokens(rollouts)
    logits = _logits(student, rollouts, gradients=False)
    weights = torch.stack(
        [
            torch.stack(
                [rule(_with_policies(tokens, rollouts, logits, target)).float() for rule in weightings.values()]
            )
            for target in targets
        ]
    )  # (K, W, tokens)
    parts = weights.split([len(rollout.response_ids) for rollout in rollouts], dim=-1)
    success, directions = [], []
    for places in _places(rollouts):
        chosen = [rollouts[place] for place in places]
        own_logits = torch.cat(_logits(student, chosen, gradients=True))
        own_weights = torch.cat([parts[place] for place in places], dim=-1)
        rows = []
        for teacher_index, target in enumerate(targets):
            losses = distillation_loss(own_logits, torch.cat([target[place] for place in places]), "reverse_kl")
            for weight in own_weights[teacher_index]:
                objective = -(losses * weight).sum()
                rows.append(_flat_gradient(student, objective, retain=True) if weight.any() else _zeros(student))
        directions.append(torch.stack(rows).unflatten(0, (len(targets), len(weightings))))
        success.append(_flat_gradient(student, _score_of(student, chosen)))
    return QuestionGradients(torch.stack(success), torch.stack(directions), weights.mean(dim=-1))


def by_question(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    return [[rollouts[place] for place in places] for places in _places(rollouts)]


def _places(rollouts: Sequence[Rollout]) -> list[list[int]]:
    places: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        places.setdefault(id(rollout.question), []).append(place)
    return list(places.values())


def _score_of(student: nn.Module, rollouts: Sequence[Rollout]) -> Tensor:
    """Mean over the rollouts of a question of advantage times log-probability; its gradient is that of success."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    advantages = leave_one_out_advantages(rewards, torch.zeros(len(rollouts), dtype=torch.long))
    scored = [place for place, advantage in enumerate(advantages.tolist()) if advantage]
    total = torch.zeros(())
    for place, logits in zip(scored, _logits(student, [rollouts[i] for i in scored], gradients=True), strict=True):
        log_probs = torch.log_softmax(logits, dim=-1)
        chosen = log_probs[torch.arange(len(logits)), torch.tensor(rollouts[place].response_ids)]
        total = total + float(advantages[place]) * chosen.sum()
    return total / len(rollouts)


def _logits(student: nn.Module, rollouts: Sequence[Rollout], *, gradients: bool) -> list[Tensor]:
    positions = [rollout.positions(range(len(rollout.response_ids))) for rollout in rollouts]
    with torch.set_grad_enabled(gradients):
        return node_logits(student, [rollout.sequence for rollout in rollouts], positions)


def _teacher_logits(teacher: Teacher, student: nn.Module, tokenizer: Any, rollouts: Sequence[Rollout]) -> list[Tensor]:
    return teacher_logits(
        teacher,
        student,
        [teacher_prompt_ids(teacher, tokenizer, rollout.question) for rollout in rollouts],
        [rollout.response_ids for rollout in rollouts],
        [range(len(rollout.response_ids)) for rollout in rollouts],
    )


def _tokens(rollouts: Sequence[Rollout]) -> Tokens:
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return tokens_of(mask, [rollout.reward for rollout in rollouts], [id(rollout.question) for rollout in rollouts])


def _with_policies(
    tokens: Tokens, rollouts: Sequence[Rollout], logits: Sequence[Tensor], targets: Sequence[Tensor]
) -> Tokens:
    """The tokens with the features of student and teacher, rollout by rollout to save memory."""
    features = [
        policy_features(own, target, torch.tensor(rollout.response_ids))
        for own, target, rollout in zip(logits, targets, rollouts, strict=True)
    ]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in features]) for name in features[0]}
    return replace(tokens, **joined)


def _flat_gradient(student: nn.Module, objective: Tensor, *, retain: bool = False) -> Tensor:
    parameters = list(lora_parameters(student).values())
    if not objective.requires_grad:
        return _zeros(student)
    gradients = torch.autograd.grad(objective, parameters, retain_graph=retain, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
    )


def _zeros(student: nn.Module) -> Tensor:
    return torch.zeros(sum(parameter.numel() for parameter in lora_parameters(student).values()))
