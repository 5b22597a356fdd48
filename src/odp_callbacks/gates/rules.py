"""Published rules for where to distil, as small pure functions from tokens to weights.

The rules contradict each other, so compare them on your own run: :func:`~odp_callbacks.gates.scoring.score_rules` does
that from a probe's records, without training. Set their parameters with ``functools.partial``.
"""

import torch
from torch import Tensor

from odp_callbacks.functional.tokens import Tokens


def everything(tokens: Tokens) -> Tensor:
    """Give every token the weight 1: no rule."""
    return torch.ones_like(tokens.counts)


def incorrect_rollouts(tokens: Tokens) -> Tensor:
    """Keep incorrect rollouts only: arXiv:2605.10889 finds a higher mean logit cosine there."""
    return (~tokens.need("correct")).float()


def correct_rollouts(tokens: Tokens) -> Tensor:
    """Keep correct rollouts only, as rejection sampling does."""
    return tokens.need("correct").float()


def high_entropy(tokens: Tokens, share: float = 0.2) -> Tensor:
    """Keep the ``share`` of the tokens at which the student's entropy is highest.

    Source: arXiv:2506.01939, which trains on the fifth of the tokens with the highest entropy.

    Raises:
        ValueError: If ``share`` is not in (0, 1].

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> tokens = tokens_of(torch.ones(1, 2)).with_policies(
        ...     torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2), torch.tensor([0, 0])
        ... )
        >>> high_entropy(tokens, share=0.5).tolist()
        [1.0, 0.0]
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must lie in (0, 1], but {share!r} was given.")
    entropy, counts = tokens.need("student_entropy"), tokens.counts
    order = torch.argsort(entropy, descending=True, stable=True)
    count_before = counts[order].cumsum(dim=0) - counts[order]
    weights = torch.zeros_like(entropy)
    weights[order] = (count_before < share * counts.sum() * (1 - 1e-6)).to(weights)
    return weights


def teacher_confidence(tokens: Tokens) -> Tensor:
    r"""Weight a token by :math:`e^{-H(q)}`, which is high where the teacher is confident.

    This is one over the effective number of tokens that the teacher chooses among. In the spirit of arXiv:2605.30833,
    which trusts confident teachers; the form is ours.
    """
    return torch.exp(-tokens.need("teacher_entropy"))


def teacher_margin(tokens: Tokens, scale: float = 1.0) -> Tensor:
    r"""Weight a token by :math:`\sigma(-\ln(q_y/p_y)/s)`, which is high where the teacher disfavours the token.

    A token that has the same probability under teacher and student has the weight one half.

    Raises:
        ValueError: If ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, but {scale!r} was given.")
    margin = tokens.need("teacher_log_prob") - tokens.need("student_log_prob")
    return torch.sigmoid(-margin / scale)


def position(tokens: Tokens, power: float = 1.0) -> Tensor:
    r"""Weight a token by its relative position, :math:`((t + 1) / T)^{a}`.

    A positive power favours later tokens, a negative one earlier tokens. In the spirit of arXiv:2605.21606, which
    raises later tokens, and of its opposites; the form is ours.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> position(tokens_of(torch.ones(1, 4))).tolist()
        [0.25, 0.5, 0.75, 1.0]
    """
    return ((tokens.depth + 1).float() / tokens.length.float()) ** power


def prefix(tokens: Tokens, full: float = 0.3, end: float = 0.6) -> Tensor:
    """Keep the beginning of a response: weight 1 up to the share ``full`` of it, decreasing to 0 at ``end``.

    In the spirit of arXiv:2605.13643 (teach the prefix, fade the suffix); the numbers are ours.

    Raises:
        ValueError: Unless ``0 <= full <= end <= 1`` and ``end > 0``.
    """
    if not 0 <= full <= end <= 1 or end == 0:
        raise ValueError(f"`full` and `end` must be shares with full <= end, but {full!r} and {end!r} were given.")
    relative_depth = tokens.depth.float() / tokens.length.float()
    if full == end:
        return (relative_depth < end).float()
    return ((end - relative_depth) / (end - full)).clamp(0, 1)


def pass_rate(tokens: Tokens) -> Tensor:
    r"""Weight a token by :math:`\sqrt{p (1 - p)}` of its question's pass rate: 0 if all rollouts are alike.

    In the spirit of arXiv:2605.27765; it needs several rollouts of each question.
    """
    rate = tokens.need("pass_rate")
    return torch.sqrt(rate * (1 - rate))


RULES = {
    "everything": everything,
    "incorrect rollouts": incorrect_rollouts,
    "correct rollouts": correct_rollouts,
    "high entropy": high_entropy,
    "teacher confidence": teacher_confidence,
    "teacher margin": teacher_margin,
    "later positions": position,
    "prefix": prefix,
    "pass rate": pass_rate,
}
"""All rules with their default parameters, by the names that tables show."""
