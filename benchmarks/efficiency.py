"""How many tokens does a figure cost? Continuations where they count, against equal numbers for every branch.

    python benchmarks/efficiency.py --seeds 40

Nodes and their true successes are fixed; outcomes are drawn from the truth. The library spends a budget by its own
rounds, on prefixes that nodes share; the alternative gives every branch of every node the same number. Tokens for the
same mean squared error are read from both curves of error against tokens.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from populations import Population, World, synthetic, worlds

from odp_callbacks.analysis.estimators import gradient_figures
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.node_estimates import statuses
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.tree.budget import Seen, look, spend
from odp_callbacks.engine.tree.continuations import Outcomes, Spent, Tree
from odp_callbacks.engine.tree.recording import with_outcomes
from odp_callbacks.storage import load

EQUAL = (8, 16, 32)
"""Continuations of every branch."""


class Drawn:
    """Outcomes drawn from the truth: nodes, the success of each branch, the tokens that a continuation takes.

    Nodes of one group have the same prefix.
    """

    def __init__(self, evidence: Evidence, success: np.ndarray, length: np.ndarray, group: np.ndarray) -> None:
        self.evidence, self.success, self.length, self.group = evidence, success, length, group
        self.first = np.unique(group, return_index=True)[1]
        self.open = evidence.real & ~evidence.exact

    def truth(self) -> Evidence:
        """Everything known for certain."""
        known = np.ones_like(self.success)
        return replace(self.evidence, count=known, total=self.success, total_square=self.success**2, exact=known > 0)

    def telling(self) -> "Drawn":
        """The nodes whose alignment is known: in truth their successes differ."""
        there = self.truth().ideal_norm > 0
        group = np.unique(self.group[there], return_inverse=True)[1]
        return Drawn(self.evidence.take(there), self.success[there], self.length[there], group)

    def _seen(self, wins: np.ndarray, count: np.ndarray) -> Evidence:
        count, wins = np.where(self.open, count, 1).astype(float), np.where(self.open, wins, self.evidence.total)
        return replace(self.evidence, count=count, total=wins, total_square=wins)

    def equal(self, n: int, rng: np.random.Generator) -> tuple[Evidence, float]:
        """As many continuations of every branch of every node, and the tokens they take."""
        count = np.where(self.open, n, 0)
        return self._seen(rng.binomial(count, self.success), count), float((count * self.length).sum())

    def adaptive(self, tokens: float, target: str, rng: np.random.Generator) -> tuple[Evidence, float]:
        """The library's rounds within a budget, and the tokens they took."""
        open_, success, length = self.open[self.first], self.success[self.first], self.length[self.first]
        count, wins, spent = np.zeros(open_.shape), np.zeros(open_.shape), Spent()

        def sample(more: np.ndarray) -> None:
            more = np.where(open_, more, 0)
            count[...] += more
            wins[...] += rng.binomial(more, success)
            spent.tokens += int((more * length).sum())

        def seen() -> Seen:
            evidence = self._seen(wins[self.group], count[self.group])
            return Seen(evidence, self.group, count, open_, length.mean(axis=1).clip(min=1))

        config = ProbeConfig(budget=max(1, int(tokens)), target=target)
        spend(config, open_.astype(np.int64), spent, sample, seen, lambda evidence: np.inf, rng)
        return seen().evidence, float(spent.tokens)


class Walked(Drawn):
    """An enumerated world: continuations are walked, so what passes through other nodes counts there too."""

    def __init__(self, world: World) -> None:
        self.world = world
        super().__init__(gather(world.records), world.success, world.length, np.array(world.tree.group))

    def adaptive(self, tokens: float, target: str, rng: np.random.Generator) -> tuple[Evidence, float]:
        """The library's rounds within a budget, and the tokens they took."""
        world, spent = self.world, Spent()
        tree = Tree(world.tree.rollouts, world.tree.nodes)
        tree.set_branches(world.tree.branches)
        for row, known in zip(tree.outcomes, world.tree.outcomes, strict=True):
            row[:] = [o if o.exact else Outcomes() for o in known]

        def sample(more: np.ndarray) -> None:
            for g, row in enumerate(tree.branches):
                node, start = tree.nodes[tree.first[g]], tree.prefix(tree.first[g])
                question = int(tree.rollouts[node.rollout].question.id)
                for b, branch in enumerate(row):
                    for _ in range(int(more[g, b]) if not tree.outcomes[g][b].exact else 0):
                        response, reward = world.walk(question, (*start, branch.token), rng)
                        tree.add(g, b, response, reward)
                        took = len(response) - len(start) - 1
                        spent.tokens += took
                        tree.length[g] = tree.length[g][0] + took, tree.length[g][1] + 1

        def seen() -> Seen:
            records = [with_outcomes(r, tree.at(n)) for n, r in enumerate(world.records)]
            return look(tree, gather(records), world.expected)

        size = max(map(len, tree.branches))
        first = np.array([[int(b < len(row)) for b in range(size)] for row in tree.branches])
        config = ProbeConfig(budget=max(1, int(tokens)), target=target)
        spend(config, first, spent, sample, seen, lambda evidence: np.inf, rng)
        return seen().evidence, float(spent.tokens)


