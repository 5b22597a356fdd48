"""The biases against enumeration, and the protocol against what they predict."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from odp_callbacks.analysis.paper.bias_variants import PAPER, UNBIASED, VARIANTS, bias_variants
from odp_callbacks.analysis.paper.biases import (
    expected_cosine,
    expected_successes,
    own_ending_bias,
    success_with_forced_visits,
)
from odp_callbacks.analysis.paper.node_score import gkd_gradient, ideal_gradient, logit_cosine
from odp_callbacks.analysis.paper.prefix_tree import TreeResponse, prefix_tree
from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from tests.helpers.paper import example_record, measure_world, paper_teachers, paper_world, true_success

POLICY, SUCCESS = np.array([0.7, 0.3]), np.array([0.6, 0.2])


@pytest.mark.parametrize("correct", [True, False])
def test_the_own_ending_shifts_the_taken_token_by_one_visit(correct):
    """All outcomes of four rollouts at one node; the first one is the path, and the class is its ending."""
    expected = defaultdict(lambda: np.zeros(3))  # by visits: probability, with the own ending, without it
    for outcome in product(product(range(2), (0.0, 1.0)), repeat=4):
        if outcome[0][1] != float(correct) or outcome[0][0] != 0:
            continue
        probability = np.prod([POLICY[k] * (SUCCESS[k] if r else 1 - SUCCESS[k]) for k, r in outcome])
        tree = prefix_tree([0], [TreeResponse((token,), reward) for token, reward in outcome])
        rates = []
        for own_path in ("counted", "left out"):
            children = tree.children(0, own_path)
            taken = children.token == 0
            rates.append((children.successes[taken] / children.visits[taken]).sum())
        visits = sum(token == 0 for token, _ in outcome)
        expected[visits] += probability * np.array([1, *rates])
    for visits, (probability, with_own, without) in expected.items():
        if visits > 1:
            bias = own_ending_bias(SUCCESS[0], visits, correct)
            assert with_own / probability == pytest.approx(SUCCESS[0] + bias)
            assert without / probability == pytest.approx(SUCCESS[0])
    assert len(expected) == 4


@pytest.mark.parametrize("pass_rate", [0.3, 0.6])
def test_where_a_whole_class_takes_the_token_its_own_endings_belong_there(pass_rate):
    """One path of each question from its correct ones, at a node that all pass: leaving it out corrects too much."""
    rollouts, totals = 6, np.zeros(3)
    for rewards in product((0.0, 1.0), repeat=rollouts):
        if not any(rewards):
            continue  # questions with pass rate 0 are left out
        probability = np.prod([pass_rate if reward else 1 - pass_rate for reward in rewards])
        tree = prefix_tree([rewards.index(1.0)], [TreeResponse((0,), reward) for reward in rewards])
        rates = [tree.children(0, own_path) for own_path in ("counted", "left out")]
        totals += probability * np.array([1, *(one.successes[0] / one.visits[0] for one in rates)])
    counted, left_out = totals[1:] / totals[0]
    solved = 1 - (1 - pass_rate) ** rollouts
    assert counted == pytest.approx(pass_rate / solved)  # biased only by the questions that are left out
    assert left_out == pytest.approx((rollouts * pass_rate / solved - 1) / (rollouts - 1))
    assert left_out < pass_rate < counted


def test_forced_tokens_shift_their_ancestors():
    """All outcomes of two rollouts and two targeted rollouts behind them, in a world of two tokens and two steps."""
    success = {(0, 0): 0.9, (0, 1): 0.1}
    second = np.array([0.8, 0.2])
    truth = sum(second[k] * success[0, k] for k in range(2))
    means = dict.fromkeys(("counted", "own policy only"), 0.0)
    for choices in product(range(2), repeat=2):
        for rewards in product((0.0, 1.0), repeat=4):
            taken = [(0, k) for k in choices] + [(0, 1)] * 2  # token 1 is forced at depth 1
            probability = np.prod([second[k] for k in choices]) * np.prod(
                [success[t] if r else 1 - success[t] for t, r in zip(taken, rewards, strict=True)]
            )
            rollouts = [TreeResponse(t, r) for t, r in zip(taken[:2], rewards[:2], strict=True)]
            targeted = [TreeResponse(t, r, 1, 0) for t, r in zip(taken[2:], rewards[2:], strict=True)]
            tree = prefix_tree([0], rollouts).extended(targeted)
            for ancestors in means:
                children = tree.children(0, ancestors=ancestors)
                means[ancestors] += probability * children.successes[0] / children.visits[0]
    assert means["own policy only"] == pytest.approx(truth)
    predicted = success_with_forced_visits(truth, 2, np.array([success[0, 1]]), np.array([2]))
    assert means["counted"] == pytest.approx(predicted)
    assert abs(predicted - truth) > 0.1


@pytest.mark.parametrize(("taken", "correct"), [(None, False), (0, False), (2, True)])
def test_the_expected_score_is_the_mean_over_all_numbers_of_successes(taken, correct):
    policy, ratio = np.array([0.5, 0.3, 0.2]), np.array([0.4, -0.7, 0.1])
    success, visits = np.array([0.4, 0.6, 0.5]), np.array([3, 4, 2])
    total, mass = 0.0, 0.0
    for outcomes in product((0, 1), repeat=int(visits.sum())):
        parts = np.split(np.array(outcomes), visits.cumsum()[:-1])
        probability = 1.0
        for token, part in enumerate(parts):
            for place, one in enumerate(part):
                if token == taken and place == 0:
                    probability *= one == correct
                else:
                    probability *= success[token] if one else 1 - success[token]
        rates = np.array([part.mean() for part in parts])
        if probability and np.ptp(rates):
            score = float(logit_cosine(ideal_gradient(policy, rates), gkd_gradient(policy, ratio)))
            total, mass = total + probability * score, mass + probability
    value, defined = expected_cosine(policy, ratio, success, visits, taken, correct)
    assert (value, defined) == pytest.approx((total / mass, mass))


def test_the_own_ending_makes_incorrect_paths_score_higher_for_a_teacher_that_lowers_the_taken_token():
    """Equal success of both tokens: without the own ending the score is 0; with it the gap falls with visits."""
    even, lowers = np.array([0.5, 0.5]), np.array([1.0, -1.0])
    gaps = []
    for visits in (20, 50, 100):
        counts = np.array([visits, visits])
        values = [expected_cosine(even, lowers, even, counts, 0, correct)[0] for correct in (False, True)]
        raises = [expected_cosine(even, -lowers, even, counts, 0, correct)[0] for correct in (False, True)]
        gaps.append(values[0] - values[1])
        assert raises[0] - raises[1] == pytest.approx(-gaps[-1])
        assert expected_cosine(even, lowers, even, counts)[0] == pytest.approx(0, abs=1e-12)
    assert gaps == pytest.approx([0.287, 0.169, 0.117], abs=0.01)


def test_too_many_combinations_are_refused():
    with pytest.raises(ValueError, match="`visits` is"):
        expected_cosine(np.full(5, 0.2), np.arange(5.0), np.full(5, 0.5), np.full(5, 100))


@pytest.fixture(scope="module")
def large():
    """A measurement with many visits, and the truth of its world."""
    world = paper_world()
    options = {"rollouts_per_question": 1500, "enriched_visits": 1000, "minimum_visits": 200}
    return measure_world(world, paper_teachers(), questions=2, **options), true_success(world)


def standard_scores(record, truth, own_path, ancestors, predicted):
    """For every token, the deviation of its success rate in standard errors, and the predicted rate."""
    deviations, predictions = [], []
    for question in record.questions:
        for place, path in enumerate(question.tree.paths):
            children, successes = expected_successes(
                question.tree, place, lambda prefix, token: truth[prefix, token], own_path, ancestors
            )
            exact = [truth[path[:d], t] for d, t in zip(children.depth, children.token, strict=True)]
            expected = successes / children.visits if predicted else np.array(exact)
            error = np.sqrt(np.maximum(expected * (1 - expected), 1e-12) / children.visits)
            enough = children.visits >= 200
            deviations += list(((children.successes / children.visits - expected) / error)[enough])
            predictions += list((expected - exact)[enough])
    return np.array(deviations), np.array(predictions)


def test_without_both_biases_success_rates_converge_to_the_truth(large):
    deviations, _ = standard_scores(*large, *UNBIASED, predicted=False)
    assert len(deviations) > 60
    assert np.abs(deviations).max() < 4.5


def test_as_in_the_paper_success_rates_converge_to_the_predicted_bias(large):
    deviations, bias = standard_scores(*large, *PAPER, predicted=True)
    assert np.abs(deviations).max() < 4.5
    assert np.abs(bias).max() > 0.1
    away, _ = standard_scores(*large, *PAPER, predicted=False)
    assert np.abs(away).max() > 10


def test_scores_converge_to_those_of_the_success_rates_that_theory_predicts(large):
    record, truth = large

    def true_rates(question, path, children):
        prefix = record.questions[question].tree.paths[path]
        return np.array([truth[prefix[:d], t] for d, t in zip(children.depth, children.token, strict=True)])

    def predicted_rates(question, path, children):
        tree = record.questions[question].tree
        counted, successes = expected_successes(tree, path, lambda prefix, token: truth[prefix, token])
        rate = dict(zip(zip(counted.depth, counted.token, strict=True), successes / counted.visits, strict=True))
        return np.array([rate[pair] for pair in zip(children.depth, children.token, strict=True)])

    variants = bias_variants(record, others={"truth": true_rates, "predicted": predicted_rates}, same_nodes=True)
    steep = variants["truth"].success_range > 0.1
    assert steep.sum() > 10
    cosine = {name: nodes.cosine[steep] for name, nodes in variants.items()}
    assert np.abs(cosine[UNBIASED] - cosine["truth"]).max() < 0.15
    assert np.abs(cosine[PAPER] - cosine["predicted"]).max() < 0.15
    assert np.abs(cosine["predicted"] - cosine["truth"]).max() > 0.2


@pytest.mark.slow
def test_the_error_falls_with_the_root_of_the_visits_only_without_the_biases():
    world, errors = paper_world(5), defaultdict(list)
    truth = true_success(world)
    for visits in (25, 100, 400, 1600):
        record = measure_world(
            world, paper_teachers(), 4, rollouts_per_question=visits, enriched_visits=visits, minimum_visits=visits - 1
        )
        for variant in (PAPER, UNBIASED):
            squares = []
            for question in record.questions:
                for place, path in enumerate(question.tree.paths):
                    children = question.tree.children(place, *variant)
                    exact = np.array([truth[path[:d], t] for d, t in zip(children.depth, children.token, strict=True)])
                    enough = children.visits >= visits - 1
                    squares += list(((children.successes / children.visits - exact) ** 2)[enough])
            errors[variant].append(np.sqrt(np.mean(squares)))
    unbiased, paper = np.array(errors[UNBIASED]), np.array(errors[PAPER])
    assert (unbiased[1:] / unbiased[:-1] < 0.75).all()
    assert unbiased[-1] < 0.02
    assert paper[-1] > 3 * unbiased[-1]


def test_all_variants_score_the_same_nodes():
    variants = bias_variants(example_record(), same_nodes=True)
    assert set(variants) == set(VARIANTS)
    rows = {tuple(zip(nodes.path.tolist(), nodes.depth.tolist(), strict=True)) for nodes in variants.values()}
    assert len(rows) == 1
    assert len(next(iter(rows))) > 0


def test_without_the_biases_scores_are_those_of_the_recorded_option():
    record = example_record()
    alone = score_nodes(record, own_path="left out", ancestors="own policy only")
    np.testing.assert_array_equal(bias_variants(record)[UNBIASED].cosine, alone.cosine)
