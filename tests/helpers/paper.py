"""The paper's protocol on enumerated worlds, and what the truth says about its nodes."""

from functools import cache

import numpy as np
import torch

from odp_callbacks.analysis.paper.prefix_tree import TreeResponse, prefix_tree
from odp_callbacks.analysis.paper.records import PREDICTORS, PaperRecord
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes
from odp_callbacks.engine.paper import PaperConfig, PaperProbe
from tests.helpers.models import tiny_base
from tests.helpers.worlds import World, make_world

SIZE, HORIZON = 4, 4


def paper_world(seed: int = 3) -> World:
    return make_world(structured=True, size=SIZE, horizon=HORIZON, seed=seed, initializer_range=0.5)


def paper_teachers(count: int = 2, seed: int = 11) -> dict[str, torch.nn.Module]:
    options = {"vocabulary": SIZE, "eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
    return {f"teacher {i}": tiny_base(seed=seed + i, initializer_range=0.5, **options) for i in range(count)}


def measure_world(world: World, teachers: object, questions: int = 1, seed: int = 0, **options) -> PaperRecord:
    options = {"max_new_tokens": HORIZON, "rollouts_per_question": 40, "enriched_visits": 30, **options}
    probe = PaperProbe(world.model, world.tokenizer, world.reward, teachers, PaperConfig(**options))
    return probe.run([world.row] * questions, seed=seed)


@cache
def example_record() -> PaperRecord:
    return measure_world(paper_world(), paper_teachers(), questions=4, minimum_visits=5)


def true_success(world: World) -> dict[tuple[tuple[int, ...], int], float]:
    """The true success of each token at each node."""
    with torch.no_grad():
        nodes = world.solve()
    return {(prefix, k): float(node.success[k]) for prefix, node in nodes.items() for k in range(world.size)}


def random_nodes(count: int = 60, questions: int = 5, teachers: int = 2, seed: int = 0) -> ScoredNodes:
    """Scored nodes with figures that are drawn at random, some of them undefined."""
    rng = np.random.default_rng(seed)
    path = np.sort(rng.integers(0, 3 * questions, count))
    shape = (count, teachers)
    cosine = rng.uniform(-1, 1, shape).round(1)
    cosine[rng.random(shape) < 0.1] = np.nan
    return ScoredNodes(
        teachers=tuple(f"teacher {i}" for i in range(teachers)),
        question=path // 3,
        path=path,
        correct=path % 3 == 0,
        pass_rate=(path // 3 + 0.5) / questions,
        depth=rng.integers(0, 9, count),
        children=rng.integers(2, 5, count),
        success_range=rng.uniform(0.01, 1, count),
        cosine=cosine,
        advantage=rng.normal(size=shape),
        predictors={name: rng.normal(size=shape).round(1) for name in PREDICTORS},
    )


def random_tree(seed: int, responses: int = 40, paths: int = 3):
    """A tree of random responses over 3 tokens, some of them forced, with the responses themselves."""
    rng = np.random.default_rng(seed)

    def draw(prefix=()):
        return (*prefix, *rng.integers(1, 4, rng.integers(1, 5)).tolist())

    rollouts = [TreeResponse(draw(), float(rng.random() < 0.5)) for _ in range(responses)]
    own = list({rollout.tokens: index for index, rollout in reversed(list(enumerate(rollouts)))}.values())[:paths]
    targeted = []
    for branch in range(12):
        path = rollouts[own[int(rng.integers(len(own)))]].tokens
        depth = int(rng.integers(len(path)))
        token = int(rng.integers(1, 4))
        count = int(rng.integers(1, 4))
        targeted += [
            TreeResponse(draw((*path[:depth], token)), float(rng.random() < 0.5), depth, branch, count)
            for _ in range(3)
        ]
    return prefix_tree(own, rollouts).extended(targeted), [*rollouts, *targeted]
