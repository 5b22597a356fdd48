import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.functional import (
    distillation_logit_gradient,
    gradient_alignment,
    ideal_logit_gradient,
    lora_parameters,
)
from tests.helpers.models import DTYPES, relative
from tests.helpers.worlds import make_world

TEMPERATURES = (0.7, 1.0, 2.5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_is_the_gradient_of_success_with_the_token_values_held_constant(temperature):
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 9, dtype=torch.float64)).requires_grad_()
    success = torch.rand(4, 9, dtype=torch.float64)
    (torch.softmax(logits / temperature, dim=-1) * success).sum().backward()
    torch.testing.assert_close(ideal_logit_gradient(logits, success, temperature), logits.grad, rtol=1e-12, atol=1e-15)


def test_one_success_vector_serves_a_batch_of_logits():
    logits, success = torch.randn(3, 2, 5), torch.rand(5)
    assert torch.equal(ideal_logit_gradient(logits, success), ideal_logit_gradient(logits, success.expand(3, 2, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1.0])
def test_constant_success_is_exactly_zero_and_its_alignment_undefined(dtype, constant):
    torch.manual_seed(1)
    logits = (4 * torch.randn(50, 101)).to(dtype)
    gradient = ideal_logit_gradient(logits, torch.full_like(logits, constant), 0.7)
    assert gradient.dtype == dtype
    assert (gradient == 0).all()
    assert gradient_alignment(gradient, torch.randn(50, 101).to(dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_is_that_of_the_logits(dtype):
    torch.manual_seed(2)
    logits, success = torch.randn(6, 7).to(dtype), torch.rand(6, 7).to(dtype)
    gradient = ideal_logit_gradient(logits, success)
    # It is computed in a wider dtype and rounded once.
    wide = ideal_logit_gradient(logits.double(), success.double())
    torch.testing.assert_close(gradient.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("eta", [-30.0, -1.0, 1e-3, 2.0])
def test_the_tilted_teacher_aligns_exactly(eta, temperature):
    torch.manual_seed(3)
    logits, success = 2 * torch.randn(20, 11, dtype=torch.float64), torch.rand(20, 11, dtype=torch.float64)
    teacher = logits + temperature * eta * success  # its policy is p * exp(eta * Q), normalised
    direction = distillation_logit_gradient(logits, teacher, "reverse_kl", temperature=temperature)
    alignment = gradient_alignment(ideal_logit_gradient(logits, success, temperature), direction)
    torch.testing.assert_close(alignment, torch.full_like(alignment, eta / abs(eta)), rtol=0, atol=1e-10)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 1)), min_size=2, max_size=12), st.floats(0.1, 10))
def test_the_gradient_sums_to_zero_and_raises_success(pairs, temperature):
    logits, success = torch.tensor(pairs, dtype=torch.float64).T
    gradient = ideal_logit_gradient(logits, success, temperature)
    assert abs(gradient.sum()) <= 1e-14 * len(pairs) / temperature
    assert gradient @ success >= -1e-15


@pytest.mark.parametrize(("family", "tolerance"), [("llama", 1e-6), ("gpt2", 1e-10)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_gradient_identity(family, tolerance, temperature):
    """The sum over all nodes of reach times the ideal gradient is the gradient of the expected reward."""
    world = make_world(family)
    parameters = list(lora_parameters(world.model).values())
    nodes = world.solve(temperature)
    assert len(nodes) == 1 + 4 + 16
    expected_reward = torch.softmax(nodes[()].logits / temperature, dim=-1) @ nodes[()].success
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(expected_reward, parameters)])
    total = torch.zeros_like(expected)
    for node in nodes.values():
        ideal = ideal_logit_gradient(node.logits.detach(), node.success.detach(), temperature)
        total += node.reach.detach() * world.parameter_gradients(node, ideal)[0]
    assert relative(total, expected) < tolerance


@pytest.mark.parametrize("eta", [-2.0, 0.5])
def test_the_tilted_teacher_aligns_on_lora_parameters(eta):
    world = make_world()
    with torch.no_grad():
        nodes = world.solve()
    for node in nodes.values():
        ideal = ideal_logit_gradient(node.logits, node.success)
        # The teacher is computed independently: as the logarithm of its normalised probabilities.
        tilted = torch.softmax(node.logits, dim=-1) * torch.exp(eta * node.success)
        direction = distillation_logit_gradient(node.logits, torch.log(tilted / tilted.sum()), "reverse_kl")
        alignment = gradient_alignment(*world.parameter_gradients(node, ideal, direction))
        assert abs(alignment - eta / abs(eta)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, dtype=torch.long), torch.zeros(3)), TypeError, r"`student_logits` must be a floating-point"),
        ((torch.zeros(3), [0.0, 1.0, 0.0]), TypeError, r"`success` must be .*, but list was given"),
        ((torch.zeros(3), torch.tensor(1.0)), TypeError, r"`success` must be"),
        ((torch.zeros(3), torch.zeros(1, 4)), ValueError, r"each of the 3 tokens .* its shape is \(1, 4\)"),
        ((torch.zeros(3), torch.zeros(3), 0.0), ValueError, r"`temperature` must be a positive number, but 0.0"),
        ((torch.zeros(3), torch.zeros(3), float("inf")), ValueError, r"`temperature`"),
        ((torch.zeros(3), torch.zeros(3), float("nan")), ValueError, r"`temperature`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ideal_logit_gradient(*arguments)
