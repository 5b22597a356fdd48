"""How many tokens does a figure cost? Continuations where they count, against equal numbers for every branch.

Nodes and their true successes are fixed; outcomes are drawn from the truth. The library spends a budget in its own
waves, on prefixes that nodes share; the alternative gives every branch of every node the same number. The tokens for
equal mean squared errors are read from both curves of error against tokens.

Run: python benchmarks/efficiency.py --seeds 40
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from populations import Population, World, synthetic, worlds
from sizes import parse_sizes

from odp_callbacks.analysis.estimators import gradient_figures
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.node_estimates import statuses
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.tree.budget import (
    AllocationState,
    ContinuationBudget,
    equal_allocation,
    read_allocation_state,
)
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree
from odp_callbacks.engine.tree.continuations import ContinuationCost
from odp_callbacks.engine.tree.recording import with_outcomes
from odp_callbacks.storage import load

EQUAL_NUMBERS = (8, 16, 32)
"""Continuations of every branch, of the alternative."""
RELATIVE_BUDGETS = (1.5, 2, 3, 4, 6, 8, 12)
"""Budgets of the library, in tokens of one continuation of every branch of every node."""
HALF_WIDTH = 0.1
"""The alternative's error is also asked for at a 95 % interval of this half-width."""
HEAVY_RUN = Path(__file__).parent / "results" / "heavy"
USUAL = {
    "seeds": 40,
    "world_seeds": 10,
    "sets": 5,
    "questions": 16,
    "worlds": 20,
    "figures": ["predicted_gain", "gain_weighted_alignment", "alignment"],
    "only": ["SmolLM2", "worlds", "synthetic"],
}
SMOKE = {"seeds": 2, "world_seeds": 2, "sets": 1, "questions": 4, "worlds": 1, "figures": ["predicted_gain"]}


class Drawn:
    """Nodes whose outcomes are drawn from the truth.

    Nodes of one group have the same prefix, and share continuations.

    Args:
        evidence: The nodes, with what is known for certain.
        success: ``(N, A)``, the true success of each branch.
        length: ``(N, A)``, the number of tokens that a continuation takes.
        group: ``(N,)``, the group of each node.
    """

    def __init__(self, evidence: Evidence, success: np.ndarray, length: np.ndarray, group: np.ndarray) -> None:
        self.evidence, self.success, self.length, self.group = evidence, success, length, group
        self.first_nodes = np.unique(group, return_index=True)[1]
        self.open = evidence.real & ~evidence.exact

    def truth(self) -> Evidence:
        """The evidence if everything were known for certain."""
        known = np.ones_like(self.success)
        return replace(self.evidence, count=known, total=self.success, total_square=self.success**2, exact=known > 0)

    def informative(self) -> "Drawn":
        """The nodes whose alignment is defined: those whose true successes differ."""
        chosen = self.truth().ideal_norm > 0
        group = np.unique(self.group[chosen], return_inverse=True)[1]
        return Drawn(self.evidence.take(chosen), self.success[chosen], self.length[chosen], group)

    def _observed(self, wins: np.ndarray, count: np.ndarray) -> Evidence:
        count, wins = np.where(self.open, count, 1).astype(float), np.where(self.open, wins, self.evidence.total)
        return replace(self.evidence, count=count, total=wins, total_square=wins)

    def sample_equally(self, continuations: int, rng: np.random.Generator) -> tuple[Evidence, float]:
        """As many continuations of every branch of every node, and the tokens that they take."""
        count = np.where(self.open, continuations, 0)
        return self._observed(rng.binomial(count, self.success), count), float((count * self.length).sum())

    def sample_adaptively(self, tokens: float, target: str, rng: np.random.Generator) -> tuple[Evidence, float]:
        """The library's waves within a budget, and the tokens that they took."""
        is_open, success, length = (values[self.first_nodes] for values in (self.open, self.success, self.length))
        count, wins, cost = np.zeros(is_open.shape), np.zeros(is_open.shape), ContinuationCost()

        def sample(allocation: np.ndarray) -> None:
            allocation = np.where(is_open, allocation, 0)
            count[...] += allocation
            wins[...] += rng.binomial(allocation, success)
            cost.tokens += int((allocation * length).sum())

        def read_state() -> AllocationState:
            evidence = self._observed(wins[self.group], count[self.group])
            return AllocationState(evidence, self.group, count, is_open, length.mean(axis=1).clip(min=1))

        config = ProbeConfig(budget=max(1, int(tokens)), target=target)
        sample_waves(ContinuationBudget(config, cost, rng), is_open.astype(np.int64), sample, read_state)
        return read_state().evidence, float(cost.tokens)


