"""Twenty worlds small enough to enumerate: the library's figures against their true values."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, estimate
from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.nodes import NODE_SELECTORS
from odp_callbacks.functional import distillation_logit_gradient
from tests.helpers.models import LETTERS, tiny_base
from tests.helpers.probes import ALL_GRADIENTS
from tests.helpers.worlds import make_world

SHAPES = [(5, 4), (5, 6), (6, 4), (6, 5), (7, 4), (8, 4)]
WORLDS = [(seed, *SHAPES[seed % len(SHAPES)], (1.0, 0.7)[seed % 2]) for seed in range(20)]


class TabulatedTeacher(torch.nn.Module):
    """A teacher with given logits at every node of the world."""

    def __init__(self, world, logits):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=world.size))
        self.logits, self.prompt_length = logits, len(world.prompt_ids)
        self.default = torch.zeros(world.size).double()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        rows = [
            [self.logits.get(tuple(row[self.prompt_length : t + 1]), self.default) for t in range(len(row))]
            for row in input_ids.tolist()
        ]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in rows]))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "size", "horizon", "temperature"), WORLDS)
def test_every_figure_agrees_with_its_true_value_in_a_random_world(seed, size, horizon, temperature):
    world = make_world(seed=seed, size=size, horizon=horizon, initializer_range=0.5)
    with torch.no_grad():
        nodes = world.solve(temperature)
    other = tiny_base(vocabulary=size, seed=seed + 50, eos_token_id=0, pad_token_id=None, bos_token_id=None)
    teachers = {
        # Tilted by the true success: aligned with the ideal gradient, and opposed to it.
        "for": TabulatedTeacher(world, {p: n.logits + 1.5 * temperature * n.success for p, n in nodes.items()}),
        "against": TabulatedTeacher(world, {p: n.logits - 0.5 * temperature * n.success for p, n in nodes.items()}),
        "same": TabulatedTeacher(world, {p: n.logits for p, n in nodes.items()}),
        "other": other,
    }
    config = ProbeConfig(
        nodes="every",
        branch_mass=1.0,
        max_branches=size,
        max_new_tokens=horizon,
        temperature=temperature,
        continuations=8,
        rollouts_per_question=8,
        batch_size=1000,
        **ALL_GRADIENTS,
    )
    report = Probe(world.model, world.tokenizer, world.reward, teachers, config).run([world.row] * 4, seed=seed)
    words = ["</s>", *LETTERS]
    gain_errors, true_figures = [], {}
    for record in report.nodes:
        prefix = tuple(words.index(p) for p in report.rollouts[record.rollout].pieces[: record.depth])
        node = nodes[prefix]
        q = node.success[record.tokens].numpy()
        known = replace(record, count=np.ones_like(record.count), total=q, total_square=q * q, exact=q == q)
        exact, measured = estimate(known), estimate(record)
        if np.ptp(q) < 1e-9:
            continue
        assert list(exact.status) == [DEFINED, DEFINED, UNDEFINED, DEFINED]
        assert exact.alignment[:2] == pytest.approx([1, -1], abs=1e-6)
        assert exact.module_alignment[:, :2] == pytest.approx(np.tile([1.0, -1.0], (len(report.modules), 1)), abs=1e-6)
        assert np.isnan(exact.alignment[2])
        assert exact.predicted_gain[2] == measured.predicted_gain[2] == 0
        if prefix not in true_figures:
            with torch.no_grad():
                teacher_logits = other(input_ids=world.ids(prefix)[None]).logits[0, -1]
            p = torch.softmax(node.logits.detach() / temperature, -1)
            ideal = p * (node.success - p @ node.success) / temperature
            direction = distillation_logit_gradient(node.logits.detach(), teacher_logits, temperature=temperature)
            ideal, distillation = world.parameter_gradients(node, ideal, direction)
            gain = float(ideal @ distillation / distillation.norm())
            true_figures[prefix] = gain, float(ideal @ distillation / distillation.norm() / ideal.norm())
        gain, cosine = true_figures[prefix]
        assert exact.alignment[3] == pytest.approx(cosine, abs=1e-6)
        assert exact.predicted_gain[3] == pytest.approx(gain, abs=1e-6)
        gain_errors.append((prefix, measured.predicted_gain[3] - gain))
    # For a teacher that is independent of success, the measured gains have no bias. Nodes with the same prefix share
    # their continuations, so each prefix counts once.
    errors = np.array(list(dict(gain_errors).values()))
    assert len(errors) > 3
    assert abs(errors.sum()) < 4 * np.sqrt((errors**2).sum())
    assert np.abs(errors).max() > 1e-3, "the gains have noise"
    for summary in summarise(report):
        if (summary.teacher, summary.split) == ("same", "all"):
            assert summary.undefined == summary.nodes
            assert summary.figures["alignment"].note == "no gradient"
            assert np.isnan(summary.figures["gain_weighted_alignment"].value)
        if summary.teacher in ("for", "against") and summary.split == "all":
            sign = 1 if summary.teacher == "for" else -1
            figure = summary.figures["gain_weighted_alignment"]
            if not np.isnan(figure.value):
                assert sign * figure.value > 0.5


@pytest.mark.slow
def test_the_evidence_of_all_nodes_reduces_the_error_without_bias():
    """Gains at every node of 600 rollouts, from the evidence of all nodes and from that of each node alone."""
    world = make_world(seed=2, size=5, horizon=4, initializer_range=0.5)
    other = tiny_base(vocabulary=5, seed=52, eos_token_id=0, pad_token_id=None, bos_token_id=None)
    config = ProbeConfig(
        nodes="every",
        branch_mass=0.7,
        max_new_tokens=4,
        continuations=1,
        rollouts_per_question=1,
        batch_size=4000,
        **ALL_GRADIENTS,
    )
    report = Probe(world.model, world.tokenizer, world.reward, {"other": other}, config).run([world.row] * 600, seed=0)
    with torch.no_grad():
        nodes = world.solve()
    words = ["</s>", *LETTERS]
    prefix = [tuple(words.index(p) for p in report.rollouts[n.rollout].pieces[: n.depth]) for n in report.nodes]
    records = [
        replace(r, count=np.ones_like(r.count), total=q, total_square=q * q, exact=q == q)
        for r, q in ((r, nodes[p].success[r.tokens].numpy()) for r, p in zip(report.nodes, prefix, strict=True))
    ]
    truth = gather(records).gain[:, 0]
    alone = np.array([estimate(record).predicted_gain[0] for record in report.nodes])
    together = gather(report.nodes).gain[:, 0]
    rollout = np.array([record.rollout for record in report.nodes])
    errors = {name: np.bincount(rollout, gain - truth) for name, gain in (("alone", alone), ("together", together))}
    z_scores = {name: error.mean() / (error.std() / np.sqrt(len(error))) for name, error in errors.items()}
    assert abs(z_scores["alone"]) < 3.5
    assert abs(z_scores["together"]) < 3.5
    assert (errors["together"] ** 2).mean() < 0.9 * (errors["alone"] ** 2).mean()
    # Where success is known exactly, the evidence of other nodes changes nothing.
    np.testing.assert_allclose(truth, [estimate(record).predicted_gain[0] for record in records], atol=1e-12)


@pytest.mark.slow
def test_intervals_cover_in_random_worlds():
    """95 % intervals of the predicted gain of a teacher that is independent of success, in 20 enumerated worlds."""
    covered = []
    for seed in range(20):
        size, horizon = ((5, 4), (6, 4))[seed % 2]
        world = make_world(seed=seed + 60, size=size, horizon=horizon, initializer_range=0.5, structured=True)
        options = {"vocabulary": size, "eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
        other = tiny_base(seed=seed + 90, **options)
        with torch.no_grad():
            nodes = world.solve()
        total_gain, total_reach = 0.0, 0.0
        for prefix, node in nodes.items():
            p = torch.softmax(node.logits, -1)
            with torch.no_grad():
                teacher_logits = other(input_ids=world.ids(prefix)[None]).logits[0, -1]
            direction = distillation_logit_gradient(node.logits, teacher_logits)
            ideal, distillation = world.parameter_gradients(node, p * (node.success - p @ node.success), direction)
            total_gain += float(node.reach * (ideal @ distillation) / distillation.norm())
            total_reach += float(node.reach)
        config = ProbeConfig(max_new_tokens=horizon, continuations=2, rollouts_per_question=2, batch_size=1000)
        probe = Probe(world.model, world.tokenizer, world.reward, {"other": other}, config)
        (whole, *_) = summarise(probe.run([world.row] * 16, seed=seed))
        figure = whole.figures["predicted_gain"]
        covered.append(figure.low <= total_gain / total_reach <= figure.high)
    # At a coverage of 95 % the probability of fewer than 16 of 20 is 0.3 %.
    assert sum(covered) >= 16, covered


def test_the_weighted_mean_over_selected_nodes_estimates_that_over_every_node():
    """Sums over every token of 1,500 rollouts, and Horvitz-Thompson estimates of them from selected tokens."""
    world = make_world(seed=2, size=5, horizon=6, initializer_range=0.5)
    with torch.no_grad():
        nodes = world.solve()
    rng = np.random.default_rng(0)
    value = {prefix: rng.normal() + len(prefix) for prefix in nodes}  # a figure that grows with depth
    (question,) = as_questions([world.row], world.tokenizer)
    policy = {p: torch.softmax(n.logits, -1).numpy() for p, n in nodes.items()}
    generator = torch.Generator().manual_seed(0)
    difference = {name: [] for name in ("balanced", "exponential", "uniform", "entropy", "unweighted")}
    for _ in range(1500):
        ids = ()
        while len(ids) < 6 and (not ids or ids[-1]):
            ids = (*ids, int(rng.choice(5, p=policy[ids])))
        entropy = torch.tensor([stats.entropy(policy[ids[:t]]) for t in range(len(ids))])
        rollout = Rollout(question, ids, "", False, entropy=entropy)
        full = sum(value[ids[:t]] for t in range(len(ids)))
        for name in ("balanced", "exponential", "uniform", "entropy"):
            chosen = NODE_SELECTORS[name](rollout, generator)
            difference[name].append(sum(value[ids[:t]] / p for t, p in chosen) - full)
        chosen = NODE_SELECTORS["exponential"](rollout, generator)
        difference["unweighted"].append(sum(value[ids[:t]] for t, _ in chosen) - full)
    z_scores = {name: np.mean(d) / (np.std(d) / np.sqrt(len(d)) + 1e-12) for name, d in difference.items()}
    assert all(abs(z_scores[name]) < 3.5 for name in difference if name != "unweighted"), z_scores
    assert abs(z_scores["unweighted"]) > 10, "without the weights the estimate is biased"
