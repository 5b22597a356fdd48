r"""How many questions, rollouts, nodes and continuations to measure for the narrowest interval at a given price.

A probe is a nested sample: rollouts within questions, nodes within rollouts, continuations within nodes. With the
variance of each level and the price of one more of each, the best numbers follow. Source: Cochran, "Sampling
techniques" (3rd edition, 1977), chapter 10, "Subsampling with units of equal size".
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.variance_components import VarianceComponents
from odp_callbacks.records import Floats

LEVELS = ("questions", "rollouts", "nodes", "continuations")
"""The levels of a probe, from the outermost."""
CANDIDATES = {"rollouts": 16, "nodes": 64, "continuations": 32}
"""The largest numbers that a plan considers."""
SINGLE_QUESTION = 1e6
"""By how much one question is worse than its variance says: it gives no interval at all."""


@dataclass(frozen=True)
class UnitPrices:
    """The price of one more of each, without what is inside it; in seconds, or in tokens.

    Attributes:
        question: What a question costs beside its rollouts, such as reading its prompt.
        rollout: What a rollout costs beside its nodes: sampling it, the teachers' forward passes, its backward passes.
        node: What a node costs beside its continuations, such as its gradients.
        continuation: One continuation of every branch of a node.
    """

    question: float
    rollout: float
    node: float
    continuation: float

    def __post_init__(self) -> None:
        """Check that no price is negative, and that something has a price."""
        prices = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, price in prices.items():
            if not 0 <= price < float("inf"):
                raise ValueError(f"`{name}` must be a price of at least 0, but {price!r} was given.")
        if not any(prices.values()):
            raise ValueError("one of the prices must be positive, but all are 0.")


@dataclass(frozen=True)
class NestedDesign:
    """The numbers of a plan.

    Attributes:
        questions: Number of questions.
        rollouts: Number of rollouts of a question.
        nodes: Number of nodes of a rollout.
        continuations: Number of continuations of each branch of a node.
    """

    questions: int
    rollouts: int
    nodes: int
    continuations: int

    def price(self, prices: UnitPrices) -> float:
        """Compute the price of the whole design, in the unit of ``prices``."""
        return float(_price_of_question(prices, *(np.array(getattr(self, name)) for name in LEVELS[1:]))) * (
            self.questions
        )

    def variance(self, components: VarianceComponents) -> float:
        """Compute the variance of a figure's mean under this design."""
        return float(_variance(components, *(np.array(getattr(self, name), dtype=float) for name in LEVELS)))


def best_design(
    prices: UnitPrices,
    components: VarianceComponents,
    budget: float,
    available_questions: int,
    fixed: Mapping[str, int] | None = None,
    at_least: Mapping[str, int] | None = None,
) -> NestedDesign:
    """Find the design with the smallest variance whose price is within the budget.

    All numbers up to :data:`CANDIDATES` are compared, so that what is fixed and what is available bind exactly.

    Args:
        prices: The price of one more of each.
        components: The variance of each level.
        budget: What may be spent, in the unit of ``prices``.
        available_questions: How many questions there are, at least 1.
        fixed: Numbers that the user has set, by the names in :data:`LEVELS`.
        at_least: The smallest numbers that make sense where nothing is fixed, by the names in :data:`LEVELS`; 1 where
            a name is missing. A baseline from a question's other rollouts needs two rollouts, for example.

    Returns:
        The best design; the cheapest one, with the fewest questions, where none fits the budget.

    Raises:
        ValueError: If ``fixed`` or ``at_least`` has an unknown name or a number below 1, or there is no question.

    Examples:
        >>> prices = UnitPrices(question=0.0, rollout=4.0, node=1.0, continuation=1.0)
        >>> components = VarianceComponents(question=1.0, rollout=4.0, node=16.0, continuation=4.0)
        >>> best_design(prices, components, budget=300.0, available_questions=30)
        NestedDesign(questions=30, rollouts=1, nodes=3, continuations=1)
    """
    fixed, at_least = fixed or {}, at_least or {}
    for argument, numbers in (("fixed", fixed), ("at_least", at_least)):
        for name, number in numbers.items():
            if name not in LEVELS or type(number) is not int or number < 1:
                raise ValueError(
                    f"`{argument}` must hold positive integers by the names {list(LEVELS)}, but {name!r}: {number!r} "
                    "was given."
                )
    if available_questions < 1:
        raise ValueError(f"`available_questions` must be at least 1, but {available_questions!r} was given.")
    ranges = [
        np.array([fixed[name]]) if name in fixed else np.arange(at_least.get(name, 1), CANDIDATES[name] + 1)
        for name in LEVELS[1:]
    ]
    rollouts, nodes, continuations = (grid.ravel() for grid in np.meshgrid(*ranges, indexing="ij"))
    price = _price_of_question(prices, rollouts, nodes, continuations)
    affordable = np.full(price.shape, np.inf)
    np.divide(budget, price, out=affordable, where=price > 0)
    most = min(available_questions, fixed.get("questions", available_questions))
    questions = np.floor(affordable * (1 + 1e-9)).clip(max=most)
    fewest = min(most, fixed.get("questions", at_least.get("questions", 1)))
    questions = np.where(questions < fewest, 0, questions)
    if not questions.any():
        cheapest, number = int(price.argmin()), fixed.get("questions", fewest)
        return NestedDesign(number, int(rollouts[cheapest]), int(nodes[cheapest]), int(continuations[cheapest]))
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = _variance(components, questions, rollouts, nodes, continuations)
        # Few questions: the interval is Student's, with one degree of freedom less than there are questions.
        variance = variance * _widening(questions)
    variance = np.where(questions > 0, variance, np.inf)
    # Among equally good designs the cheapest.
    best = int(np.lexsort((questions * price, np.round(variance / variance.min(), 9)))[0])
    return NestedDesign(int(questions[best]), int(rollouts[best]), int(nodes[best]), int(continuations[best]))


def _price_of_question(
    prices: UnitPrices, rollouts: NDArray[np.int64], nodes: NDArray[np.int64], continuations: NDArray[np.int64]
) -> Floats:
    """Price of one question with all that is inside it."""
    price: Floats = prices.question + rollouts * (
        prices.rollout + nodes * (prices.node + continuations * prices.continuation)
    )
    return price


def _variance(
    components: VarianceComponents, questions: Floats, rollouts: Floats, nodes: Floats, continuations: Floats
) -> Floats:
    """Variance of a figure's mean over questions."""
    at_nodes = (components.node + components.continuation / continuations) / nodes
    variance: Floats = (components.question + (components.rollout + at_nodes) / rollouts) / questions
    return variance


def _widening(questions: Floats) -> Floats:
    """By how much Student's interval is wider than the normal one, squared."""
    from scipy.special import stdtrit  # importing it takes more than half a second

    normal_quantile = 1.959963984540054
    widening: Floats = np.full(questions.shape, SINGLE_QUESTION)
    few = questions >= 2
    widening[few] = (stdtrit(questions[few] - 1, 0.975) / normal_quantile) ** 2
    return widening
