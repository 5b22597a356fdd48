"""How many tokens does an interval cost? Continuations where they count, against equal numbers for every branch.

    python benchmarks/efficiency.py --seeds 20

Nodes and their true successes are fixed; outcomes are drawn from the truth. Both ways use the library's own
allocation, the equal one with as many continuations of every branch. Tokens for the same mean squared error: the
adaptive error is measured at several budgets, the equal one at several n, and the ratio is read where both reach the
error of n = 8.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from populations import Population, synthetic, worlds

from odp_callbacks.correction import correct
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.continuing import Seen, spend
from odp_callbacks.engine.success import Spent
from odp_callbacks.estimates import statuses
from odp_callbacks.evidence import Evidence
from odp_callbacks.figures import gradient_figures

EQUAL = (4, 8, 16, 32)
"""Continuations of every branch."""


@dataclass
class Fixed:
    """Nodes with known truth, and the tokens that a continuation of each branch takes."""

    evidence: Evidence
    success: np.ndarray
    length: np.ndarray

    @property
    def open(self) -> np.ndarray:
        return self.evidence.real & ~self.evidence.exact

    def seen(self, wins: np.ndarray, count: np.ndarray) -> Evidence:
        known = self.evidence.exact | ~self.evidence.real
        count, wins = np.where(known, 1, count).astype(float), np.where(known, self.evidence.total, wins)
        return replace(self.evidence, count=count, total=wins, total_square=wins)


def figures(evidence: Evidence, name: str) -> np.ndarray:
    """A figure of every teacher over all nodes."""
    correction, status = correct(evidence), statuses(evidence)
    everything = np.ones(len(evidence.correct), bool)
    found = []
    for k in range(evidence.teacher_norm.shape[1]):
        e = gradient_figures(evidence, correction, k, everything, status[:, k])[name]
        found.append(float(e.function(np.ones(len(e.questions)))))
    return np.array(found)


def equal(fixed: Fixed, n: int, rng: np.random.Generator) -> tuple[Evidence, float]:
    """The same number of continuations of every branch, and the tokens they take."""
    count = np.where(fixed.open, n, 0)
    return fixed.seen(rng.binomial(count, fixed.success), count), float((count * fixed.length).sum())


def adaptive(fixed: Fixed, tokens: float, target: str, rng: np.random.Generator) -> tuple[Evidence, float]:
    """The library's rounds within a budget, and the tokens they took."""
    count, wins, spent = np.zeros(fixed.open.shape), np.zeros(fixed.open.shape), Spent()

    def sample(more: np.ndarray) -> None:
        more = np.where(fixed.open, more, 0)
        count[...] += more
        wins[...] += rng.binomial(more, fixed.success)
        spent.tokens += int((more * fixed.length).sum())

    def seen() -> Seen:
        return Seen(
            fixed.seen(wins, count), np.arange(len(count)), count, fixed.open, fixed.length.mean(axis=1).clip(min=1)
        )

    config = ProbeConfig(budget=max(1, int(tokens)), target=target)
    spend(config, fixed.open.astype(np.int64), spent, sample, seen, lambda e: np.inf, rng)
    return seen().evidence, float(spent.tokens)


def curve(
    run: Callable[[int], tuple[Evidence, float]], name: str, truth: np.ndarray, seeds: int
) -> tuple[float, float]:
    """Mean tokens and mean squared error over seeds and teachers."""
    errors, tokens = [], []
    for seed in range(seeds):
        evidence, spent = run(seed)
        errors.append(((figures(evidence, name) - truth) ** 2).mean())
        tokens.append(spent)
    return float(np.mean(tokens)), float(np.mean(errors))


def ratio(fixed: Fixed, name: str, seeds: int, start: int = 0) -> dict[str, float]:
    """Tokens of equal numbers over those of the adaptive way, at the error of n = 8 and at a half-width of 0.1."""
    known = np.ones_like(fixed.success)
    truth = figures(replace(fixed.evidence, count=known, total=fixed.success, exact=known > 0), name)

    def stream(seed: int) -> np.random.Generator:
        return np.random.default_rng(10_000 * start + seed)

    even = [curve(lambda s, n=n: equal(fixed, n, stream(s)), name, truth, seeds) for n in EQUAL]
    unit = even[1][0] / 8
    one = unit  # one continuation of every branch
    points = []
    for budget in (1.05, 1.25, 1.5, 2, 3, 4, 6, 8, 12):
        points.append(curve(lambda s, b=budget: adaptive(fixed, b * one, name, stream(s)), name, truth, seeds))

    def tokens_for(curve_: list[tuple[float, float]], error: float) -> float:
        """Least tokens for an error; errors fall with tokens, noise aside."""
        t, e = np.array(curve_).T
        e = np.minimum.accumulate(e)
        if e[0] <= error:
            return float(t[0])
        return float(np.exp(np.interp(-np.log(error), -np.log(e), np.log(t)))) if e[-1] <= error else float("nan")

    found = {f"n = {n}": t / tokens_for(points, e) for n, (t, e) in zip(EQUAL, even, strict=True)}
    error = (0.1 / 1.96) ** 2
    if name != "predicted_gain" and even[0][1] > error:
        found["half-width 0.1"] = tokens_for(even, error) / tokens_for(points, error)
    return found


def heavy(path: Path) -> Fixed:
    """The committed heavy run on SmolLM2-135M: its successes stand for the truth."""
    from odp_callbacks.storage import load

    report = load(path)
    from odp_callbacks.evidence import gather

    evidence = gather(report.nodes)
    lengths = json.loads(str(report.settings["lengths"]))
    length = np.ones_like(evidence.count)
    for n, row in enumerate(lengths):
        length[n, : len(row)] = row
    return Fixed(evidence, evidence.success, length.clip(min=1))


def fixed_of(population: Population, questions: int, seed: int) -> Fixed:
    """Some questions of a population."""
    rng = np.random.default_rng(seed)
    evidence = population.probe(questions, 1, rng)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(population.questions, questions, replace=False)
    index = (chosen[:, None] * population.per_question + np.arange(population.per_question)).ravel()
    length = np.ones_like(population.success) if population.length is None else population.length
    return Fixed(evidence, population.success[index].clip(0, 1), length[index])


def main() -> None:
    """Print a line for each set of nodes and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--worlds", type=int, default=20)
    options = parser.parse_args()
    names = ("predicted_gain", "gain_weighted_alignment", "alignment")
    sources: list[tuple[str, list[Fixed]]] = [
        ("synthetic, sd 0.35", [fixed_of(synthetic(0.35, 400), options.questions, s) for s in range(options.sets)]),
    ]
    if options.worlds:
        sources.append(
            (
                f"{options.worlds} enumerated worlds",
                [Fixed(w.evidence, w.success, w.length.clip(min=1)) for w in worlds(options.worlds)],
            )
        )
    path = Path(__file__).parent / "results" / "heavy"
    if path.exists():
        sources.append(("SmolLM2-135M", [heavy(path)] * options.sets))
    for label, sets in sources:
        for name in names:
            rows = [ratio(fixed, name, options.seeds, i) for i, fixed in enumerate(sets)]
            for key in rows[0]:
                values = np.array([row.get(key, np.nan) for row in rows])
                values = values[~np.isnan(values)]
                if len(values):
                    print(
                        f"{label:22} {name:24} {key:15} {np.exp(np.log(values).mean()):5.1f} times fewer tokens "
                        f"({values.min():.1f} to {values.max():.1f} over {len(values)})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
