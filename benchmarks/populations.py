"""Populations of nodes whose truth is known: synthetic ones, and worlds small enough to enumerate."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import recording_trees

from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.planning import remaining_length
from odp_callbacks.records import NodeRecord, ProbeReport

NODES, ROLLOUTS, BRANCHES, TEACHERS, PARAMETERS = 4, 2, 4, 2, 12
"""Of a synthetic population: nodes of a rollout, rollouts of a question, branches of a node, teachers, parameters."""
WORLD_SHAPES = [(5, 6), (6, 5), (8, 4), (7, 5)]
"""Vocabulary and longest response of enumerated worlds."""
WEIGHT_SPREAD = 0.9
"""Standard deviation of the weights of their students and teachers."""
Response = tuple[int, ...]
Walk = Callable[[int, Response, np.random.Generator], tuple[Response, float]]


@dataclass
class Population:
    """Nodes by question, with the true success of each branch.

    Attributes:
        evidence: All nodes; question ``i`` has the nodes from ``i * nodes_per_question`` on.
        success: ``(N, A)``.
        nodes_per_question: Nodes of a question.
    """

    evidence: Evidence
    success: np.ndarray
    nodes_per_question: int

    @property
    def questions(self) -> int:
        return len(self.success) // self.nodes_per_question

    def exact(self) -> Evidence:
        """All nodes with their success known."""
        ones = np.ones_like(self.success)
        return replace(self.evidence, count=ones, total=self.success, total_square=self.success**2, exact=ones > 0)

    def sample(self, questions: int, rng: np.random.Generator) -> np.ndarray:
        """Nodes of some questions, drawn without replacement."""
        chosen = rng.choice(self.questions, questions, replace=False)
        return (chosen[:, None] * self.nodes_per_question + np.arange(self.nodes_per_question)).ravel()

    def probe(self, questions: int, continuations: int | np.ndarray, rng: np.random.Generator) -> Evidence:
        """Some questions, with as many continuations of each branch; rewards are 0 or 1."""
        index = self.sample(questions, rng)
        evidence = self.evidence.take(index)
        count = np.where(evidence.real & ~evidence.exact, continuations, 1)
        wins = np.where(evidence.exact, evidence.total, rng.binomial(count, self.success[index].clip(0, 1)))
        return replace(
            evidence,
            question=np.repeat(np.arange(questions), self.nodes_per_question),
            count=count.astype(float),
            total=wins.astype(float),
            total_square=wins.astype(float),
        )


def synthetic(spread: float, questions: int = 3000, seed: int = 0, link: float = 0.0) -> Population:
    """Nodes with drawn gradients, whose policies are as peaked as a language model's.

    Teachers align with the ideal gradient to a chosen degree: 0.05 on correct rollouts and 0.30 on incorrect ones, the
    second teacher 0.1 less, varied by question and node.

    Args:
        spread: Standard deviation of success over the branches of a node.
        questions: How many questions.
        seed: Seed of numpy's generator.
        link: How far alignment grows with the logarithm of the ideal gradient's norm.
    """
    rng = np.random.default_rng(seed)
    nodes_per_question = NODES * ROLLOUTS
    node_count = questions * nodes_per_question
    question = np.repeat(np.arange(questions), nodes_per_question)
    success_rate = rng.beta(1.5, 1.5, size=questions)
    success = _branch_success(success_rate[question], spread, rng)
    contributions = _branch_contributions(node_count, rng)
    ideal = np.einsum("na,nap->np", success, contributions)
    correct = np.repeat(rng.random((questions, ROLLOUTS)) < success_rate[:, None], NODES, axis=1).ravel()
    level = np.where(correct, 0.05, 0.30)
    gain_forms = [
        _gain_form(level - 0.1 * teacher, ideal, contributions, question, link, rng) for teacher in range(TEACHERS)
    ]
    every_branch = np.ones((node_count, BRANCHES), bool)
    evidence = Evidence(
        question=question,
        token_weight=np.tile([1.0, 1.0, 2.0, 4.0], node_count // NODES),
        correct=correct,
        depth=np.tile([0, 1, 2, 5], node_count // NODES),
        norm_form=np.einsum("nap,nbp->nab", contributions, contributions),
        gain_form=np.stack(gain_forms, axis=1),
        teacher_norm=np.ones((node_count, TEACHERS)),
        real=every_branch,
        count=every_branch.astype(float),
        total=success,
        total_square=success,
        exact=~every_branch,
        certain=~every_branch[:, 0],
        gradient_weight=np.ones(node_count),
    )
    return Population(evidence, success, nodes_per_question)


def _branch_success(success_rate: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """``(N, A)``, around the success rates ``(N,)`` of the nodes' questions; nowhere are all branches equal."""
    node_count = len(success_rate)
    node_success = (success_rate + 0.15 * rng.normal(size=node_count)).clip(0.05, 0.95)
    success = (node_success[:, None] + spread * rng.normal(size=(node_count, BRANCHES))).clip(0, 1)
    all_equal = np.ptp(success, axis=1) == 0
    success[all_equal] = rng.random((all_equal.sum(), BRANCHES))
    return success


