"""The protocol on models: what it samples, what it records, and what it leaves unchanged."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.paper.depth_windows import ranked_depths
from odp_callbacks.analysis.paper.prefix_tree import ROLLOUT
from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from odp_callbacks.engine import Teacher, diagnose
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.paper import PaperConfig, PaperProbe
from odp_callbacks.functional import distillation_logit_gradient, gradient_alignment, ideal_logit_gradient
from tests.helpers.models import FAMILIES, tiny_base, word_tokenizer
from tests.helpers.paper import (
    HORIZON,
    SIZE,
    example_record,
    measure_world,
    paper_teachers,
    paper_world,
)
from tests.helpers.probes import ROWS, word_reward


def policies(model, world, prefix):
    """Log-probabilities ``(V,)`` of a model after a prefix, from a forward pass of its own."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=world.ids(prefix)[None]).logits[0, -1], dim=-1)


def nodes_of(record):
    return [
        (question, place, path, depth)
        for question in record.questions
        for place, path in enumerate(question.paths)
        for depth in range(len(question.tree.paths[place]))
    ]


def test_recorded_policies_are_those_of_the_models():
    world, teachers, record = paper_world(), paper_teachers(), example_record()
    for question, place, path, depth in nodes_of(record)[:12]:
        prefix = question.tree.paths[place][:depth]
        student = policies(world.model, world, prefix)
        others = [policies(teacher, world, prefix) for teacher in teachers.values()]
        columns = path.depth == depth
        tokens = path.token[columns]
        np.testing.assert_allclose(path.student[columns], student[tokens].numpy(), atol=1e-9)
        for row, teacher in enumerate(others):
            np.testing.assert_allclose(path.teachers[row, columns], teacher[tokens].numpy(), atol=1e-9)
            p, q = student.exp(), teacher.exp()
            mixture = ((p + q) / 2).log()
            expected = {
                "kl": (p * (student - teacher)).sum(),
                "js": ((p * (student - mixture)).sum() + (q * (teacher - mixture)).sum()) / 2,
                "l2": (p - q).norm(),
                "policy_cosine": torch.nn.functional.cosine_similarity(p, q, dim=0),
            }
            for name, value in expected.items():
                assert path.predictors[name][row, depth] == pytest.approx(float(value), abs=1e-9), name


def test_scores_are_those_of_the_recorded_visits():
    record = example_record()
    nodes = score_nodes(record)
    rows = iter(range(len(nodes)))
    number = 0
    for question in record.questions:
        for place, path in enumerate(question.paths):
            children = question.tree.children(place)
            for depth in range(len(question.tree.paths[place])):
                frequent = (children.depth == depth) & (children.visits >= 5)
                rates = (children.successes / children.visits)[frequent]
                if frequent.sum() < 2 or np.ptp(rates) == 0:
                    continue
                row = next(rows)
                columns = [
                    np.flatnonzero((path.depth == depth) & (path.token == token))[0]
                    for token in children.token[frequent]
                ]
                student = torch.from_numpy(path.student[columns])
                ideal = ideal_logit_gradient(student, torch.from_numpy(rates))
                for teacher in range(2):
                    other = torch.from_numpy(path.teachers[teacher, columns])
                    pull = distillation_logit_gradient(student, other, "reverse_kl")
                    assert nodes.cosine[row, teacher] == pytest.approx(float(gradient_alignment(ideal, pull)))
                    p, q = torch.softmax(student, 0).numpy(), torch.softmax(other, 0).numpy()
                    assert nodes.advantage[row, teacher] == pytest.approx((q - p) @ rates)
                assert (nodes.path[row], nodes.depth[row]) == (number, depth)
                assert nodes.success_range[row] == pytest.approx(np.ptp(rates))
                assert nodes.predictors["kl"][row, 0] == path.predictors["kl"][0, depth]
            number += 1
    assert next(rows, None) is None


