r"""Update gain: what one step along a batch's distillation gradient adds to the success of a new question.

Derived in this project. With :math:`J = E_x E_{y \sim \pi}[r]` the student's expected reward and :math:`D` the
distillation gradient of a batch (the descent direction of its loss, summed over tokens),

.. math:: U = \frac{\langle \nabla J, D \rangle}{\|D\|}

is the success gained per unit step of the LoRA parameters along :math:`D`.
"""

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import check_floating_point, working_dtype


def update_gain(success_gradient: Tensor, direction: Tensor) -> Tensor:
    r"""Gain of each question along the distillation gradient of all other questions.

    .. math:: U_i = \frac{\langle g_i, D_{-i} \rangle}{\|D_{-i}\|}, \qquad D_{-i} = \sum_{j \ne i} D_j

    The own question is left out of the direction. The rewards that estimate the gradient and the rewards that select
    the rollouts of the direction then belong to different questions. So the mean over questions is unbiased for the
    gain of one step on a batch of ``N - 1`` questions, also if the direction is built from correct or from incorrect
    rollouts alone. With the own question left in, it would be biased.

    Args:
        success_gradient: ``(N, P)``, floating. Row i estimates the gradient of question i's success.
        direction: ``(N, P)``, floating. Row i is question i's part of the distillation gradient.

    Returns:
        ``(N,)`` in the wider dtype of the two; NaN where :math:`D_{-i}` is zero.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes are not ``(N, P)`` each.

    Examples:
        >>> import torch
        >>> g = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> update_gain(g, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        tensor([0.6000, 1.0000])
    """
    check_floating_point("success_gradient", success_gradient)
    check_floating_point("direction", direction)
    if success_gradient.dim() != 2 or success_gradient.shape != direction.shape:
        raise ValueError(
            "`success_gradient` and `direction` must both have shape (N, P), row i of question i, but "
            f"{tuple(success_gradient.shape)} and {tuple(direction.shape)} were given."
        )
    dtype = working_dtype(success_gradient, direction)
    others = sum_of_other_rows(direction.to(dtype))  # (N, P)
    norms = torch.linalg.vector_norm(others, dim=-1)
    inner = (success_gradient.to(dtype) * others).sum(dim=-1)
    gains = torch.where(norms > 0, inner / norms, torch.nan)
    return gains.to(torch.promote_types(success_gradient.dtype, direction.dtype))


def sum_of_other_rows(rows: Tensor) -> Tensor:
    """For each row the sum of all other rows.

    Computed from sums of the rows before and after, not as a difference from the total: a sum of zero comes out as
    zero and not as rounding.

    Args:
        rows: ``(N, P)``, floating.

    Returns:
        ``(N, P)``.

    Examples:
        >>> import torch
        >>> sum_of_other_rows(torch.tensor([[1.0], [2.0], [4.0]])).flatten().tolist()
        [6.0, 5.0, 3.0]
    """
    zero = torch.zeros_like(rows[:1])
    before = torch.cat([zero, rows.cumsum(dim=0)])[: len(rows)]
    after = torch.cat([zero, rows.flip(0).cumsum(dim=0)])[: len(rows)].flip(0)
    return before + after


def leave_one_out_advantages(rewards: Tensor, questions: Tensor) -> Tensor:
    r"""Reward of each rollout less the mean reward of its siblings, :math:`r - b`.

    A sibling's reward does not depend on the rollout, so the policy gradient with this baseline is unbiased (the
    leave-one-out baseline of Kool, van Hoof and Welling, 2019). A rollout without siblings is compared with the mean
    of the other questions' rewards, which is unbiased too. A single rollout of a single question is compared with
    nothing.

    Args:
        rewards: ``(R,)``, floating.
        questions: ``(R,)``, integer: the question of each rollout.

    Returns:
        ``(R,)`` in the dtype of ``rewards``.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> import torch
        >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])).tolist()
        [1.0, -0.5, -0.5, 0.6666666269302368]
    """
    check_floating_point("rewards", rewards)
    if rewards.dim() != 1 or rewards.shape != questions.shape:
        raise ValueError(
            "`rewards` and `questions` must both have shape (R,), but "
            f"{tuple(rewards.shape)} and {tuple(questions.shape)} were given."
        )
    dtype = working_dtype(rewards)
    values = rewards.to(dtype)
    _, place = questions.unique(return_inverse=True)
    count = torch.bincount(place).to(dtype)
    # Counted from the smallest reward, equal rewards give exactly 0 and not rounding, which would pass for a signal.
    smallest = torch.full_like(count, torch.inf).scatter_reduce(0, place, values, "amin")
    above = values - smallest[place]
    siblings = count[place] - 1
    among_siblings = above - (_sum_by(place, above, count)[place] - above) / siblings
    above = values - smallest.min() if len(values) else values
    elsewhere = len(values) - count[place]
    among_questions = above - (above.sum() - _sum_by(place, above, count)[place]) / elsewhere
    alone = torch.where(elsewhere > 0, among_questions, values)
    return torch.where(siblings > 0, among_siblings, alone).to(rewards.dtype)


def _sum_by(place: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Sum of the values ``(R,)`` at each place, in the shape of ``like``."""
    return torch.zeros_like(like).index_add(0, place, values)


def step_gain(rewards: Tensor, questions: Tensor, log_probs_after: Tensor, log_probs_before: Tensor) -> Tensor:
    r"""What a step that was taken is expected to have added to the success, from rollouts sampled after it.

    .. math:: \Delta_i = (r_i - b_i) \, (\ln \pi_{t+1}(y_i) - \ln \pi_t(y_i)), \qquad y_i \sim \pi_{t+1}

    The mean over rollouts has the expectation :math:`J(\theta_{t+1}) - J(\theta_t)` up to an error of second order in
    the step, whatever optimizer made the step. It is of new questions as long as the rollouts did not make the step.

    Args:
        rewards: ``(R,)``, floating.
        questions: ``(R,)``, integer: the question of each rollout, for the baseline
            (:func:`leave_one_out_advantages`).
        log_probs_after: ``(R,)``, floating: natural logarithm of each whole response's probability under the
            parameters that it was sampled from, after the step.
        log_probs_before: ``(R,)``, the same under the parameters before the step.

    Returns:
        ``(R,)`` in the widest dtype of the arguments: each rollout's :math:`\Delta_i`, whose mean is the gain.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Examples:
        >>> import torch
        >>> rewards, questions = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> step_gain(rewards, questions, torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.5])).mean()
        tensor(0.5000)
    """
    for name, log_probs in (("log_probs_after", log_probs_after), ("log_probs_before", log_probs_before)):
        check_floating_point(name, log_probs)
        if log_probs.shape != rewards.shape:
            raise ValueError(
                f"`{name}` must have one number for each rollout, {tuple(rewards.shape)} as `rewards`, but "
                f"{tuple(log_probs.shape)} was given."
            )
    advantages = leave_one_out_advantages(rewards, questions)
    dtype = working_dtype(advantages, log_probs_after, log_probs_before)
    gains = advantages.to(dtype) * (log_probs_after.to(dtype) - log_probs_before.to(dtype))
    widest = torch.promote_types(rewards.dtype, torch.promote_types(log_probs_after.dtype, log_probs_before.dtype))
    return gains.to(widest)
