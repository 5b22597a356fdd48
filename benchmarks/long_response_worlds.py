"""Worlds for ``long_responses.py``: nodes with the exact success of every branch, and continuations from them.

Two of them: a Markov chain whose responses may be arbitrarily long, and a tiny student whose every response is
enumerated. A node's branches each have one continuation, with what a forced answer would have given on the way.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BLOCKS, STATES = 64, 9
"""A response of the chain has at most 64 blocks of tokens; its state says how likely it is to end well."""
CHECKPOINTS = (1, 2, 4, 8, 16, 32)
"""Distances from the node, in blocks, at which a continuation could be cut and asked for its answer."""
POLICY = np.array([0.6, 0.25, 0.15])
SLOPES = POLICY * (np.array([0.0, 1.0, -1.0]) - POLICY @ [0.0, 1.0, -1.0])
"""What each branch's success adds to the gain, as a teacher that prefers the second branch to the third has it."""
PIVOTAL = 0.1
"""Share of positions where the branches differ in success."""


@dataclass(frozen=True)
class NodeDraws:
    """``N`` nodes of rollouts, drawn uniformly from the positions of each; with ``A`` branches, ``J`` checkpoints.

    Attributes:
        rollout: ``(N,)``, the rollout of each node.
        positions: ``(N,)``, tokens of the rollout, over their mean: the inverse inclusion probability of one draw.
        slopes: ``(N, A)``, weight of each branch's success in the figure.
        policy: ``(N, A)``, the student's probability of each branch.
        success: ``(N, A)``, exact.
        answers: ``(N, J + 2, A)``: what a forced answer is worth at the node's branches, at the checkpoints of the
            continuation, and last the reward of the finished response. After its end every entry is the reward.
        tokens: ``(N, J + 1, A)``, tokens sampled up to each checkpoint from the one before, as a share of the longest
            response.
        running: ``(N, J + 1, A)`` bool, whether the continuation had not ended before.
        predictors: ``(N, F)``, what is known of a node without a token more.
    """

    rollout: NDArray[np.int64]
    positions: Floats
    slopes: Floats
    policy: Floats
    success: Floats
    answers: Floats
    tokens: Floats
    running: NDArray[np.bool_]
    predictors: Floats

    def take(self, chosen: NDArray[np.bool_]) -> "NodeDraws":
        """Some of the nodes."""
        return NodeDraws(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def of_success(self) -> "NodeDraws":
        """The same nodes for the student's own success in place of the gain."""
        return replace(self, slopes=self.policy)


def chain(name: str, rollouts: int, nodes: int, rng: np.random.Generator) -> NodeDraws:
    """Nodes of a chain's responses.

    Args:
        name: When the outcome is decided (``"early"``, ``"even"``, ``"late"``); forced answers see the state
            through some noise, ``"poor answers"`` through much, ``"sharp answers"`` through little.
        rollouts: How many rollouts.
        nodes: Nodes of each.
        rng: Random stream.
    """
    block = np.arange(BLOCKS)
    decided = {"early": block < BLOCKS // 4, "even": block >= 0, "late": block >= 3 * BLOCKS // 4}[name.split(",")[0]]
    moving = np.where(decided, 0.25 * BLOCKS / decided.sum(), 0.02)
    ending = np.where(block < BLOCKS // 4, 0.0, 0.04)
    ending[-1] = 1.0
    levels = np.arange(STATES) - STATES // 2
    worth = 1 / (1 + np.exp(-3.0 * levels))

    blur = {"poor answers": 4.0, "sharp answers": 0.2}.get(name.split(", ")[-1], 1.0)

    def asked(state: NDArray[np.int64]) -> Floats:
        """Success of an answer that is forced now: it is a little less likely than later, and sees a noisy state."""
        seen = levels[state] + blur * rng.standard_normal(state.shape)
        answer: Floats = 1 / (1 + np.exp(0.5 - seen))
        return answer

    step = np.zeros((BLOCKS, STATES, STATES))
    for state in range(STATES):
        for change, share in ((-1, 0.5), (1, 0.5)):
            step[:, state, np.clip(state + change, 0, STATES - 1)] += share * moving
        step[:, state, state] += 1 - moving
    value = np.zeros((BLOCKS + 1, STATES))
    for time in reversed(range(BLOCKS)):
        value[time] = step[time] @ (ending[time] * worth + (1 - ending[time]) * value[time + 1])

    paths, length = _walk(np.full(rollouts, STATES // 2), np.zeros(rollouts, int), moving, ending, rng)
    own_reward = rng.random(rollouts) < worth[paths[-1]]
    rollout = np.repeat(np.arange(rollouts), nodes)
    start = (rng.random(len(rollout)) * length[rollout]).astype(int)
    state = paths[start, rollout]
    shift = (rng.random(len(rollout)) < PIVOTAL)[:, None] * np.array([0, 1, -1])
    branch = np.clip(state[:, None] + shift, 0, STATES - 1)  # (N, A)

    starts = np.repeat(start, branch.shape[1])
    states, ends = _walk(branch.ravel(), starts, moving, ending, rng)
    reward = (rng.random(len(starts)) < worth[states[-1]]).astype(float)
    columns = np.arange(len(starts))
    answers, tokens, running, before = [asked(branch.ravel())], [], [], starts
    for distance in (*CHECKPOINTS, BLOCKS):
        there = np.minimum(starts + distance, ends)
        tokens.append((there - before) / BLOCKS)
        running.append(before < ends)
        answers.append(np.where(there < ends, asked(states[there, columns]), reward))
        before = there
    shape = branch.shape
    predictors = [np.ones(len(rollout)), start / BLOCKS, length[rollout] / BLOCKS, own_reward[rollout]]
    predictors += [levels[state] + 2 * rng.standard_normal(len(rollout))]
    return NodeDraws(
        rollout,
        length[rollout] / length.mean(),
        np.broadcast_to(SLOPES, shape),
        np.broadcast_to(POLICY, shape),
        value[start[:, None], branch],
        np.stack([answer.reshape(shape) for answer in answers], axis=1),
        np.stack([token.reshape(shape) for token in tokens], axis=1),
        np.stack([flag.reshape(shape) for flag in running], axis=1),
        np.stack(predictors, axis=1),
    )


def _walk(
    state: NDArray[np.int64], start: NDArray[np.int64], moving: Floats, ending: Floats, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """States ``(65, W)`` at the beginning of each block, the last one at the end; and the block before which it ends.

    A walk stands still before it starts and after it has ended.
    """
    states, end = [state], np.full(len(state), BLOCKS)
    for time in range(BLOCKS):
        walking = (start <= time) & (time < end)
        change = np.where(rng.random(len(state)) < moving[time], 2 * rng.integers(0, 2, len(state)) - 1, 0)
        state = np.clip(state + walking * change, 0, STATES - 1)
        end = np.where(walking & (rng.random(len(state)) < ending[time]), time + 1, end)
        states.append(state)
    return np.stack(states), end


def enumerated(seed: int, rollouts: int, rng: np.random.Generator) -> NodeDraws:
    """Nodes of a tiny student, three of each rollout; a forced answer ends the response where it is.

    Args:
        seed: Of the student, its rewards and the teacher.
        rollouts: How many rollouts.
        rng: Random stream.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.helpers.worlds import make_world

    world = make_world(seed=seed, size=5, horizon=6, structured=True, initializer_range=0.9)
    with torch.no_grad():
        solved = world.solve()
    policy = {prefix: torch.softmax(node.logits, dim=-1).numpy() for prefix, node in solved.items()}
    preference = {prefix: np.random.default_rng([seed, *prefix]).normal(size=world.size) for prefix in policy}

    def worth(response: tuple[int, ...]) -> float:
        return world.table[world.text(response)]

    def walk(response: tuple[int, ...], limit: float = np.inf) -> tuple[int, ...]:
        first = len(response)
        while response in policy and len(response) - first < limit and (not response or response[-1]):
            response = (*response, int(np.searchsorted(policy[response].cumsum(), rng.random())))
        return response

    found = []
    responses = [walk(()) for _ in range(rollouts)]
    for rollout, whole in [(rollout, whole) for rollout, whole in enumerate(responses) for _ in range(3)]:
        depth = int(rng.integers(len(whole)))
        prefix = whole[:depth]
        p = policy[prefix]
        branches = [(*prefix, token) for token in range(world.size)]
        answers, tokens, running = [[worth(branch) for branch in branches]], [], []
        for distance in (1, 2, world.horizon):
            longer = [walk(branch, depth + 1 + distance - len(branch)) for branch in branches]
            tokens.append([(len(b) - len(a)) / world.horizon for a, b in zip(branches, longer, strict=True)])
            running.append([len(b) > len(a) for a, b in zip(branches, longer, strict=True)])
            answers.append([worth(branch) for branch in longer])
            branches = longer
        slopes = p * (preference[prefix] - p @ preference[prefix])
        success = solved[prefix].success.numpy()
        known = [1.0, depth, len(whole), worth(whole), -(p * np.log(p)).sum()]
        found.append((rollout, len(whole), slopes, p, success, answers, tokens, running, known))
    columns = [np.array(column) for column in zip(*found, strict=True)]
    columns[1] = columns[1] / columns[1].mean()
    return NodeDraws(*columns)


def of_student(draws: int, rng: np.random.Generator) -> NodeDraws:
    """Nodes of SmolLM2; the model is loaded only here."""
    from long_response_student import student

    return student(draws, rng)


CHAINS = ("early, sharp answers", "early", "even", "late", "even, poor answers")
WORLDS: dict[str, Callable[[int, np.random.Generator], NodeDraws]] = {
    **{name: (lambda count, rng, name=name: chain(name, count, 8, rng)) for name in CHAINS},
    "enumerated": lambda count, rng: enumerated(5, count, rng),
    "student": of_student,
}
"""From a number of rollouts (of the student: of draws of each node) and a random stream to nodes."""