def test_enriched_tokens_get_their_visits_and_no_others_are_forced():
    world, teachers, record = paper_world(), paper_teachers(), example_record()
    forced = 0
    for question in record.questions:
        for place, path in enumerate(question.paths):
            taken, children = question.tree.paths[place], question.tree.children(place)
            visits = dict(zip(zip(children.depth, children.token, strict=True), children.visits, strict=True))
            chosen = set()
            sizes = []
            for depth in range(len(taken)):
                student = policies(world.model, world, taken[:depth])
                others = [policies(teacher, world, taken[:depth]) for teacher in teachers.values()]
                pulls = [distillation_logit_gradient(student, other, "reverse_kl").norm() for other in others]
                differences = [(student.exp() - other.exp()).abs().sum() / 2 for other in others]
                sizes.append([pulls, differences])
                if depth in path.enriched:
                    worth = (torch.stack([student, *others]).exp() > 0.02).any(dim=0)
                    chosen |= {(depth, token) for token in worth.nonzero().flatten().tolist()}
            table = np.array(sizes, dtype=float)  # (T, 2, K)
            expected = set()
            for teacher in range(2):
                expected |= set(ranked_depths(table[:, 0, teacher], table[:, 1, teacher], 2, 2))
            assert set(path.enriched) == expected
            assert all(visits[pair] >= 30 for pair in chosen)
            forced += len(chosen)
    assert forced > 50


def test_every_response_of_the_tree_has_the_reward_of_its_text():
    world = paper_world()
    (question,) = measure_world(world, paper_teachers()).questions
    for place, taken in enumerate(question.tree.paths):
        own = question.tree.own[place]
        assert question.tree.success[own] == world.table[world.text(taken)]
        assert question.paths[place].correct == bool(question.tree.success[own])
        assert question.paths[place].text == world.text(taken)
    rollouts = question.tree.branch == ROLLOUT
    assert rollouts.sum() == 40
    assert question.pass_rate == question.tree.success[rollouts].mean()


def test_one_tree_serves_all_teachers():
    """What a teacher costs is a forward pass and the tokens that it proposes; scores on one tree are its own."""
    world, (first, second) = paper_world(), paper_teachers().items()
    options = {"enrichment_threshold": 0.0, "by_gradient": HORIZON, "minimum_visits": 2}
    both = measure_world(world, dict([first, second]), **options)
    alone = measure_world(world, dict([second]), **options)
    np.testing.assert_allclose(score_nodes(both).cosine[:, 1], score_nodes(alone).cosine[:, 0], rtol=1e-12)
    assert both.targeted_rollouts == alone.targeted_rollouts


def test_a_teacher_that_equals_the_student_has_no_score():
    world = paper_world()
    record = measure_world(world, {"itself": Teacher(), "other": paper_teachers(1)["teacher 0"]}, minimum_visits=2)
    nodes = score_nodes(record)
    assert len(nodes) > 0
    assert np.isnan(nodes.cosine[:, 0]).all()
    assert np.isfinite(nodes.cosine[:, 1]).all()


