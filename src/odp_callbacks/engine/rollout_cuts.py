"""One length limit for all rollouts that a deadline left unfinished."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from odp_callbacks.engine.sampling.requests import Continuation


@dataclass(frozen=True)
class CutRollouts:
    """Rollouts with a common limit of their length.

    Attributes:
        continuations: Those of the first questions, ``per_question`` each.
        questions: How many questions these are; the others are left out.
        limit: The length at which all responses were cut; None if all had finished.
    """

    continuations: list[Continuation]
    questions: int
    limit: int | None


def cut_rollouts(continuations: Sequence[Continuation], per_question: int) -> CutRollouts:
    """Cut all rollouts at the length that the shortest unfinished one has reached, as a lower limit would have.

    A common limit does not favour one response over another: each is what the student says within so many tokens.
    Where some rollouts began late, this limit would be short. Then the last questions are left out, so that as many
    tokens as possible remain.

    Args:
        continuations: ``per_question`` rollouts of each question, in the order in which they were started.
        per_question: Rollouts of a question.

    Examples:
        >>> done, cut, late = (Continuation((1, 2, 2), False), *(Continuation((1,) * n, True, True) for n in (2, 0)))
        >>> cut_rollouts([done, cut, late, late], per_question=2).continuations
        [Continuation(tokens=(1, 2), truncated=True, unfinished=False), \
Continuation(tokens=(1, 1), truncated=True, unfinished=False)]
    """
    question_count = len(continuations) // max(1, per_question)
    limit = math.inf
    best = CutRollouts([], 0, None)
    most_tokens = -1
    for count in range(1, question_count + 1):
        of_question = continuations[(count - 1) * per_question : count * per_question]
        limit = min([limit, *(len(one.tokens) for one in of_question if one.unfinished)])
        if limit < 1:
            break
        kept = continuations[: count * per_question]
        tokens = sum(min(len(one.tokens), limit) for one in kept)
        if tokens > most_tokens:
            most_tokens = int(tokens)
            best = CutRollouts([_cut(one, limit) for one in kept], count, None if math.isinf(limit) else int(limit))
    return best


def _cut(continuation: Continuation, limit: float) -> Continuation:
    """A rollout as a limit of its length would have left it."""
    if len(continuation.tokens) <= limit and not continuation.unfinished:
        return continuation
    tokens = continuation.tokens[: int(limit)] if math.isfinite(limit) else continuation.tokens
    return replace(continuation, tokens=tokens, truncated=True, unfinished=False)
