"""The cosine of a step with the teachers' summed gradients."""

import pytest
import torch

from odp_callbacks import Probe
from odp_callbacks.engine.update.taken_step import KeptParameters, step_cosines
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import flat_parameters, tiny, word_tokenizer
from tests.helpers.training import ROWS, TEACHERS, contains_answer_reward


def test_a_step_along_a_teacher_s_gradient_has_the_cosine_1() -> None:
    """The gradient is the one that a probe measures; the step is taken parameter by parameter."""
    student = tiny("llama").float()
    probe = Probe(
        student, word_tokenizer(), contains_answer_reward, TEACHERS, budget=0, rollouts_per_question=4, max_new_tokens=5
    )
    probe.run(ROWS)
    assert probe.summed_directions is None, "kept only where somebody asks for it"
    probe.summed_directions = {}
    probe.run(ROWS)
    directions = probe.summed_directions
    assert list(directions) == list(TEACHERS)
    before, start = KeptParameters.of(student, 0), flat_parameters(student)
    first = 0
    for parameter in lora_parameters(student).values():
        part = directions["answer"][first : first + parameter.numel()]
        parameter.data += 0.1 * part.view_as(parameter)
        first += parameter.numel()
    assert first == len(directions["answer"])
    cosines = step_cosines(before, KeptParameters.of(student, 1), directions)
    assert cosines["answer"] == pytest.approx(1, abs=1e-4)
    step = flat_parameters(student) - start
    expected = torch.nn.functional.cosine_similarity(step, directions["base"], dim=0)
    assert cosines["base"] == pytest.approx(float(expected), abs=1e-4)


def test_what_has_no_direction_has_no_cosine() -> None:
    before = KeptParameters({"a": torch.zeros(2), "b": torch.zeros(1, 1)}, 0)
    after = KeptParameters({"a": torch.tensor([3.0, 0.0]), "b": torch.full((1, 1), 4.0)}, 1)
    directions = {"along": torch.tensor([3.0, 0.0, 4.0]), "zero": torch.zeros(3), "of another": torch.ones(4)}
    assert step_cosines(before, after, directions) == {"along": pytest.approx(1)}
    assert step_cosines(before, before, directions) == {}


def test_copies_of_other_parameters_do_not_fit() -> None:
    student = tiny("llama")
    kept = KeptParameters.of(student, 3)
    assert kept.fits(KeptParameters.of(student, 4))
    next(iter(lora_parameters(student).values())).requires_grad_(False)
    assert not kept.fits(KeptParameters.of(student, 4))
    assert not kept.fits(KeptParameters.of(tiny("gpt2"), 4))
