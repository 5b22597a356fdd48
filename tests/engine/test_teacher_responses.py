"""Responses that teachers sample by themselves."""

import copy

import pytest
import torch

from odp_callbacks.engine import BaseTeacher, EMATeacher, ModelTeacher, Probe, Teacher
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import sample_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teacher_responses import sample_teacher_responses
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import Snapshot, tiny, tiny_base, word_tokenizer
from tests.helpers.probes import word_reward

ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in (("a b", "c"), ("c", "d"), ("b a d", "e"))]
CONFIG = {"max_new_tokens": 5, "rollouts_per_question": 2, "budget": 0}


def expected_texts(model, name, prompts, seed=0):
    """The texts that a model samples for prompts under the draws of a teacher's name."""
    tokenizer = word_tokenizer()
    questions = as_questions([{"prompt": prompt} for prompt in prompts], tokenizer)
    with torch.no_grad():
        rollouts = sample_rollouts(
            model.eval(), tokenizer, questions, per_question=3, max_new_tokens=5, temperature=1.0, eos_token_ids=[2],
            randomness=Randomness(Randomness(seed).key("teacher responses", name)), batch_size=4,
        )  # fmt: skip
    return [rollout.text for rollout in rollouts]


def test_each_teacher_answers_by_itself_under_its_own_context():
    student, other = tiny(), tiny_base(seed=7)
    average = EMATeacher()
    average.update(student, 0)
    with torch.no_grad():
        for parameter in lora_parameters(student).values():
            parameter.add_(0.5)  # the average is now another model
    averaged = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in lora_parameters(averaged).values():
            parameter.sub_(0.5)
    base = copy.deepcopy(student)
    teachers = {
        "hint": Teacher("{answer} {prompt}"),
        "base": BaseTeacher(),
        "ema": average,
        "other": ModelTeacher(other),
    }
    probe = Probe(student, word_tokenizer(), word_reward, teachers, **CONFIG)
    snapshot, state = Snapshot(student), torch.get_rng_state()
    responses = sample_teacher_responses(probe, probe.validate(ROWS), responses=3)
    snapshot.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert [response.question for response in responses[:9]] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    texts = {name: [one.text for one in responses if one.teacher == name] for name in teachers}
    prompts = [row["prompt"] for row in ROWS]
    with_answers = [f"{row['answer']} {row['prompt']}" for row in ROWS]
    assert texts["hint"] == expected_texts(student, "hint", with_answers)
    assert texts["ema"] == expected_texts(averaged, "ema", prompts)
    assert texts["other"] == expected_texts(other, "other", prompts)
    with base.disable_adapter():
        assert texts["base"] == expected_texts(base, "base", prompts)
    rewards = word_reward(None, [one.text for one in responses])
    assert [one.reward for one in responses] == rewards
    assert [one.correct for one in responses] == [reward >= 1 for reward in rewards]


def test_a_teacher_does_not_depend_on_the_others_and_unscored_responses_are_left_out():
    def alone(reward):
        probe = Probe(tiny(), word_tokenizer(), reward, {"hint": Teacher("{answer} {prompt}")}, **CONFIG)
        return sample_teacher_responses(probe, ROWS, responses=3)

    both = Probe(tiny(), word_tokenizer(), word_reward, {"base": "base", "hint": "{answer} {prompt}"}, **CONFIG)
    assert sample_teacher_responses(both, ROWS, responses=3)[-9:] == alone(word_reward)
    assert len(alone(lambda prompts, completions, **columns: [None, *[1.0] * (len(completions) - 1)])) == 8
    with pytest.raises(ValueError, match="`responses` must be a positive integer"):
        sample_teacher_responses(both, ROWS, responses=0)
