"""All response tokens of a measurement as the tokens that a gate sees, and the directions that rules make of them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from odp_callbacks.functional.tokens import Tokens, tokens_of
from odp_callbacks.records import Floats
from odp_callbacks.update_records import TokenFeatures

Rule = Callable[[Tokens], Tensor]
"""From ``N`` tokens to their weights in the distillation gradient, ``(N,)``, finite and not negative."""


@dataclass(frozen=True)
class ResponseRewards:
    """What a gate may know of ``R`` rollouts.

    Attributes:
        lengths: Their numbers of response tokens.
        rewards: Their rewards.
        correct: Whether each reaches the success threshold.
        questions: Labels that are equal for rollouts of the same question.
    """

    lengths: Sequence[int]
    rewards: Sequence[float]
    correct: Sequence[bool]
    questions: Sequence[Hashable]


def response_tokens(
    features: TokenFeatures, rollouts: ResponseRewards, teachers: Sequence[str], teacher: int
) -> Tokens:
    """The tokens whose features were measured, rollout by rollout, all of them with the same teacher.

    Args:
        features: Of ``N`` tokens of these rollouts, in any order.
        rollouts: All rollouts.
        teachers: Names of the teachers.
        teacher: Index of the teacher.

    Returns:
        ``N`` tokens, in the order of ``features``, float64.
    """
    starts = np.concatenate([[0], np.cumsum(rollouts.lengths)])
    width = torch.arange(max(rollouts.lengths, default=0))
    mask = width < torch.tensor(list(rollouts.lengths), dtype=torch.long)[:, None]
    # Correctness is known, whatever the threshold was.
    everywhere = tokens_of(mask, [float(c) for c in rollouts.correct], rollouts.questions, teachers=teachers)
    places = torch.from_numpy(starts[features.rollout] + features.depth)
    tokens = everywhere.take(places)
    rewards = torch.tensor(list(rollouts.rewards), dtype=torch.float64)

    def column(values: object) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64))

    return replace(
        tokens,
        reward=rewards[tokens.rollout],
        student_entropy=column(features.student_entropy),
        student_log_prob=column(features.student_log_prob),
        teacher_entropy=column(features.teacher_entropy[:, teacher]),
        teacher_log_prob=column(features.teacher_log_prob[:, teacher]),
        reverse_kl=column(features.reverse_kl[:, teacher]),
        teacher=torch.full((len(places),), teacher, dtype=torch.long),
    )


def rule_weights(rule: Rule, name: str, tokens: Tokens) -> Floats:
    """Weights ``(N,)`` of a rule, checked.

    Raises:
        ValueError: If their shape is wrong, or a weight is negative or not finite.
    """
    weights = torch.as_tensor(rule(tokens)).detach().double().cpu()
    if weights.shape != (len(tokens),):
        raise ValueError(
            f"`rules` has {name!r}, which must give one weight for each of the {len(tokens)} tokens, but its shape is "
            f"{tuple(weights.shape)}."
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"`rules` has {name!r}, which must give weights that are finite and not negative.")
    values: Floats = weights.numpy()
    return values


def class_weights(weights: Floats, correct: NDArray[np.bool_]) -> tuple[float, float] | None:
    """The weights of correct and of incorrect rollouts, if a rule weights by correctness alone; None if it does not.

    Args:
        weights: ``(N,)``, of tokens.
        correct: ``(N,)``, whether the token's rollout is correct.

    Examples:
        >>> class_weights(np.array([0.5, 0.5, 1.0]), np.array([True, True, False]))
        (0.5, 1.0)
    """
    values = []
    for side in (correct, ~correct):
        of_side = weights[side]
        if len(of_side) and (of_side != of_side[0]).any():
            return None
        values.append(float(of_side[0]) if len(of_side) else 0.0)
    return values[0], values[1]


def check_rules(rules: object) -> None:
    """Check that ``rules`` is a mapping from names to functions.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(rules, Mapping) and all(isinstance(name, str) and callable(rule) for name, rule in rules.items()):
        return
    raise ValueError(
        "`rules` must map names to functions from tokens to weights, such as "
        f"{{'high entropy': high_entropy}}, or be None, but {rules!r} was given."
    )
