from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.node_estimates import estimate
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.gradients.graph_trial import check_graph
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.sampling.backend_selection import backend_of
from odp_callbacks.engine.tree.wave_queue import WaveQueue
from tests.helpers.models import EOS, WORDS, count_tokens, tiny, tiny_base, word_tokenizer
from tests.helpers.probes import ROWS, measure, word_reward


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [3, 12, 40])
@pytest.mark.parametrize("budget", [600, 3000])
def test_the_budget_is_met_whatever_the_length(student, budget, limit, seed):
    report = measure(student, "base", budget=budget, seed=seed, max_new_tokens=limit)
    spent = report.generated_tokens["continuations"]
    assert abs(spent - budget) <= max(0.05 * budget, limit), "5 %, or the longest continuation where that is more"
    assert all((n.count >= 1).all() for n in report.nodes)
    assert all((n.count[n.exact] == 1).all() for n in report.nodes)


def test_a_budget_too_small_for_all_nodes_subsamples_them(student):
    everything = measure(student, "base", continuations=1, max_new_tokens=40, nodes="every", seed=4)
    # What a continuation will cost is expected from four rollouts; of another seed these may be far too short.
    report = measure(student, "base", budget=200, max_new_tokens=40, nodes="every", seed=4)
    assert 0 < len(report.nodes) < len(everything.nodes)
    assert report.generated_tokens["continuations"] <= 1.3 * 200
    node_positions = {(n.rollout, n.depth) for n in everything.nodes}
    assert all((n.rollout, n.depth) in node_positions and n.inclusion < 1 for n in report.nodes)


def test_a_budget_and_seconds_stop_at_whichever_is_reached_first(student):
    assert measure(student, "base", seconds=100.0, budget=300).generated_tokens["continuations"] < 400


@pytest.mark.parametrize("target", ["predicted_gain", "gain_weighted_alignment", "alignment"])
def test_it_stops_when_the_interval_is_narrow_enough(student, target):
    rows = [{"prompt": p, "answer": "a"} for p in ("a", "b c", "c", "d e f", "e", "f f")]
    wide = measure(student, "base", budget=20000, target=target, half_width=100.0, rows=rows)
    # The interval is first checked when about half of the budget is spent.
    assert wide.generated_tokens["continuations"] < 16000
    narrow = measure(student, "base", budget=4000, target=target, half_width=1e-9, rows=rows)
    assert abs(narrow.generated_tokens["continuations"] - 4000) <= 200


def test_continuations_go_where_the_teacher_pulls(student):
    """Noise of predicted gain on the logits, which are known in advance: for the same tokens half of that, or less."""
    teachers = {"other": tiny_base(seed=5)}
    adaptive = measure(student, teachers, budget=4000, max_new_tokens=12)
    equal = measure(student, teachers, continuations=24, max_new_tokens=12)

    def noise(report):
        e = gather(report.nodes, logits=True)
        spread = np.where(e.exact | ~e.real, 0, 0.25 / e.count)
        return ((e.token_weight[:, None] * e.gain_form[:, 0]) ** 2 * spread).sum() * tokens(report)

    def tokens(report):
        return report.generated_tokens["continuations"]

    assert noise(adaptive) < 0.5 * noise(equal)


def test_prefixes_are_run_once_whatever_the_continuations(student):
    backend_of(student), check_graph(student)  # the trials of what this model can do have their own forwards
    calls = []
    for continuations in (1, 6):
        shapes = []
        stop = count_tokens(student, shapes)
        report = measure(
            student, "base", continuations=continuations, seed=1, update=False
        )  # every rollout in one segment
        stop()
        calls.append([s for s in shapes if s[1] > 1])
        # Single tokens are those that were sampled, and a few of rows that have ended.
        single = sum(rows for rows, width in shapes if width == 1)
        assert 1 <= single / sum(report.generated_tokens.values()) < 1.15
    assert calls[0] == calls[1]
    # Prompts twice, student, responses, teacher, gradients; the summed ideal gradients take each rollout once more.
    assert len(calls[0]) == 1 + 3 + 1 + 1 + 3 + 6 + 6


