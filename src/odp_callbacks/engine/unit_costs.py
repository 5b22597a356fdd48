"""What a unit of each kind of work takes, measured while a probe runs, so that the next unit's time is known before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from odp_callbacks.engine.deadline import Clock, Deadline
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes

FORGETTING = 0.5
"""Weight of the earlier units of a kind when a new one is measured: lengths, caches and other processes change."""
UNIT_SHARE = 0.05
"""Share of a probe's seconds that one unit of work may take, if it can be made smaller."""
MARGIN = 1.1
"""How many times longer than it is expected a unit may take."""
SLACK_SHARE = 0.05
"""Share of a probe's seconds by which a unit may end late, so that a probe ends as often a little late as early."""

PASS = "forward pass"
"""A kind of work: one pass of the student over a sequence."""
TOKENS = "sampled tokens"
"""A kind of work whose amounts are numbers of tokens."""


@dataclass
class UnitCosts:
    """Seconds for each amount of work, by kind, from the units that were done.

    Attributes:
        seconds: By kind, the seconds of the units, the recent ones with more weight.
        amounts: By kind, their amounts with the same weights.

    Examples:
        >>> costs = UnitCosts()
        >>> costs.record("update", amount=100.0, seconds=2.0)
        >>> costs.predict("update", 50.0), costs.predict("influence", 50.0)
        (1.0, 0.0)
    """

    seconds: dict[str, float] = field(default_factory=dict)
    amounts: dict[str, float] = field(default_factory=dict)

    def record(self, kind: str, amount: float, seconds: float) -> None:
        """Record a unit."""
        self.seconds[kind] = FORGETTING * self.seconds.get(kind, 0.0) + seconds
        self.amounts[kind] = FORGETTING * self.amounts.get(kind, 0.0) + amount

    def knows(self, kind: str) -> bool:
        """Whether there was a unit of this kind."""
        return self.amounts.get(kind, 0.0) > 0

    def predict(self, kind: str, amount: float) -> float:
        """Seconds that an amount of work will take; 0 for a kind that has not been measured."""
        return self.seconds[kind] / self.amounts[kind] * amount if self.knows(kind) else 0.0

    @contextmanager
    def measuring(self, kind: str, amount: float, clock: Clock) -> Iterator[None]:
        """Record what happens in the block as a unit."""
        start = clock()
        yield
        self.record(kind, amount, clock() - start)


def work_of_sequences(model: nn.Module, lengths: Sequence[int]) -> list[float]:
    """The work of a pass of a model over each sequence, relative to a token of a short sequence.

    A token costs a product with each parameter, and with the keys and values of half of the positions on average.

    Args:
        model: A causal language model, whose sizes are read once.
        lengths: Tokens of each sequence.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2))
        >>> [round(work, 1) for work in work_of_sequences(model, [10, 1000])]
        [10.7, 8246.4]
    """
    parameters = max(1, sum(parameter.numel() for parameter in model.parameters()))
    hidden, layers = layer_sizes(model).hidden, _layer_count(model)
    return [length * (1 + length * hidden * layers / parameters) for length in lengths]


def _layer_count(model: nn.Module) -> int:
    """How many layers a model has, as the longest list of modules in it."""
    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1)


def questions_in_time(
    work: Sequence[float], order: Sequence[int], kind: str, costs: UnitCosts, deadline: Deadline
) -> Iterator[list[int]]:
    """Yield questions in a given order, some at a time, for as long as there is time; the caller measures them.

    Whether there is time is asked for the longest question that is left, not for the next one: which questions are
    measured then depends on what is measured already and on the set of those that are left, not on the order in which
    these come. With a random order, the next question is a random one of them, and long ones are not left out more
    often (a rule that asks for the next question stops before long ones).

    Args:
        work: Of each question, in the units of ``costs``.
        order: The questions in the order in which they are measured.
        kind: The kind of work in ``costs``, which receives what the caller takes.
        costs: What units take.
        deadline: When to have ended; without one, all questions are yielded at once.

    Yields:
        Questions to be measured together.

    Examples:
        >>> costs, deadline = UnitCosts({"update": 1.0}, {"update": 1.0}), Deadline(10.0, clock=lambda: 0.0)
        >>> [parts[0] for parts in questions_in_time([1.0, 4.0, 2.0], [2, 0, 1], "update", costs, deadline)]
        [2, 0, 1]
        >>> costs = UnitCosts({"update": 1.0}, {"update": 1.0})
        >>> list(questions_in_time([1.0, 40.0, 2.0], [2, 0, 1], "update", costs, deadline))
        []
    """
    left = list(order)
    while left:
        longest = max(work[question] for question in left)
        seconds = costs.predict(kind, longest)
        if not deadline.allows(MARGIN * seconds - SLACK_SHARE * (deadline.seconds or 0.0)) or deadline.has_passed:
            return
        count = len(left)
        if deadline.is_finite:
            assert deadline.seconds is not None
            unit_seconds = min(UNIT_SHARE * deadline.seconds, deadline.remaining_seconds)
            count = max(1, int(unit_seconds // seconds)) if seconds > 0 else 1
        part, left = left[:count], left[count:]
        start = deadline.elapsed_seconds
        yield part
        costs.record(kind, sum(work[question] for question in part), deadline.elapsed_seconds - start)