def _branch_contributions(node_count: int, rng: np.random.Generator) -> np.ndarray:
    """``(N, A, P)``: what a branch's success adds to the ideal gradient; they sum to 0 over the branches."""
    policy = np.sort(rng.dirichlet([3.0, 0.8, 0.5, 0.3], size=node_count).clip(1e-3), axis=1)[:, ::-1]
    policy = policy / policy.sum(axis=1, keepdims=True)
    gradients = rng.normal(size=(node_count, BRANCHES, PARAMETERS)) + 0.5 * rng.normal(size=(node_count, 1, PARAMETERS))
    scores = gradients - np.einsum("na,nap->np", policy, gradients)[:, None]
    contributions = policy[:, :, None] * scores
    contributions[:, 0] = -contributions[:, 1:].sum(axis=1)
    return contributions


def _gain_form(
    level: np.ndarray,
    ideal: np.ndarray,
    contributions: np.ndarray,
    question: np.ndarray,
    link: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """``(N, A)`` of one teacher, whose cosine with the ideal gradient ``(N, P)`` is around ``level`` ``(N,)``."""
    node_count = len(level)
    norm = np.linalg.norm(ideal, axis=1)
    unit_ideal = ideal / norm[:, None]
    by_question = 0.2 * rng.normal(size=question[-1] + 1)[question]
    by_node = 0.4 * rng.normal(size=node_count)
    cosine = np.tanh(np.arctanh(level) + by_question + by_node + link * (np.log(norm) - np.log(norm).mean()))
    orthogonal = rng.normal(size=(node_count, PARAMETERS))
    orthogonal -= (orthogonal * unit_ideal).sum(1, keepdims=True) * unit_ideal
    orthogonal /= np.linalg.norm(orthogonal, axis=1, keepdims=True)
    direction = cosine[:, None] * unit_ideal + np.sqrt(1 - cosine**2)[:, None] * orthogonal
    return np.einsum("nap,np->na", contributions, direction)


@dataclass
class World:
    """An enumerated world that was probed once: its nodes, and how to continue from them.

    Attributes:
        records: Of the nodes.
        tree: Their prefixes and branches.
        success: ``(N, A)``, exact.
        length: ``(N, A)``, the expected number of tokens of a continuation.
        walk: From a question's index, a prefix and a random stream to a whole response and its reward.
        expected_lengths: ``(G,)``, the lengths that the rollouts suggest.
    """

    records: list[NodeRecord]
    tree: ContinuationTree
    success: np.ndarray
    length: np.ndarray
    walk: Walk
    expected_lengths: np.ndarray


def worlds(count: int, questions: int = 12, seed: int = 0, peak: float = 3.0) -> list[World]:
    """Enumerated worlds: tiny students with LoRA whose every response is known, as peaked as a language model.

    Nodes and gradients are those of one probe of the library; successes and lengths are exact.

    Args:
        count: How many worlds.
        questions: Questions of each.
        seed: Seed of the first.
        peak: Scales the logits: the larger it is, the more certain student and teachers are of their next token.
    """
    return [
        _enumerate_world(seed + world_index, *WORLD_SHAPES[world_index % len(WORLD_SHAPES)], questions, peak)
        for world_index in range(count)
    ]


def _enumerate_world(seed: int, vocabulary: int, horizon: int, questions: int, peak: float) -> World:
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.helpers.models import tiny_base
    from tests.helpers.worlds import make_world, reward_table

    world = make_world(seed=seed, size=vocabulary, horizon=horizon, structured=True, initializer_range=WEIGHT_SPREAD)
    special_tokens = {"eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
    teachers = {
        name: tiny_base(seed=seed + shift, vocabulary=vocabulary, initializer_range=WEIGHT_SPREAD, **special_tokens)
        for name, shift in (("a", 40), ("b", 80))
    }
    for model in (world.model.get_base_model(), *teachers.values()):
        model.lm_head.weight.data.mul_(peak)
    with torch.no_grad():
        policy = {prefix: torch.softmax(node.logits, -1).numpy() for prefix, node in world.solve().items()}
    rewards = [reward_table(world, 1000 * seed + question, structured=True) for question in range(questions)]

    def reward(prompts: Any, completions: list[str], question: list[int]) -> list[float]:
        return [rewards[index][text] for index, text in zip(question, completions, strict=True)]

    def walk(question: int, response: Response, rng: np.random.Generator) -> tuple[Response, float]:
        while response in policy:
            response = (*response, int(np.searchsorted(policy[response].cumsum(), rng.random())))
        return response, rewards[question][world.text(response)]

    config = ProbeConfig(
        rollouts_per_question=4,
        max_new_tokens=horizon,
        continuations=1,
        batch_size=500,
        step_alignment=False,
        differing_gradients=1.0,  # the truth about every node
        agreeing_gradients=1.0,
    )
    probe = Probe(world.model, world.tokenizer, reward, teachers, config)
    rows = [{"prompt": world.prompt, "question": question} for question in range(questions)]
    with recording_trees() as trees:
        report = probe.run(rows, seed=seed)
    (tree,) = trees
    success, length = _exact_success_and_length(report, tree, policy, rewards, world.text)
    expected_lengths = np.array(
        [remaining_length(tree.rollouts, tree.nodes[first_node].depth) for first_node in tree.first_nodes]
    )
    return World(list(report.nodes), tree, success.clip(0, 1), length, walk, expected_lengths)


def _exact_success_and_length(
    report: ProbeReport,
    tree: ContinuationTree,
    policy: Mapping[Response, np.ndarray],
    rewards: list[dict[str, float]],
    text: Callable[[Response], str],
) -> tuple[np.ndarray, np.ndarray]:
    """``(N, A)`` each: the expected reward behind every branch, and the expected number of tokens after it."""
    shape = gather(report.nodes).success.shape
    success, length = np.zeros(shape), np.ones(shape)
    for question, reward_of in enumerate(rewards):
        value: dict[Response, np.ndarray] = {}
        tokens: dict[Response, np.ndarray] = {}
        for prefix in sorted(policy, key=len, reverse=True):
            children = [(*prefix, token) for token in range(len(policy[prefix]))]
            value[prefix] = np.array(
                [policy[child] @ value[child] if child in value else reward_of[text(child)] for child in children]
            )
            tokens[prefix] = np.array(
                [1 + policy[child] @ tokens[child] if child in tokens else 0.0 for child in children]
            )
        for node_index, record in enumerate(report.nodes):
            if record.question == str(question):
                prefix = tree.prefix(node_index)
                success[node_index, : len(record.tokens)] = value[prefix][record.tokens]
                length[node_index, : len(record.tokens)] = tokens[prefix][record.tokens]
    return success, length