def test_the_report_counts_what_was_done(student):
    progress_calls = []
    probe = Probe(student, word_tokenizer(), word_reward, "base", ProbeConfig(max_new_tokens=5, continuations=2))
    report = probe.run(ROWS, seed=7, ids=["x", "y", "z"], progress=lambda *step: progress_calls.append(step))
    assert [r.question for r in report.rollouts] == [*"xxxxyyyyzzzz"]
    assert report.teachers == ("base",)
    assert report.modules == probe.modules
    assert len(report.modules) == 6
    assert report.settings["seed"] == 7
    assert report.settings["nodes"] == "balanced"
    # Nodes share them, and siblings and what passes by count too.
    assert 0 < report.continuations < sum(int(n.count[~n.exact].sum()) for n in report.nodes)
    assert report.generated_tokens["rollouts"] == sum(len(r.pieces) for r in report.rollouts)
    assert report.truncated >= sum(r.truncated for r in report.rollouts) > 0
    for r in report.rollouts:
        assert r.reward == word_reward(None, [r.text])[0]
        assert r.correct == (r.reward >= 1)
        assert r.truncated == (r.pieces[-1] != "</s>")
        assert r.text.split() == [p for p in r.pieces if p not in ("<pad>", "<s>", "</s>", "<unk>")]
    for n in report.nodes:
        rollout = report.rollouts[n.rollout]
        assert (n.question, n.correct) == (rollout.question, rollout.correct)
        assert WORDS[n.tokens[n.taken]] == rollout.pieces[n.depth]
        assert n.probability[0] == n.probability.max()
        assert n.gram.shape == (6, len(n.tokens), len(n.tokens))
        assert (n.exact == ((n.tokens == EOS) | (n.depth == 4))).all()
    assert set(report.stage_seconds) == {stage for stage, _, _ in progress_calls}
    for stage in report.stage_seconds:
        done = [(d, total) for s, d, total in progress_calls if s == stage]
        assert all(0 <= d <= total for d, total in done)
        assert done[-1][0] == done[-1][1]


@pytest.mark.parametrize("limit", [1, 2])
def test_responses_of_one_token(student, limit):
    report = measure(student, "base", max_new_tokens=limit, eos_token_ids=tuple(range(12)))
    assert {n.depth for n in report.nodes} == {0}
    assert all(n.exact.all() for n in report.nodes)
    assert report.continuations == 0


def test_progress_never_goes_back(student):
    progress_calls = []
    config = ProbeConfig(max_new_tokens=5, budget=400)
    Probe(student, word_tokenizer(), word_reward, "base", config).run(
        ROWS, seed=7, progress=lambda *s: progress_calls.append(s)
    )
    for stage in ("rollouts", "verifier", "branches", "teachers", "gradients", "continuations", "step_gradients"):
        done = [d for name, d, _ in progress_calls if name == stage]
        assert done == sorted(done), stage
        assert len(set(done)) > 1, stage
        assert all(d <= total for name, d, total in progress_calls if name == stage), stage


def test_every_end_token_ends(student):
    student.generation_config.eos_token_id = [EOS, WORDS.index("a")]
    try:
        report = measure(student, "base", eos_token_ids=(WORDS.index("b"),), max_new_tokens=20)
    finally:
        student.generation_config.eos_token_id = EOS
    ends = {"</s>", "a", "b"}
    assert all((r.pieces[-1] in ends) != r.truncated for r in report.rollouts)
    assert not any(set(r.pieces[:-1]) & ends for r in report.rollouts)
    assert {r.pieces[-1] for r in report.rollouts} & {"a", "b"}


def test_a_student_in_single_precision_agrees_with_double():
    """The same nodes and branches; alignments from the records of both, with the same successes."""
    wide, narrow = (measure(m, {"answer": "{answer} {prompt}"}) for m in (tiny(), tiny().float()))
    for a, b in zip(wide.nodes, narrow.nodes, strict=True):
        assert list(a.tokens) == list(b.tokens)
        np.testing.assert_allclose(estimate(a).alignment, estimate(b).alignment, atol=1e-4)
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-3, atol=1e-4 * np.abs(a.gram).max())


