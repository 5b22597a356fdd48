"""How much time the measurement of an update may take, and what it leaves out where that is too short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.unit_costs import UnitCosts, questions_in_time

GAIN, INFLUENCE, RULES = "update", "influence", "rules"
"""Kinds of work in the costs."""


@dataclass
class UpdateTime:
    """The time for one measurement of an update.

    Update gain comes first. Rules, and before them influences, are measured if there is time for them on all questions
    whose gain was measured: sums over the tokens of some questions only would not be those of the update.

    Attributes:
        deadline: When gain, influences and rules must be done.
        costs: What units of work take; it receives what is measured.
        randomness: The order of the questions, if there is a deadline.
        questions: How many questions were measured.
        dropped: What else was left out for lack of time: ``"influence"``, ``"rules"``.

    Examples:
        >>> UpdateTime().order(3)
        [0, 1, 2]
    """

    deadline: Deadline = field(default_factory=Deadline)
    costs: UnitCosts = field(default_factory=UnitCosts)
    randomness: Randomness = field(default_factory=lambda: Randomness(0))
    questions: int = 0
    dropped: list[str] = field(default_factory=list)

    def order(self, count: int) -> list[int]:
        """The order in which questions are measured: as they come, or random if some may be left out."""
        return random_order(count, self.randomness) if self.deadline.is_finite else list(range(count))

    def parts(self, work: Sequence[float]) -> Iterator[list[int]]:
        """Yield questions to be measured together, for as long as there is time.

        Args:
            work: Of each question.
        """
        for part in questions_in_time(work, self.order(len(work)), GAIN, self.costs, self.deadline):
            self.questions += len(part)
            yield part

    def allows(self, kind: str, work: float) -> bool:
        """Whether there is time for work after the gain; what has not been measured yet is taken to cost as much.

        Args:
            kind: :data:`INFLUENCE` or :data:`RULES`; it is noted if there is no time.
            work: All of it that is left.
        """
        known = kind if self.costs.knows(kind) else GAIN
        fits = self.deadline.allows(self.costs.predict(known, work))
        if not fits and kind not in self.dropped:
            self.dropped.append(kind)
        return fits


def random_order(count: int, randomness: Randomness) -> list[int]:
    """An order of questions that is independent of all that they are; the same in every stage of a probe."""
    order: list[int] = torch.randperm(count, generator=randomness.generator("order of questions")).tolist()
    return order
