"""Real vLLM: a server, an engine in the process, and that of TRL's trainer sample from the student of the moment."""

import os
import signal

import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.engines import EngineError, VllmServer
from odp_callbacks.engine.engines.agreement import check_agreement
from odp_callbacks.engine.engines.student_engine import StudentEngine
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import sample_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teacher_responses import sample_teacher_responses
from odp_callbacks.engine.teachers import BaseTeacher, Teacher
from odp_callbacks.engine.trial_step import success_by_question, trial_step
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import EOS, word_tokenizer
from tests.helpers.vllm import run_program, served_student

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [torch.tensor(prompt) for prompt in ([1, 6, 7], [1, 8], [1, 9, 10, 11], [1, 6])]
CHECK = {"max_new_tokens": 16, "stop_token_ids": [EOS], "randomness": Randomness(0)}


@pytest.fixture
def engine(vllm_server):
    engine = VllmServer(vllm_server.url)
    yield engine
    engine.release()


def test_the_adapter_of_the_moment_is_the_one_that_is_sampled(engine, vllm_server):
    first, second = served_student(1), served_student(2)
    for step, student in enumerate((first, second, first)):
        engine.sync(student, step)
        assert check_agreement(engine, student, PROMPTS, **CHECK) < 1e-4
        assert len(vllm_server.model_names()) == 2  # the base, and one adapter
    with pytest.raises(EngineError, match="does not sample from the student"):
        check_agreement(engine, second, PROMPTS, **CHECK)
    with torch.no_grad():  # as a step of the training would, in place
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    with pytest.raises(EngineError, match="does not sample from the student"):
        check_agreement(engine, first, PROMPTS, **CHECK)
    engine.sync(first, 4)
    assert check_agreement(engine, first, PROMPTS, **CHECK) < 1e-4
    engine.release()
    assert vllm_server.model_names() == ["student"]


def test_without_its_adapter_the_served_base_is_sampled(engine, vllm_server):
    student = served_student(1)
    engine.sync(student, 0)
    with BaseTeacher().policy(student):
        with pytest.raises(EngineError, match="does not sample from the student"):
            check_agreement(engine, student, PROMPTS, **CHECK)
        engine.sync(student, 1)
        assert check_agreement(engine, student, PROMPTS, **CHECK) < 1e-4
        assert vllm_server.model_names() == ["student"]


def test_a_step_on_trial_and_responses_of_teachers_come_from_the_server(engine, vllm_server):
    student, rows = served_student(1), [{"prompt": prompt} for prompt in ("a b", "c d", "e f", "f")]
    teachers = {"base": "base", "hint": Teacher("c {prompt}")}

    def reward(prompts, completions, **columns):
        return [float("d" in completion.split()) for completion in completions]

    def rates(engine):
        probe = Probe(student, word_tokenizer(), reward, teachers, engine=engine, max_new_tokens=4, budget=0)
        responses = sample_teacher_responses(probe, rows, responses=50)
        of_teachers = [[one.reward for one in responses if one.teacher == name] for name in teachers]
        size = sum(parameter.numel() for parameter in lora_parameters(student).values())
        with trial_step(student, torch.ones(size), 8.0):
            moved = success_by_question(probe, probe.encode(rows), 50, seed=0)
        return [*map(np.mean, of_teachers), moved.mean()]

    of_server, own = rates(engine), rates("local")
    assert own[1] - max(own[0], own[2]) > 0.3, "the policies differ"
    assert np.abs(np.subtract(of_server, own)).max() < 0.18  # 200 draws each: 3.6 standard errors of a difference
    assert vllm_server.model_names() == ["student"]


def outcomes(student, engine, seed):
    """Frequencies of responses by their first two tokens and whether they end."""
    question = Question("q", {}, torch.tensor([1, 6, 7]))
    rollouts = sample_rollouts(
        student,
        word_tokenizer(),
        [question],
        per_question=1500,
        max_new_tokens=4,
        temperature=2.0,
        eos_token_ids=[EOS],
        randomness=Randomness(seed),
        batch_size=256,
        engine=engine,
    )
    kinds = [(one.response_ids[0], (*one.response_ids, EOS)[1], one.truncated) for one in rollouts]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_outcomes_are_as_frequent_as_with_the_students_own_model(engine):
    student = served_student(3)
    engine.sync(student, 0)
    own = outcomes(student, None, 0)
    other = outcomes(student, StudentEngine(engine, student, 0), 1)
    common = [kind for kind in own.keys() | other.keys() if own.get(kind, 0) + other.get(kind, 0) >= 20]
    table = np.array([[frequencies.get(kind, 0) for kind in common] for frequencies in (own, other)])
    rare = 1500 - table.sum(axis=1, keepdims=True)
    table = np.concatenate([table, rare], axis=1) if rare.all() else table
    assert table.shape[1] >= 10
    assert stats.chi2_contingency(table).pvalue > 0.01


