"""What is known of one model by the lengths of its forward passes."""

from dataclasses import dataclass, field

FIRST_TRIAL = 64
"""Length in tokens that is tried first, where all that will be used are shorter."""


@dataclass(frozen=True)
class LengthVerdict:
    """The outcome of one trial.

    Attributes:
        shortest: The smallest number of tokens in a forward pass.
        longest: The largest.
        independent: Whether logits depend only on the tokens before them, and not on how many follow.
        backend: The fastest backend that works.
        segments: Whether several tokens at once may continue on a cache, in a backward pass.
        failures: Why faster backends do not work.
    """

    shortest: int
    longest: int
    independent: bool
    backend: str
    segments: bool
    failures: str = ""

    def covers(self, shortest: int, longest: int) -> bool:
        """Whether this verdict holds for all lengths from ``shortest`` to ``longest``."""
        if (shortest, longest) == (self.shortest, self.longest):
            return True
        return self.independent and self.shortest <= shortest and longest <= self.longest

    def rules_out(self, shortest: int, longest: int) -> bool:
        """Whether logits are known to change between these lengths."""
        return not self.independent and shortest <= self.shortest and self.longest <= longest


@dataclass
class LengthVerdicts:
    """The verdicts on one model, in the order of their trials."""

    found: list[LengthVerdict] = field(default_factory=list)

    def covering(self, shortest: int, longest: int) -> LengthVerdict | None:
        """The first verdict that holds from ``shortest`` to ``longest``; None if there is none."""
        return next((verdict for verdict in self.found if verdict.covers(shortest, longest)), None)

    def ruling_out(self, shortest: int, longest: int) -> LengthVerdict | None:
        """A verdict that the logits change between these lengths; None if there is none."""
        return next((verdict for verdict in self.found if verdict.rules_out(shortest, longest)), None)


def rounded_up(length: int) -> int:
    """A length of at least 64 that is at most a quarter longer, so that few different ones are tried.

    Examples:
        >>> [rounded_up(length) for length in (3, 65, 100, 600)]
        [64, 80, 112, 640]
    """
    length = max(length, FIRST_TRIAL)
    step = 1 << (length.bit_length() - 3)
    return -(-length // step) * step
