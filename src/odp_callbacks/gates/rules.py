"""Rules that others have published for where to distil: small pure functions from tokens to weights.

They contradict each other, so compare them on your own run: :func:`~odp_callbacks.gates.scoring.score_rules` does it
from a probe's records, without training. Parameters are set with ``functools.partial``.
"""

import torch
from torch import Tensor

from odp_callbacks.gates.tokens import Tokens


def everything(tokens: Tokens) -> Tensor:
    """No rule: weight 1."""
    return torch.ones_like(tokens.counts)


def incorrect_rollouts(tokens: Tokens) -> Tensor:
    """Incorrect rollouts only. Source: arXiv:2605.10889, which finds the teacher's signal there."""
    return (~tokens.need("correct")).float()


def correct_rollouts(tokens: Tokens) -> Tensor:
    """Correct rollouts only, as rejection sampling has it."""
    return tokens.need("correct").float()


def high_entropy(tokens: Tokens, share: float = 0.2) -> Tensor:
    """The tokens at which the student is least sure: the ``share`` of them with the highest entropy.

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
    before = counts[order].cumsum(dim=0) - counts[order]
    weights = torch.zeros_like(entropy)
    weights[order] = (before < share * counts.sum() * (1 - 1e-6)).to(weights)
    return weights


def teacher_confidence(tokens: Tokens) -> Tensor:
    r"""The surer the teacher, the more: :math:`e^{-H(q)}`, one over the number of tokens that it chooses among.

    In the spirit of arXiv:2605.30833, which trusts confident teachers; the form is ours.
    """
    return torch.exp(-tokens.need("teacher_entropy"))


def teacher_margin(tokens: Tokens, scale: float = 1.0) -> Tensor:
    r"""The less the teacher likes the token that was taken, the more: :math:`\sigma(-\ln(q_y/p_y)/s)`, from 0 to 1.

    A token that the teacher would have taken as gladly as the student has weight one half.

    Raises:
        ValueError: If ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, but {scale!r} was given.")
    margin = tokens.need("teacher_log_prob") - tokens.need("student_log_prob")
    return torch.sigmoid(-margin / scale)


def position(tokens: Tokens, power: float = 1.0) -> Tensor:
    r"""By relative position: :math:`((t + 1) / T)^{a}`; later tokens more for a positive power, earlier for a negative.

    In the spirit of arXiv:2605.21606, which raises later tokens, and of its opposites; the form is ours.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> position(tokens_of(torch.ones(1, 4))).tolist()
        [0.25, 0.5, 0.75, 1.0]
    """
    return ((tokens.depth + 1).float() / tokens.length.float()) ** power


def prefix(tokens: Tokens, full: float = 0.3, end: float = 0.6) -> Tensor:
    """The beginning of a response only: weight 1 up to the share ``full`` of it, fading to 0 at ``end``.

    In the spirit of arXiv:2605.13643 (teach the prefix, fade the suffix); the numbers are ours.

    Raises:
        ValueError: Unless ``0 <= full <= end <= 1`` and ``end > 0``.
    """
    if not 0 <= full <= end <= 1 or end == 0:
        raise ValueError(f"`full` and `end` must be shares with full <= end, but {full!r} and {end!r} were given.")
    place = tokens.depth.float() / tokens.length.float()
    if full == end:
        return (place < end).float()
    return ((end - place) / (end - full)).clamp(0, 1)


def pass_rate(tokens: Tokens) -> Tensor:
    r"""By how open the question still is: :math:`\sqrt{p (1 - p)}` of its rollouts' pass rate, 0 if all are alike.

    In the spirit of arXiv:2605.27765; it needs several rollouts of each question.
    """
    p = tokens.need("pass_rate")
    return torch.sqrt(p * (1 - p))


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
"""All of them with their defaults, by the name that a table shows."""
