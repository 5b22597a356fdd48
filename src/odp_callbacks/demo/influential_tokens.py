"""Which tokens the gain of a teacher comes from: by kind, and the most influential single ones."""

from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.contributions import report_influence
from odp_callbacks.records import ProbeReport

KINDS = ("digits", "words", "signs and spaces")
CONTEXT = 24
"""Characters of the response that are shown on either side of a token."""


@dataclass(frozen=True)
class TokenKind:
    """What one kind of tokens contributes.

    Attributes:
        kind: One of :data:`KINDS`.
        token_share: Its share of the tokens.
        contribution: Sum of the influences of these tokens.
        share: That sum as a share of the sum of all tokens.
    """

    kind: str
    token_share: float
    contribution: float
    share: float


@dataclass(frozen=True)
class InfluentialToken:
    """A token whose influence is significant.

    Attributes:
        before: The end of the response before it.
        text: The token.
        after: The beginning of what follows it.
        correct: Whether the response is correct.
        influence: With the ends of its interval.
        low: Lower end.
        high: Upper end.
    """

    before: str
    text: str
    after: str
    correct: bool
    influence: float
    low: float
    high: float


def kind_of(piece: str) -> str:
    """The kind of a token.

    Examples:
        >>> kind_of("7"), kind_of(" Answer"), kind_of(" = ")
        ('digits', 'words', 'signs and spaces')
    """
    if any(character.isdigit() for character in piece):
        return "digits"
    return "words" if any(character.isalpha() for character in piece) else "signs and spaces"


def token_kinds(report: ProbeReport, teacher: str) -> list[TokenKind]:
    """What each kind of tokens contributes to the update gain of a teacher, the largest share of the gain first.

    Args:
        report: A probe's report.
        teacher: Name of the teacher.

    Returns:
        Kinds that occur; empty if influences were not measured.
    """
    influence = report_influence(report)
    if influence is None:
        return []
    values = influence.value[:, report.teachers.index(teacher)] * influence.weight
    kinds = np.array([kind_of(piece) for rollout in report.rollouts for piece in rollout.pieces])
    measured = np.isfinite(values)
    total = float(values[measured].sum())
    present_kinds = []
    for kind in KINDS:
        chosen = measured & (kinds == kind)
        if chosen.any():
            contribution = float(values[chosen].sum())
            present_kinds.append(TokenKind(kind, chosen.sum() / measured.sum(), contribution, contribution / total))
    return sorted(present_kinds, key=lambda one: -one.contribution)


def influential_tokens(report: ProbeReport, teacher: str, count: int) -> list[InfluentialToken]:
    """The tokens with the largest significant influences, of either sign; each text once in the same surroundings.

    Args:
        report: A probe's report.
        teacher: Name of the teacher.
        count: How many tokens at most.
    """
    influence = report_influence(report)
    if influence is None:
        return []
    teacher_index = report.teachers.index(teacher)
    values = influence.value[:, teacher_index]
    significant = influence.significant[:, teacher_index]
    rollout_of = np.repeat(np.arange(len(report.rollouts)), np.diff(influence.starts))
    chosen: dict[tuple[str, str], InfluentialToken] = {}
    largest_first = np.argsort(-np.abs(np.nan_to_num(values)))
    for place in largest_first[significant[largest_first]]:
        if len(chosen) == count:
            break
        rollout, depth = report.rollouts[rollout_of[place]], int(influence.depth[place])
        before, after = "".join(rollout.pieces[:depth]), "".join(rollout.pieces[depth + 1 :])
        token = InfluentialToken(
            before[-CONTEXT:],
            rollout.pieces[depth],
            after[:CONTEXT],
            rollout.correct,
            float(values[place]),
            float(influence.low[place, teacher_index]),
            float(influence.high[place, teacher_index]),
        )
        chosen.setdefault((before, token.text), token)
    return list(chosen.values())
