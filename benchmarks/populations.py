"""Populations of nodes whose truth is known: synthetic ones, and worlds small enough to enumerate."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.tree.budget import remaining_length

NODES, ROLLOUTS, BRANCHES, TEACHERS, SIZE = 4, 2, 4, 2, 12


@dataclass
class Population:
    """Nodes by question, with the true success of each branch.

    Attributes:
        evidence: All nodes; question ``i`` holds the nodes from ``i * per_question`` on.
        success: ``(N, A)``.
        per_question: Nodes of a question.
    """

    evidence: Evidence
    success: np.ndarray
    per_question: int

    @property
    def questions(self) -> int:
        return len(self.success) // self.per_question

    def exact(self) -> Evidence:
        """All nodes with their success known."""
        ones = np.ones_like(self.success)
        return replace(self.evidence, count=ones, total=self.success, total_square=self.success**2, exact=ones > 0)

    def sample(self, questions: int, rng: np.random.Generator) -> np.ndarray:
        """Nodes of some questions, drawn without replacement."""
        chosen = rng.choice(self.questions, questions, replace=False)
        return (chosen[:, None] * self.per_question + np.arange(self.per_question)).ravel()

    def probe(self, questions: int, continuations: int | np.ndarray, rng: np.random.Generator) -> Evidence:
        """Some questions, with as many continuations of each branch; rewards are 0 or 1."""
        index = self.sample(questions, rng)
        found = self.evidence.take(index)
        count = np.where(found.real & ~found.exact, continuations, 1)
        wins = np.where(found.exact, found.total, rng.binomial(count, self.success[index].clip(0, 1)))
        return replace(
            found,
            question=np.repeat(np.arange(questions), self.per_question),
            count=count.astype(float),
            total=wins.astype(float),
            total_square=wins.astype(float),
        )


def synthetic(spread: float, questions: int = 3000, seed: int = 0, link: float = 0.0) -> Population:
    """Nodes with drawn gradients, as peaked as a language model's.

    Teachers align with the ideal gradient in a chosen measure: 0.05 on correct rollouts and 0.30 on incorrect ones,
    the second teacher 0.1 less, varied by question and node.

    Args:
        spread: Standard deviation of success over the branches of a node.
        questions: How many.
        seed: Of numpy's generator.
        link: How far alignment grows with the logarithm of the ideal gradient's norm.
    """
    r = np.random.default_rng(seed)
    per = NODES * ROLLOUTS
    n = questions * per
    q = np.repeat(np.arange(questions), per)
    rate = r.beta(1.5, 1.5, size=questions)
    value = (rate[q] + 0.15 * r.normal(size=n)).clip(0.05, 0.95)
    success = (value[:, None] + spread * r.normal(size=(n, BRANCHES))).clip(0, 1)
    same = np.ptp(success, axis=1) == 0
    success[same] = r.random((same.sum(), BRANCHES))
    p = np.sort(r.dirichlet([3.0, 0.8, 0.5, 0.3], size=n).clip(1e-3), axis=1)[:, ::-1]
    p = p / p.sum(axis=1, keepdims=True)
    e = r.normal(size=(n, BRANCHES, SIZE)) + 0.5 * r.normal(size=(n, 1, SIZE))
    u = e - np.einsum("na,nap->np", p, e)[:, None]
    lift = p[:, :, None] * u
    lift[:, 0] = -lift[:, 1:].sum(axis=1)
    g = np.einsum("na,nap->np", success, lift)
    size = np.linalg.norm(g, axis=1)
    unit = g / size[:, None]
    correct = np.repeat(r.random((questions, ROLLOUTS)) < rate[:, None], NODES, axis=1).ravel()
    level = np.where(correct, 0.05, 0.30)
    forms = []
    for k in range(TEACHERS):
        logit = np.arctanh(level - 0.1 * k) + 0.2 * r.normal(size=questions)[q] + 0.4 * r.normal(size=n)
        cosine = np.tanh(logit + link * (np.log(size) - np.log(size).mean()))
        z = r.normal(size=(n, SIZE))
        z -= (z * unit).sum(1, keepdims=True) * unit
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        forms.append(np.einsum("nap,np->na", lift, cosine[:, None] * unit + np.sqrt(1 - cosine**2)[:, None] * z))
    there = np.ones((n, BRANCHES), bool)
    evidence = Evidence(
        question=q,
        token_weight=np.tile([1.0, 1.0, 2.0, 4.0], n // NODES),
        correct=correct,
        depth=np.tile([0, 1, 2, 5], n // NODES),
        norm_form=np.einsum("nap,nbp->nab", lift, lift),
        gain_form=np.stack(forms, axis=1),
        teacher_norm=np.ones((n, TEACHERS)),
        real=there,
        count=there.astype(float),
        total=success,
        total_square=success,
        exact=~there,
        certain=~there[:, 0],
    )
    return Population(evidence, success, per)


@dataclass
class World:
    """An enumerated world, probed once: its nodes, and how to walk on from them.

    Attributes:
        records: Of the nodes.
        tree: Their prefixes and branches.
        success: ``(N, A)``, exact.
        length: ``(N, A)``, tokens that a continuation is expected to take.
        walk: From a question's number, a prefix and a random stream to a whole response and its reward.
        expected: ``(G,)``, the length that the rollouts suggest.
    """

    records: list
    tree: object
    success: np.ndarray
    length: np.ndarray
    walk: Callable
    expected: np.ndarray


def worlds(count: int, questions: int = 12, seed: int = 0, peak: float = 3.0) -> list[World]:
    """Enumerated worlds: tiny students with LoRA whose every response is known, peaked like a language model.

    Nodes and gradients are those of one probe of the library; successes and lengths are exact.

    Args:
        count: How many worlds.
        questions: Of each.
        seed: Of the first.
        peak: Scales the logits: the larger, the surer student and teachers are of their next token.
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from conftest import make_world, reward_table, tiny_base

    shapes = [(5, 6), (6, 5), (8, 4), (7, 5)]
    found = []
    for i in range(count):
        size, horizon = shapes[i % len(shapes)]
        world = make_world(seed=seed + i, size=size, horizon=horizon, structured=True, initializer_range=0.9)
        blank = {"vocabulary": size, "eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
        teachers = {
            name: tiny_base(seed=seed + i + shift, initializer_range=0.9, **blank)
            for name, shift in (("a", 40), ("b", 80))
        }
        for model in (world.model.get_base_model(), *teachers.values()):
            model.lm_head.weight.data.mul_(peak)
        with torch.no_grad():
            nodes = world.solve()
        policy = {p: torch.softmax(n.logits, -1).numpy() for p, n in nodes.items()}
        tables = [reward_table(world, 1000 * (seed + i) + q, structured=True) for q in range(questions)]

        def reward(prompts, completions, question, tables=tables):
            return [tables[q][text] for q, text in zip(question, completions, strict=True)]

        def walk(q, response, rng, policy=policy, tables=tables, world=world):
            while response in policy:
                response = (*response, int(np.searchsorted(policy[response].cumsum(), rng.random())))
            return response, tables[q][world.text(response)]

        config = ProbeConfig(
            rollouts_per_question=4, max_new_tokens=horizon, continuations=1, batch_size=500, step_alignment=False
        )
        rows = [{"prompt": world.prompt, "question": q} for q in range(questions)]
        probe = Keeping(world.model, world.tokenizer, reward, teachers, config)
        report = probe.run(rows, seed=seed + i)
        tree = probe.tree
        shape = gather(report.nodes).success.shape
        success, length = np.zeros(shape), np.ones(shape)
        for q in range(questions):
            value, tokens = {}, {}
            for prefix in sorted(policy, key=len, reverse=True):
                below = [(*prefix, k) for k in range(size)]
                value[prefix] = np.array(
                    [policy[b] @ value[b] if b in value else tables[q][world.text(b)] for b in below]
                )
                tokens[prefix] = np.array([1 + policy[b] @ tokens[b] if b in tokens else 0.0 for b in below])
            for n, record in enumerate(report.nodes):
                if record.question == str(q):
                    success[n, : len(record.tokens)] = value[tree.prefix(n)][record.tokens]
                    length[n, : len(record.tokens)] = tokens[tree.prefix(n)][record.tokens]
        expected = np.array([remaining_length(tree.rollouts, tree.nodes[n].depth) for n in tree.first])
        found.append(World(list(report.nodes), tree, success.clip(0, 1), length, walk, expected))
    return found


class Keeping(Probe):
    """Keeps its tree."""

    def _continue(self, rollouts, tree, *more):
        self.tree = tree
        return super()._continue(rollouts, tree, *more)