def sample_waves(
    budget: ContinuationBudget,
    first_allocation: np.ndarray,
    sample: Callable[[np.ndarray], None],
    read_state: Callable[[], AllocationState],
) -> None:
    """Sample waves until the budget is spent, as :class:`~odp_callbacks.engine.tree.stream.ContinuationStream` does.

    Each wave is planned from the outcomes of all waves before it. The library's plan does not see the last of them.
    """
    sample(first_allocation)
    while True:
        plan = budget.next_wave(read_state())
        if not plan.allocation.any() and not plan.reserve.any():
            return
        sample(plan.allocation)
        if plan.is_last:
            # The reserve follows in random order until the budget is spent.
            for place in budget.generator.permutation(np.repeat(np.arange(plan.reserve.size), plan.reserve.ravel())):
                if budget.cost.tokens >= plan.token_limit:
                    return
                one = np.zeros(plan.reserve.size, dtype=np.int64)
                one[place] = 1
                sample(one.reshape(plan.reserve.shape))
            return


class Walked(Drawn):
    """An enumerated world: continuations are walked, and one that passes through other nodes counts there too."""

    def __init__(self, world: World) -> None:
        self.world = world
        super().__init__(gather(world.records), world.success, world.length, np.array(world.tree.group_of_node))

    def sample_adaptively(self, tokens: float, target: str, rng: np.random.Generator) -> tuple[Evidence, float]:
        """The library's waves within a budget, and the tokens that they took."""
        world, cost = self.world, ContinuationCost()
        tree = ContinuationTree(world.tree.rollouts, world.tree.nodes)
        tree.set_branches(world.tree.branches)
        for outcomes, known_outcomes in zip(tree.outcomes, world.tree.outcomes, strict=True):
            outcomes[:] = [outcome if outcome.exact else BranchOutcomes() for outcome in known_outcomes]

        def sample(allocation: np.ndarray) -> None:
            for group, branches in enumerate(tree.branches):
                node, prefix = tree.nodes[tree.first_nodes[group]], tree.prefix(tree.first_nodes[group])
                question = int(tree.rollouts[node.rollout].question.id)
                for branch_index, branch in enumerate(branches):
                    if tree.outcomes[group][branch_index].exact:
                        continue
                    for _ in range(int(allocation[group, branch_index])):
                        response, reward = world.walk(question, (*prefix, branch.token), rng)
                        tree.add_continuation(group, branch_index, response, reward)
                        length = len(response) - len(prefix) - 1
                        cost.tokens += length
                        total, count = tree.sampled_lengths[group]
                        tree.sampled_lengths[group] = total + length, count + 1

        def read_state() -> AllocationState:
            records = [
                with_outcomes(record, tree.node_outcomes(node_index)) for node_index, record in enumerate(world.records)
            ]
            return read_allocation_state(tree, gather(records), world.expected_lengths)

        config = ProbeConfig(budget=max(1, int(tokens)), target=target)
        sample_waves(ContinuationBudget(config, cost, rng), equal_allocation(tree, 1), sample, read_state)
        return read_state().evidence, float(cost.tokens)


def figure_of_teachers(evidence: Evidence, name: str) -> np.ndarray:
    """``(K,)``, a figure of every teacher over all nodes."""
    correction, status = correct_for_noise(evidence), statuses(evidence)
    all_nodes = np.ones(len(evidence.correct), bool)
    values = []
    for teacher in range(evidence.teacher_norm.shape[1]):
        estimator = gradient_figures(evidence, correction, teacher, all_nodes, status[:, teacher])[name]
        values.append(float(estimator.statistic(np.ones(len(estimator.questions)))))
    return np.array(values)


Run = Callable[[int], tuple[Evidence, float]]
Point = tuple[float, float]
"""Mean tokens and mean squared error."""


def measure_point(run: Run, name: str, truth: np.ndarray, seeds: int) -> Point:
    """Mean tokens, and mean squared error over seeds and teachers."""
    errors, tokens = [], []
    for seed in range(seeds):
        evidence, spent_tokens = run(seed)
        errors.append(((figure_of_teachers(evidence, name) - truth) ** 2).mean())
        tokens.append(spent_tokens)
    return float(np.mean(tokens)), float(np.mean(errors))


def tokens_for_error(curve: list[Point], error: float) -> float:
    """Tokens for an error, by the best power law: errors fall as a power of tokens."""
    log_tokens, log_errors = np.log(np.array(curve).T)
    slope, level = np.polyfit(log_errors, log_tokens, 1)
    return float(np.exp(slope * np.log(error) + level))


