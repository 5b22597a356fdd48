"""Difficulty of a question by its pass rate."""

HARD_BELOW = 0.25
MEDIUM_BELOW = 0.8
DIFFICULTIES = ("hard", "medium", "easy")


def difficulty(pass_rate: float) -> str | None:
    """The paper's difficulty bin of a question.

    Source: arXiv:2605.10889.

    Args:
        pass_rate: Share of the question's rollouts that were correct, in [0, 1].

    Returns:
        ``"hard"`` below 0.25, ``"medium"`` below 0.8, ``"easy"`` from there on; None for a pass rate of 0, which the
        paper leaves out.

    Examples:
        >>> [difficulty(rate) for rate in (0.0, 0.1, 0.25, 0.8)]
        [None, 'hard', 'medium', 'easy']
    """
    if pass_rate == 0:
        return None
    return "hard" if pass_rate < HARD_BELOW else "medium" if pass_rate < MEDIUM_BELOW else "easy"
