"""Probes of tiny students, and what several tests do with their reports."""

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import torch

from odp_callbacks.engine import Probe, ProbeConfig, every_node
from tests.helpers.models import tiny_base, word_tokenizer

ALL_GRADIENTS = {"differing_gradients": 1.0, "agreeing_gradients": 1.0}
EVERY_TOKEN = {"branch_mass": 1.0, "max_branches": 5, "nodes": every_node, "max_new_tokens": 3, **ALL_GRADIENTS}


ROWS = [{"prompt": "a b c", "answer": "d"}, {"prompt": "c", "answer": "e"}, {"prompt": "f e d c b", "answer": "a"}]


def external_teacher(seed=11):
    """A teacher for the enumerable world: another model over its five tokens."""
    return tiny_base(
        vocabulary=5, seed=seed, initializer_range=0.25, eos_token_id=0, pad_token_id=None, bos_token_id=None
    )


def probe_world(world, teachers, questions=1, seed=0, **config):
    probe = Probe(world.model, world.tokenizer, world.reward, teachers, ProbeConfig(**{**EVERY_TOKEN, **config}))
    return probe.run([world.row] * questions, seed=seed)


def word_reward(prompts, completions, **columns):
    """Deterministic, and different from text to text: how many words, and whether the first is early."""
    return [min(1.0, len(t.split()) / 8) if t[:1] < "d" else 0.25 for t in completions]


def measure(student, teachers, *, reward=word_reward, rows=ROWS, seed=0, tokenizer=None, **config):
    options = {"rollouts_per_question": 2, "max_new_tokens": 8, "continuations": 2, **ALL_GRADIENTS, **config}
    return Probe(student, tokenizer or word_tokenizer(), reward, teachers, ProbeConfig(**options)).run(rows, seed=seed)


def node_prefixes(world, report):
    """The response tokens before each node, read back from the pieces."""
    words = ["</s>", *"abcd"]
    return [tuple(words.index(p) for p in report.rollouts[n.rollout].pieces[: n.depth]) for n in report.nodes]


def with_known_success(record, success):
    """The record with the true success in place of what continuations gave."""
    q = success[record.tokens].detach().numpy()
    ones = np.ones(len(q), dtype=np.int64)
    return replace(record, count=ones, total=q, total_square=q * q, exact=ones.astype(bool))


def assert_same_measurements(a, b, rtol=0.0):
    """Two reports agree in all that was measured."""
    assert [replace(r) for r in a.rollouts] == [replace(r) for r in b.rollouts]
    assert len(a.nodes) == len(b.nodes)
    for x, y in zip(a.nodes, b.nodes, strict=True):
        for f in fields(x):
            u, v = getattr(x, f.name), getattr(y, f.name)
            if f.name == "predictors":
                for name in u:
                    np.testing.assert_allclose(u[name], v[name], rtol=rtol)
            elif isinstance(u, np.ndarray):
                np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol * max(np.abs(v).max(initial=0), 1e-300))
            else:
                assert u == v


class TiltedTeacher(torch.nn.Module):
    """The student's policy times exp(eta Q), at every node of the world."""

    def __init__(self, world, eta):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=5))
        with torch.no_grad():
            self.logits = {p: n.logits + eta * n.success for p, n in world.solve().items()}
        self.start = len(world.prompt_ids)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        rows = [
            [self.logits.get(tuple(row[self.start : t + 1]), torch.zeros(5).double()) for t in range(len(row))]
            for row in input_ids.tolist()
        ]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in rows]))


def random_reward(prompts, completions, **columns):
    random.random()
    np.random.random(3)  # noqa: NPY002 (the stream that users use)
    torch.rand(3)
    return word_reward(prompts, completions)


def failing_reward(prompts, completions, **columns):
    random_reward(prompts, completions)
    raise KeyError("verifier")


def make_probe(student, reward=word_reward, teachers="base", **config):
    return Probe(student, word_tokenizer(), reward, teachers, ProbeConfig(**{"max_new_tokens": 8, **config}))
