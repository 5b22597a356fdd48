import contextlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.engine import (
    AdapterTeacher,
    BaseTeacher,
    EMATeacher,
    Probe,
    ProbeConfig,
    RewardError,
    Teacher,
    diagnose,
    every_node,
)
from odp_callbacks.engine.gradients import random_projection as projection
from odp_callbacks.storage import load, save
from tests.helpers.models import BOS, FAMILIES, Snapshot, paddable, randomise, tiny, tiny_base, word_tokenizer
from tests.helpers.probes import (
    ROWS,
    assert_same_measurements,
    failing_reward,
    make_probe,
    measure,
    random_reward,
    word_reward,
)


def random_streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


class Broken(BaseTeacher):
    """Fails while the student's adapters are off."""

    @contextlib.contextmanager
    def policy(self, student):
        with super().policy(student):
            torch.rand(1)
            raise KeyError("teacher")
            yield


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize(
    ("reward", "teacher", "error"),
    [
        (random_reward, BaseTeacher(), None),
        (failing_reward, BaseTeacher(), "verifier"),
        (word_reward, Broken(), "teacher"),
    ],
)
def test_nothing_outside_changes(name, reward, teacher, error):
    student, other = paddable(name, dropout=0.5), paddable(name, dropout=0.5, seed=2)
    student.train()
    other.train()
    list(student.modules())[-1].eval()
    next(p for n, p in student.named_parameters() if "lora_" in n).sum().backward()
    before = Snapshot(student), Snapshot(other)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 (as above)
    streams = random_streams()
    teachers = {"one": other, "two": EMATeacher(), "three": teacher}
    with pytest.raises(KeyError, match=error) if error else contextlib.nullcontext():
        measure(student, teachers, reward=reward)
    assert [a == b for a, b in zip(random_streams(), streams)] == [True] * 3
    for snapshot in before:
        snapshot.check()


def test_the_seed_decides_and_nothing_else_does():
    def run(seed=0, noise=0, mode=True, context=contextlib.nullcontext):
        student = tiny(dropout=0.5)
        student.train(mode)
        torch.manual_seed(noise)
        random.seed(noise)
        with context():
            return measure(student, "base", reward=random_reward, seed=seed, budget=150, branch_mass=0.5)

    first = run()
    for again in (run(noise=5), run(mode=False), run(context=torch.no_grad), run(context=torch.inference_mode)):
        assert_same_measurements(again, first)
    assert [r.pieces for r in run(seed=1).rollouts] != [r.pieces for r in first.rollouts]


def test_batches_do_not_change_what_is_measured(student):
    """Sampling is another draw, but greedy rollouts, their branches and gradients are the same."""
    config = {"temperature": 1e-3, "nodes": every_node, "tail_draws": 1}
    found = [measure(student, "base", batch_size=size, **config) for size in (1, 64)]
    assert [r.pieces for r in found[0].rollouts] == [r.pieces for r in found[1].rollouts]
    for a, b in zip(*(r.nodes for r in found), strict=True):
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-9)