def token_ratios(fixed: Drawn, name: str, seeds: int, first_seed: int = 0) -> dict[str, float]:
    """Tokens of equal numbers over those of the library, for the same mean squared error; NaN out of reach."""
    if name == "alignment" and type(fixed) is Drawn:
        fixed = fixed.informative()
    truth = figure_of_teachers(fixed.truth(), name)

    def stream(seed: int) -> np.random.Generator:
        return np.random.default_rng(10_000 * first_seed + seed)

    equal_curve = [
        measure_point(lambda seed, count=count: fixed.sample_equally(count, stream(seed)), name, truth, seeds)
        for count in EQUAL_NUMBERS
    ]
    one_of_each = equal_curve[0][0] / EQUAL_NUMBERS[0]
    adaptive_curve = [
        measure_point(
            lambda seed, budget=budget: fixed.sample_adaptively(budget * one_of_each, name, stream(seed)),
            name,
            truth,
            seeds,
        )
        for budget in RELATIVE_BUDGETS
    ]

    def is_in_reach(error: float) -> bool:
        """Whether both curves pass through an error: nothing is extrapolated."""
        return all(
            min(point[1] for point in curve) <= error <= max(point[1] for point in curve)
            for curve in (equal_curve, adaptive_curve)
        )

    goals = {
        f"error of n = {count}": (error, tokens)
        for count, (tokens, error) in zip(EQUAL_NUMBERS, equal_curve, strict=True)
    }
    if name != "predicted_gain":
        error = (HALF_WIDTH / 1.96) ** 2
        goals[f"half-width {HALF_WIDTH}"] = (error, tokens_for_error(equal_curve, error))
    return {
        goal: tokens / tokens_for_error(adaptive_curve, error) if is_in_reach(error) else float("nan")
        for goal, (error, tokens) in goals.items()
    }


def load_heavy_run(path: Path) -> Drawn:
    """The run of ``heavy.py`` on SmolLM2-135M: its successes serve as the truth."""
    report = load(path)
    evidence = gather(report.nodes)
    length = np.ones_like(evidence.count) * np.array(json.loads(report.settings["lengths"]))[:, None]
    prefixes = [(node.question, report.rollouts[node.rollout].pieces[: node.depth]) for node in report.nodes]
    group_of_prefix = {prefix: group for group, prefix in enumerate(dict.fromkeys(prefixes))}
    group = np.array([group_of_prefix[prefix] for prefix in prefixes])
    first_nodes = np.unique(group, return_index=True)[1]
    return Drawn(evidence, evidence.success[first_nodes][group], length.clip(min=1), group)


def draw_questions(population: Population, questions: int, seed: int) -> Drawn:
    """Some questions of a synthetic population, where a continuation takes one token."""
    index = population.sample(questions, np.random.default_rng(seed))
    evidence, success = population.evidence.take(index), population.success[index]
    question = np.repeat(np.arange(questions), population.nodes_per_question)
    return Drawn(replace(evidence, question=question), success, np.ones_like(success), np.arange(len(index)))


def print_ratios(label: str, name: str, ratios: list[dict[str, float]]) -> None:
    """Print a line for each goal, over several sets of nodes."""
    for goal in ratios[0]:
        values = np.array([ratio[goal] for ratio in ratios])
        in_reach = values[~np.isnan(values)]
        heading = f"{label:22} {name:24} {goal:16}"
        if not len(in_reach):
            print(f"{heading} in reach of none of {len(ratios)}", flush=True)
            continue
        low, high = np.quantile(in_reach, [0.1, 0.9])
        print(
            f"{heading} {np.exp(np.log(in_reach).mean()):5.1f} times fewer tokens; {low:.1f} to {high:.1f} "
            f"(10 % to 90 % of {len(in_reach)} in reach, of {len(ratios)})",
            flush=True,
        )


def main(
    seeds: int, world_seeds: int, sets: int, questions: int, worlds_: int, figures: list[str], only: list[str]
) -> None:
    """Print a line for each set of nodes and figure."""
    sources: list[tuple[str, list[Drawn]]] = []
    if "SmolLM2" in only:
        sources.append(("SmolLM2-135M", [load_heavy_run(HEAVY_RUN)] * sets))
    if "worlds" in only:
        sources.append((f"{worlds_} enumerated worlds", [Walked(world) for world in worlds(worlds_)]))
    if "synthetic" in only:
        population = synthetic(0.35, 400)
        drawn = [draw_questions(population, questions, seed) for seed in range(sets)]
        sources.append(("synthetic, sd 0.35", drawn))
    for label, node_sets in sources:
        for name in figures:
            seed_count = world_seeds if isinstance(node_sets[0], Walked) else seeds
            ratios = [
                token_ratios(node_set, name, seed_count, set_index) for set_index, node_set in enumerate(node_sets)
            ]
            print_ratios(label, name, ratios)


if __name__ == "__main__":
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    main(worlds_=sizes.pop("worlds"), **sizes)