def test_a_sample_depends_on_its_seed_and_not_on_what_else_is_sampled(engine):
    engine.sync(served_student(1), 0)
    options = {"temperature": 1.0, "stop_token_ids": [EOS]}
    prompts = [prompt.tolist() for prompt in PROMPTS] * 8
    together = engine.sample(prompts, max_tokens=[12] * 32, seeds=range(32), **options)
    alone = [engine.sample([prompts[seed]], max_tokens=[12], seeds=[seed], **options)[0] for seed in range(8)]
    assert [one.token_ids for one in together[:8]] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in together}) > 8
    assert [len(one.token_ids) <= 12 for one in together]


def test_a_probe_measures_what_it_measures_with_the_students_own_model(engine):
    student, rows = served_student(1), [{"prompt": prompt} for prompt in ("a b", "c d", "e f", "f")]
    responses = [[[6, 7, 8, 9]], [[9, 8, 7, 6, 11]], [[10, 10, 6, 7, EOS]], [[11, 6, 9, 10, 7, 7]]]

    def reward(prompts, completions, **columns):
        return [float("a" in completion.split()[-2:]) for completion in completions]

    def measured(engine):
        config = ProbeConfig(max_new_tokens=8, continuations=30, nodes=2, update=False, engine=engine)
        return Probe(student, word_tokenizer(), reward, {"base": "base"}, config).run(rows, responses=responses)

    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    stream = torch.get_rng_state()
    of_engine = measured(engine)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(weight, student.state_dict()[name]) for name, weight in before.items())
    own = measured("local")
    assert of_engine.settings["engine"] == engine.name
    assert of_engine.continuations == own.continuations > 500
    statistic, branches = 0.0, 0
    for node, other in zip(of_engine.nodes, own.nodes, strict=True):
        assert node.tokens.tolist() == other.tokens.tolist()
        for count, hits, other_hits in zip(node.count, node.total, other.total, strict=True):
            rate = (hits + other_hits) / (2 * count)
            if 0 < rate < 1 and count > 1:
                statistic += (hits - other_hits) ** 2 / (2 * count * rate * (1 - rate))
                branches += 1
    assert branches >= 20
    assert 0.01 < stats.chi2.sf(statistic, branches) < 0.999
    low, gain, high = (
        [scalars(report)[f"odp/predicted_gain{end}/base/all"] for report in (of_engine, own)]
        for end in ("_low", "", "_high")
    )
    assert low[0] < gain[1] < high[0]
    assert low[1] < gain[0] < high[1]


def test_what_is_given_up_at_a_limit_leaves_the_server_free(engine):
    engine.sync(served_student(1), 0)
    options = {"temperature": 1.0, "stop_token_ids": []}
    long = engine.sample([[1, 6]] * 128, max_tokens=[200] * 128, seeds=range(128), **options, seconds=0.3)
    assert {one.finish_reason for one in long} >= {"unfinished"}
    (short,) = engine.sample([[1, 6]], max_tokens=[2], seeds=[0], **options)
    assert short.finish_reason == "length"


def test_a_server_that_stops_answering_is_noticed(vllm_server):
    impatient = VllmServer(vllm_server.url, timeout=0.5)
    os.killpg(vllm_server.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match=r"has answered nothing for 0\.5 seconds"):
            impatient.sync(served_student(1), 0)
    finally:
        os.killpg(vllm_server.process.pid, signal.SIGCONT)


def test_an_engine_in_the_process_samples_from_each_adapter(vllm_interpreter, served_base, tmp_path):
    result = run_program(vllm_interpreter, "in_process", served_base, tmp_path)
    assert max(result["differences"]) < 1e-4
    assert result["unfinished"] > 0
    assert all(result["alone"])
    assert result["continuations"] > 100
    assert result["adapters"] == 0
    assert result["engine"] == "vllm.LLM"


def test_the_engine_of_a_trainer_is_as_before_and_so_is_the_training(vllm_interpreter, served_base, tmp_path):
    result = run_program(vllm_interpreter, "trl_trainer", served_base, tmp_path)
    assert result["trained"]
    assert result["same_training"]
    assert result["same_student"]
    assert result["same_engine"]
    assert result["probes"] == 3
    assert result["continuations"] > 100
    assert result["engine"] == "vLLM of the trainer"