MIXED = [{"prompt": prompt, "answer": "a"} for prompt in ("a", "b c", "c", "d e f", "e", "f f")]
STREAMED = {"rows": MIXED, "max_new_tokens": 12, "seed": 3, "update": False, "step_alignment": False}


def assert_same_outcomes(report, expected):
    assert report.generated_tokens == expected.generated_tokens
    assert report.continuations == expected.continuations
    for node, expected_node in zip(report.nodes, expected.nodes, strict=True):
        assert (node.rollout, node.depth) == (expected_node.rollout, expected_node.depth)
        for values, expected_values in ((node.count, expected_node.count), (node.total, expected_node.total)):
            np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize("options", [{"budget": 500}, {"budget": 500, "half_width": 0.4}, {"continuations": 2}])
def test_results_do_not_depend_on_the_batch(student, options):
    options = {**STREAMED, **({"rows": ROWS} if "continuations" in options else {}), **options}
    expected = measure(student, "base", batch_size=64, **options)
    for batch_size in (2, 7):
        assert_same_outcomes(measure(student, "base", batch_size=batch_size, **options), expected)


@pytest.mark.parametrize("options", [{"budget": 600}, {"continuations": 2}])
def test_results_do_not_depend_on_interruptions(student, options, tmp_path, monkeypatch):
    """Interrupted after every few continuations, each time with another batch size."""
    steps = {"update": False, "step_alignment": False}
    config = ProbeConfig(rollouts_per_question=2, max_new_tokens=12, **steps, **options)
    expected = Probe(student, word_tokenizer(), word_reward, "base", config).run(MIXED, seed=3)
    receive = WaveQueue.receive
    stored_counts = []

    def interrupted_receive(queue, continuations, step):
        receive(queue, continuations, step)
        if len(queue.sampler.journal.continuations) >= stored_counts[-1] + 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(WaveQueue, "receive", interrupted_receive)
    report = None
    for attempt in range(40):
        journal = Journal(tmp_path / "journal")
        stored_counts.append(len(journal.continuations))
        probe = Probe(
            student, word_tokenizer(), word_reward, "base", replace(config, batch_size=(64, 5, 16)[attempt % 3])
        )
        try:
            report = probe.run(MIXED, seed=3, journal=journal)
            break
        except KeyboardInterrupt:
            pass
    assert len(stored_counts) > 2
    assert_same_outcomes(report, expected)


def test_questions_are_independent_of_each_other(student):
    """Two processes that share the questions sample what one would."""
    options = {"rollouts_per_question": 2, "max_new_tokens": 16, "continuations": 2, "update": False}
    ids = [str(place) for place in range(len(MIXED))]

    def nodes_of(places):
        probe = Probe(student, word_tokenizer(), word_reward, "base", ProbeConfig(**options))
        return probe.run([MIXED[place] for place in places], seed=3, ids=[ids[place] for place in places]).nodes

    def outcomes(nodes):
        by_question = {}
        for n in nodes:
            by_question.setdefault(n.question, []).append((n.depth, [*n.tokens], [*n.count], [*n.total]))
        return by_question

    whole, parts = outcomes(nodes_of(range(6))), outcomes([*nodes_of([0, 2, 4]), *nodes_of([1, 3, 5])])
    # Which nodes of a question are measured may depend on the other questions.
    same_nodes = [
        question
        for question in whole.keys() & parts.keys()
        if [node[:2] for node in whole[question]] == [node[:2] for node in parts[question]]
    ]
    assert len(same_nodes) >= 4
    assert all(whole[question] == parts[question] for question in same_nodes)


@pytest.mark.parametrize("options", [{"budget": 4000}, {"continuations": 8}])
def test_the_batch_stays_full(student, options):
    report = measure(student, "base", batch_size=32, **STREAMED, **options)
    lengths = {len(rollout.pieces) for rollout in report.rollouts}
    assert min(lengths) < 4
    assert max(lengths) > 8, "the case must have mixed lengths"
    assert report.slot_occupancy >= 0.85
    assert report.slot_steps["occupied"] == report.generated_tokens["continuations"]
