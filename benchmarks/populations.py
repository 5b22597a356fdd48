"""Populations of nodes whose truth is known: synthetic ones, and worlds small enough to enumerate."""

from dataclasses import dataclass, replace

import numpy as np

from odp_callbacks.evidence import Evidence

NODES, ROLLOUTS, BRANCHES, TEACHERS, SIZE = 4, 2, 4, 2, 12


@dataclass
class Population:
    """Nodes by question, with the true success of each branch.

    Attributes:
        evidence: All nodes; question ``i`` holds the nodes from ``i * per_question`` on.
        success: ``(N, A)``.
        per_question: Nodes of a question.
        length: ``(N, A)``, tokens that a continuation takes; None: one.
    """

    evidence: Evidence
    success: np.ndarray
    per_question: int
    length: np.ndarray | None = None

    @property
    def questions(self) -> int:
        return len(self.success) // self.per_question

    def exact(self) -> Evidence:
        """All nodes with their success known."""
        ones = np.ones_like(self.success)
        return replace(self.evidence, count=ones, total=self.success, total_square=self.success**2, exact=ones > 0)

    def probe(self, questions: int, continuations: int | np.ndarray, rng: np.random.Generator) -> Evidence:
        """Some questions, with as many continuations of each branch; rewards are 0 or 1."""
        chosen = rng.choice(self.questions, questions, replace=False)
        index = (chosen[:, None] * self.per_question + np.arange(self.per_question)).ravel()
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


def worlds(count: int, questions: int = 12, seed: int = 0, peak: float = 0.9) -> list[Population]:
    """Enumerated worlds: tiny students with LoRA whose every response is known, peaked like a language model.

    Nodes and gradients are those of one probe of the library; successes and lengths are exact.

    Args:
        count: How many worlds.
        questions: Of each.
        seed: Of the first.
        peak: Standard deviation of the weights: the larger, the surer the student is of its next token.
    """
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import torch
    from conftest import LETTERS, make_world, reward_table, tiny_base

    from odp_callbacks.engine import Probe, ProbeConfig
    from odp_callbacks.evidence import gather

    shapes = [(5, 6), (6, 5), (8, 4), (7, 5)]
    found = []
    for i in range(count):
        size, horizon = shapes[i % len(shapes)]
        world = make_world(seed=seed + i, size=size, horizon=horizon, structured=True, initializer_range=peak)
        blank = {"vocabulary": size, "eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
        teachers = {
            name: tiny_base(seed=seed + i + s, initializer_range=peak, **blank) for name, s in (("a", 40), ("b", 80))
        }
        with torch.no_grad():
            nodes = world.solve()
        policy = {p: torch.softmax(n.logits, -1).numpy() for p, n in nodes.items()}
        tables = [reward_table(world, 1000 * (seed + i) + q, structured=True) for q in range(questions)]

        def reward(prompts, completions, question, tables=tables):
            return [tables[q][text] for q, text in zip(question, completions, strict=True)]

        config = ProbeConfig(
            rollouts_per_question=2, max_new_tokens=horizon, continuations=1, batch_size=500, step_alignment=False
        )
        rows = [{"prompt": world.prompt, "question": q} for q in range(questions)]
        report = Probe(world.model, world.tokenizer, reward, teachers, config).run(rows, seed=seed + i)
        words = ["</s>", *LETTERS]
        evidence = gather(report.nodes)
        success, length = evidence.success.copy(), np.ones_like(evidence.success)
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
                    pieces = report.rollouts[record.rollout].pieces[: record.depth]
                    prefix = tuple(words.index(p) for p in pieces)
                    success[n, : len(record.tokens)] = value[prefix][record.tokens]
                    length[n, : len(record.tokens)] = tokens[prefix][record.tokens]
        found.append(Population(evidence, success.clip(0, 1), 0, length))
    return found
