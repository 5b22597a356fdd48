r"""Log-probabilities of some tokens, as a server returns them, and the teacher's logits that they stand for.

A server returns the :math:`k` likeliest tokens :math:`S` of the teacher's policy :math:`q` and leaves out the rest,
whose mass :math:`q_R = 1 - \sum_{v \in S} q_v` is known. How it is spread over the rest is not. Here it is spread as
the student's policy :math:`p` is: :math:`q_v = q_R\, p_v / p_R` for :math:`v \notin S`. Then every divergence of the
family of Jensen and Shannon, and its gradient on the student's logits, is exactly the one between both policies on
:math:`S \cup \{R\}`, with the rest as one outcome (TRL's "tail bucket", ``loss_add_tail=True``). It is never above the
divergence on all tokens, because lumping outcomes lowers a divergence. Nothing is renormalised, and no token of the
rest is preferred to another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import working_dtype

SMALLEST_REST = 1e-7
"""Mass of the rest, at least: what a sum in float32 cannot tell from 0, as in TRL."""


@dataclass(frozen=True)
class ReturnedTokens:
    """Log-probabilities of some tokens at each of ``N`` positions.

    Attributes:
        token_ids: ``(N, k)`` int64, in the student's vocabulary.
        log_probs: ``(N, k)``, floating, in nats at a temperature of 1; -inf where fewer tokens came back. A position
            without any is one that was not measured.

    Examples:
        >>> returned = ReturnedTokens(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> returned.missing_mass()
        tensor([0.2500], dtype=torch.float64)
        >>> returned.logits(torch.zeros(1, 4)).softmax(-1)
        tensor([[0.2500, 0.1250, 0.5000, 0.1250]])
    """

    token_ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.token_ids)

    def __getitem__(self, places: slice | Sequence[int]) -> "ReturnedTokens":
        """Those at some of the positions."""
        return ReturnedTokens(self.token_ids[places], self.log_probs[places])

    @staticmethod
    def concatenate(parts: "Sequence[ReturnedTokens]") -> "ReturnedTokens":
        """Join those of several responses; ``k`` becomes the largest."""
        width = max(part.token_ids.shape[-1] for part in parts)
        missing = [width - part.token_ids.shape[-1] for part in parts]
        pad = torch.nn.functional.pad
        token_ids = [pad(part.token_ids, (0, count)) for part, count in zip(parts, missing, strict=True)]
        log_probs = [
            pad(part.log_probs, (0, count), value=-math.inf) for part, count in zip(parts, missing, strict=True)
        ]
        return ReturnedTokens(torch.cat(token_ids), torch.cat(log_probs))

    def missing_mass(self) -> Tensor:
        """The probability of the tokens that did not come back, ``(N,)`` float64 in [0, 1]."""
        return (1 - self.log_probs.double().exp().sum(dim=-1)).clamp(0, 1)

    @torch.no_grad()
    def logits(self, student_logits: Tensor) -> Tensor:
        """The teacher's logits: what came back, and for the rest what keeps its mass and the student's shape.

        At a position where nothing came back they are the student's own: every divergence is 0 there, and no direction
        exists.

        Args:
            student_logits: ``(N, V)``, any floating dtype, at a temperature of 1.

        Returns:
            ``(N, V)``, at least float32; the log-probabilities that came back stand unchanged in it. Losses with a
            temperature divide by it; with another one than 1, the mass of the rest follows from the student's shape.

        Raises:
            ValueError: If a token is not in the student's vocabulary.
        """
        size = student_logits.shape[-1]
        came_back = torch.isfinite(self.log_probs).to(student_logits.device)
        token_ids = self.token_ids.to(student_logits.device)
        if came_back.any() and int(largest := token_ids[came_back].max()) >= size:
            raise ValueError(
                f"`token_ids` has the token {int(largest)}, but the student knows {size} tokens; give the teacher's "
                "own `tokenizer`, so that its tokens are found by their text."
            )
        student = student_logits.to(working_dtype(student_logits))
        log_probs = self.log_probs.to(student)
        # Where nothing came back, a place beyond the vocabulary receives it, and is cut off.
        places = torch.where(came_back, token_ids, size)
        returned = student.new_full((len(student), size + 1), -math.inf).scatter(-1, places, log_probs)[:, :size]
        inside = torch.isfinite(returned)
        rest = torch.log(self.missing_mass().clamp_min(SMALLEST_REST)).to(student)[:, None]
        students_rest = student.masked_fill(inside, -math.inf).logsumexp(dim=-1, keepdim=True)
        is_measured = inside.any(dim=-1, keepdim=True) & torch.isfinite(students_rest)
        return torch.where(inside, returned, student + torch.where(is_measured, rest - students_rest, 0))