def test_an_interrupted_measurement_continues_with_the_same_record(tmp_path):
    world, teachers = paper_world(), paper_teachers()
    probe = PaperProbe(
        world.model, world.tokenizer, world.reward, teachers, max_new_tokens=HORIZON, rollouts_per_question=20
    )
    complete = probe.run([world.row], seed=5)
    path = tmp_path / "journal"
    probe.run([world.row], seed=5, journal=Journal(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    journal = Journal(path)
    stored = len(journal.continuations)
    again = probe.run([world.row], seed=5, journal=journal)
    assert 0 < stored < len(journal.continuations)
    for one, other in zip(complete.questions, again.questions, strict=True):
        for name in ("shared", "next_token", "success", "count"):
            np.testing.assert_array_equal(getattr(one.tree, name), getattr(other.tree, name))


def test_the_training_is_as_it_was_before():
    world = paper_world()
    world.model.train()
    weights = {name: parameter.clone() for name, parameter in world.model.named_parameters()}
    states = torch.get_rng_state(), random.getstate()
    measure_world(world, paper_teachers())
    assert world.model.training
    assert all(torch.equal(parameter, weights[name]) for name, parameter in world.model.named_parameters())
    assert all(parameter.grad is None for parameter in world.model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_questions_that_no_rollout_solves_are_left_out():
    world = paper_world()
    with_none = replace(world, table=dict.fromkeys(world.table, 0.0))
    record = measure_world(with_none, paper_teachers(), questions=2)
    assert record.questions == ()
    assert record.left_out == {"pass rate 0": 2}


def test_rollouts_without_a_reward_do_not_count():
    world = paper_world()
    some = sorted(world.table)[::2]

    def reward(prompts, completions, **columns):
        return [None if text in some else world.table[text] for text in completions]

    probe = PaperProbe(
        world.model, world.tokenizer, reward, paper_teachers(), max_new_tokens=HORIZON, rollouts_per_question=40
    )
    (question,) = probe.run([world.row]).questions
    assert (question.tree.branch == ROLLOUT).sum() < 40
    assert {world.text(path) for path in question.tree.paths}.isdisjoint(some)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_students_without_lora_and_of_every_family_are_measured(family):
    student = tiny_base(family)
    record = PaperProbe(
        student,
        word_tokenizer(),
        lambda prompts, completions, **columns: [float(r > 0.3) for r in word_reward(prompts, completions)],
        {"hint": "the answer is {answer} . {prompt}"},
        max_new_tokens=6,
        rollouts_per_question=6,
        enriched_visits=3,
        minimum_visits=2,
    ).run(ROWS)
    assert len(record.questions) > 0
    assert np.isfinite(score_nodes(record).advantage).all()


def test_deviations_and_what_is_not_published_are_named():
    assert PaperConfig().deviations() == ()
    config = PaperConfig(rollouts_per_question=32, ancestors="own policy only", temperature=0.7)
    assert config.deviations() == (
        "G, the rollouts of a question, = 32 instead of 200",
        "the temperature = 0.7 instead of 1.0",
        "targeted rollouts at ancestors = own policy only instead of counted",
    )
    assert any("k = 2" in sentence for sentence in config.unpublished())
    assert example_record().deviations[0] == "G, the rollouts of a question, = 40 instead of 200"
    assert example_record().settings["enriched_visits"] == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts_per_question": 0}, "`rollouts_per_question` must be an integer of at least 1"),
        ({"by_gradient": -1}, "`by_gradient` must be an integer of at least 0"),
        ({"enrichment_threshold": 1.0}, "`enrichment_threshold` must be a probability"),
        ({"own_path": "no"}, "`own_path` must be one of"),
        ({"renormalise": 1}, "`renormalise` must be True or False"),
        ({"temperature": 0}, "`temperature` must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PaperConfig(**options)


def test_unknown_options_are_refused():
    world = paper_world()
    with pytest.raises(TypeError, match='unknown option `continuations` of protocol "paper"'):
        PaperProbe(world.model, world.tokenizer, world.reward, paper_teachers(), continuations=4)
    with pytest.raises(TypeError, match="`config` must be a PaperConfig"):
        PaperProbe(world.model, world.tokenizer, world.reward, paper_teachers(), {"rollouts_per_question": 4})


def test_diagnose_follows_the_protocol():
    world, teachers = paper_world(), paper_teachers()
    options = {"max_new_tokens": HORIZON, "rollouts_per_question": 20, "enriched_visits": 10}
    record = diagnose(
        world.model, world.tokenizer, [world.row], world.reward, teachers, protocol="paper", seed=1, **options
    )
    expected = measure_world(world, teachers, seed=1, **options)
    np.testing.assert_array_equal(record.questions[0].tree.shared, expected.questions[0].tree.shared)
    with pytest.raises(ValueError, match="`protocol` must be"):
        diagnose(world.model, world.tokenizer, [world.row], world.reward, teachers, protocol="papers")
    assert world.size == SIZE