def test_what_cannot_be_measured_is_said_at_once(student):
    with pytest.raises(TypeError, match="`reward` must be a function of prompts"):
        make_probe(student, reward=[1.0])
    with pytest.raises(ValueError, match="has no LoRA parameters"):
        make_probe(tiny_base())
    with pytest.raises(ValueError, match="must share the student's vocabulary"):
        make_probe(student, teachers=tiny_base(vocabulary=13))
    with pytest.raises(ValueError, match=r"one of the student's adapters \['default'\]"):
        make_probe(student, teachers=AdapterTeacher("gold"))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "`prompts` has no rows"),
        ([{"question": "a"}], {}, "needs a column 'prompt'"),
        ([{"prompt": "a"}], {"max_new_tokens": 63}, "question 0 has 2 tokens and `max_new_tokens` is 63"),
        ([{"prompt": "a"}], {"teachers": {"t": "a " * 60 + "{prompt}"}}, "question 0 for teacher 't' has 62 tokens"),
        ([{"prompt": "a"}], {"teachers": {"t": "{answer}"}}, "`context` names the column 'answer'"),
    ],
)
def test_rows_are_checked(student, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        make_probe(student, **changes).validate(rows)


def test_the_verifier_is_checked(student):
    with pytest.raises(RewardError, match="one number for each of the 2 completions, but it returned 1"):
        make_probe(student, reward=lambda prompts, completions: [1.0]).validate(ROWS)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="`reward` raised KeyError on an empty completion: 'verifier'"):
        make_probe(student, reward=failing_reward).validate(ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    make_probe(student).validate(ROWS)


def test_diagnose_is_the_short_form(student):
    short = diagnose(student, word_tokenizer(), ROWS, word_reward, "base", seed=3, max_new_tokens=8)
    assert_same_measurements(short, make_probe(student).run(ROWS, seed=3))
    with pytest.raises(ValueError, match="`prompts` has no rows"):
        diagnose(student, word_tokenizer(), [], word_reward, "base")


def test_a_configuration_and_options_are_taken_alike(student):
    arguments = (student, word_tokenizer(), word_reward, "base")
    config = ProbeConfig(max_new_tokens=8, budget=60)
    assert Probe(*arguments).config == ProbeConfig()
    assert Probe(*arguments, config, max_new_tokens=6).config == ProbeConfig(max_new_tokens=6, budget=60)
    reports = [
        diagnose(*arguments[:2], ROWS, *arguments[2:], seed=3, **options)
        for options in ({"config": config}, {"max_new_tokens": 8, "budget": 60}, {"config": config, "budget": 60})
    ]
    for report in reports:
        assert_same_measurements(report, Probe(*arguments, config).run(ROWS, seed=3))
    for function in (Probe, lambda *given, **options: diagnose(*given[:2], ROWS, *given[2:], **options)):
        with pytest.raises(TypeError, match="unknown option `max_tokens`; did you mean `max_new_tokens`"):
            function(*arguments, max_tokens=3)


def test_the_seconds_of_one_run_lower_those_of_the_configuration(student):
    probe = make_probe(student, budget=100_000, rollouts_per_question=2, seconds=100.0)
    start = time.perf_counter()
    report = probe.run(ROWS, seconds=1.0)
    assert time.perf_counter() - start < 20, "far less than the budget takes, also on a busy machine"
    assert report.settings["seconds"] == 1.0
    assert report.generated_tokens["continuations"] < 100_000
    assert probe.config.seconds == 100.0
    assert make_probe(student, continuations=1).run(ROWS, seconds=50.0).settings["seconds"] == 50.0


def test_rows_are_encoded_once(student):
    """From the check to the gradients, for the student and for a teacher with a context."""
    prompts = []

    def context(row):
        prompts.append(row["prompt"])
        return f"{row['answer']} {row['prompt']}"

    probe = make_probe(student, teachers={"answer": Teacher(context)}, rollouts_per_question=2)
    questions = probe.validate(ROWS, ids=["x", "y", "z"])
    assert prompts == [row["prompt"] for row in ROWS]
    report = probe.run(questions, seed=3)
    assert prompts == [row["prompt"] for row in ROWS]
    assert [rollout.question for rollout in report.rollouts] == [*"xxyyzz"]
    assert_same_measurements(report, probe.run(ROWS, seed=3, ids=["x", "y", "z"]))


def test_importing_the_engine_loads_no_models_and_no_trainer():
    """These imports take seconds, so they wait until they are used."""
    code = "import sys, odp_callbacks.engine; print(*{name.split('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy"} <= set(modules)
    assert not {"transformers", "peft", "lightning", "trl", "scipy", "pandas", "pyarrow", "matplotlib"} & set(modules)


def test_encoded_rows_with_padding_are_the_same_questions(student, tokenizer):
    """As a data loader gives them: left-padded, with a mask."""
    ids = [tokenizer(r["prompt"])["input_ids"] for r in ROWS]
    width = max(map(len, ids))
    rows = [
        {
            "input_ids": torch.tensor([0] * (width - len(i)) + i),
            "attention_mask": torch.tensor([0] * (width - len(i)) + [1] * len(i)),
        }
        for i in ids
    ]
    assert all(i[0] == BOS for i in ids)
    found, expected = measure(student, "base", rows=rows), measure(student, "base")
    assert_same_measurements(found, expected)


def test_an_average_teaches_what_the_student_was():
    student = tiny()
    teacher = EMATeacher(decay=0.0)
    teacher.update(student, 0)
    was = tiny()
    randomise(student, "default", 0.5, 3)
    found, expected = measure(student, {"t": teacher}), measure(student, {"t": was})
    for a, b in zip(found.nodes, expected.nodes, strict=True):
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-5, atol=1e-7 * np.abs(b.gram).max())


def test_every_token_of_a_long_response_is_projected(student, monkeypatch, tmp_path):
    """Where that is cheaper, and said in the report; other choices of nodes, and a user who wants none, stay exact."""
    exact = measure(student, nodes="every", teachers="base")
    monkeypatch.setattr(projection, "TANGENT_COST", 0.0)
    for changes in ({"nodes": "exponential"}, {"nodes": "every", "projections": None}):
        report = measure(student, "base", **changes)
        assert report.modules == exact.modules
        assert report.settings["projections"] is None
    found = measure(student, nodes="every", teachers="base", projections=4000)
    assert found.modules == (projection.ALL_MODULES,)
    assert found.settings["projections"] == 4000
    for a, b in zip(found.nodes, exact.nodes, strict=True):
        size = np.sqrt(np.outer(*[np.diag(b.gram.sum(0))] * 2))
        assert a.gram.shape == (1, *b.gram.shape[1:])
        assert (np.abs(a.gram[0] - b.gram.sum(0)) <= 6 * np.sqrt(2 / 4000) * size + 1e-12).all()
    # What an optimizer's step would see is summed exactly all the same.
    np.testing.assert_allclose(found.step.gram, exact.step.gram, rtol=1e-4)
    save(found, tmp_path / "records")
    assert load(tmp_path / "records").modules == found.modules
    assert {s.split for s in summarise(found, by="module")} == {projection.ALL_MODULES}