def figures(evidence: Evidence, name: str) -> np.ndarray:
    """A figure of every teacher over all nodes."""
    correction, status = correct_for_noise(evidence), statuses(evidence)
    everything = np.ones(len(evidence.correct), bool)
    found = []
    for k in range(evidence.teacher_norm.shape[1]):
        e = gradient_figures(evidence, correction, k, everything, status[:, k])[name]
        found.append(float(e.function(np.ones(len(e.questions)))))
    return np.array(found)


Run = Callable[[int], tuple[Evidence, float]]


def curve(run: Run, name: str, truth: np.ndarray, seeds: int) -> tuple[float, float]:
    """Mean tokens and mean squared error over seeds and teachers."""
    errors, tokens = [], []
    for seed in range(seeds):
        evidence, spent = run(seed)
        errors.append(((figures(evidence, name) - truth) ** 2).mean())
        tokens.append(spent)
    return float(np.mean(tokens)), float(np.mean(errors))


def ratio(fixed: Drawn, name: str, seeds: int, start: int = 0) -> dict[str, float]:
    """Tokens of equal numbers over those of the library, for the same mean squared error."""
    if name == "alignment" and type(fixed) is Drawn:
        fixed = fixed.telling()
    truth = figures(fixed.truth(), name)

    def stream(seed: int) -> np.random.Generator:
        return np.random.default_rng(10_000 * start + seed)

    even = [curve(lambda s, n=n: fixed.equal(n, stream(s)), name, truth, seeds) for n in EQUAL]
    one = even[0][0] / EQUAL[0]  # one continuation of every branch of every node
    points = []
    for budget in (1.5, 2, 3, 4, 6, 8, 12):
        points.append(curve(lambda s, b=budget: fixed.adaptive(b * one, name, stream(s)), name, truth, seeds))

    def tokens_for(curve_: list[tuple[float, float]], error: float) -> float:
        """Tokens for an error, by the power law that fits best: errors fall as a power of tokens."""
        t, e = np.log(np.array(curve_).T)
        slope, level = np.polyfit(e, t, 1)
        return float(np.exp(slope * np.log(error) + level))

    def reached(error: float) -> bool:
        """Whether both curves pass through an error: nothing is extrapolated."""
        return all(min(e for _, e in c) <= error <= max(e for _, e in c) for c in (even, points))

    found = {f"error of n = {n}": (e, t) for n, (t, e) in zip(EQUAL, even, strict=True)}
    if name != "predicted_gain":
        error = (0.1 / 1.96) ** 2
        found["half-width 0.1"] = (error, tokens_for(even, error))
    return {key: t / tokens_for(points, e) if reached(e) else float("nan") for key, (e, t) in found.items()}


def heavy(path: Path) -> Drawn:
    """The committed heavy run on SmolLM2-135M: its successes stand for the truth."""
    report = load(path)
    evidence = gather(report.nodes)
    length = np.ones_like(evidence.count) * np.array(json.loads(report.settings["lengths"]))[:, None]
    prefixes = [(n.question, report.rollouts[n.rollout].pieces[: n.depth]) for n in report.nodes]
    group = np.array([list(dict.fromkeys(prefixes)).index(prefix) for prefix in prefixes])
    first = np.unique(group, return_index=True)[1]
    return Drawn(evidence, evidence.success[first][group], length.clip(min=1), group)


def some(population: Population, questions: int, seed: int) -> Drawn:
    """Some questions of a synthetic population; a continuation takes one token."""
    index = population.sample(questions, np.random.default_rng(seed))
    evidence, success = population.evidence.take(index), population.success[index]
    number = np.repeat(np.arange(questions), population.per_question)
    return Drawn(replace(evidence, question=number), success, np.ones_like(success), np.arange(len(index)))


def main() -> None:
    """Print a line for each set of nodes and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--world-seeds", type=int, default=10)
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--figures", nargs="+", default=["predicted_gain", "gain_weighted_alignment", "alignment"])
    parser.add_argument("--only", nargs="+", default=["SmolLM2", "worlds", "synthetic"])
    options = parser.parse_args()
    sources: list[tuple[str, list[Drawn]]] = []
    path = Path(__file__).parent / "results" / "heavy"
    if path.exists() and "SmolLM2" in options.only:
        sources.append(("SmolLM2-135M", [heavy(path)] * options.sets))
    if "worlds" in options.only:
        sources.append((f"{options.worlds} enumerated worlds", [Walked(w) for w in worlds(options.worlds)]))
    if "synthetic" in options.only:
        population = synthetic(0.35, 400)
        sources.append(("synthetic, sd 0.35", [some(population, options.questions, s) for s in range(options.sets)]))
    for label, sets in sources:
        for name in options.figures:
            seeds = options.world_seeds if isinstance(sets[0], Walked) else options.seeds
            rows = [ratio(fixed, name, seeds, i) for i, fixed in enumerate(sets)]
            for key in rows[0]:
                values = np.array([row[key] for row in rows])
                values = values[~np.isnan(values)]
                place = f"{label:22} {name:24} {key:16}"
                if not len(values):
                    print(f"{place} in reach of none of {len(rows)}", flush=True)
                    continue
                print(
                    f"{place} {np.exp(np.log(values).mean()):5.1f} times fewer tokens; {np.quantile(values, 0.1):.1f} "
                    f"to {np.quantile(values, 0.9):.1f} (10 % to 90 % of {len(values)} in reach, of {len(rows)})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
