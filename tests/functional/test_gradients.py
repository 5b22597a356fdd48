import pytest
import torch
from peft import LoraConfig

from odp_callbacks.functional import lora_gradients, lora_parameters
from odp_callbacks.functional.gradients import evaluation_mode, logits_at
from tests.helpers.models import PAD, Snapshot, randomise, relative, tiny, tiny_base

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])


def reference_gradient(model, ids, position, cotangent):
    """The gradient by one forward over all positions and one backward, through ``.grad``."""
    model.zero_grad()
    (model(input_ids=ids[None]).logits[0, position] @ cotangent).backward()
    gradient = torch.cat([p.grad.flatten().clone() for name, p in model.named_parameters() if "lora_" in name])
    model.zero_grad()
    return gradient


def test_equals_one_backward_for_each_direction(family):
    model = tiny(family)
    positions = torch.tensor([0, 8, 3])
    cotangents = torch.randn(3, 2, model.config.vocab_size, dtype=torch.float64)
    gradients = lora_gradients(model, IDS, positions, cotangents)
    expected = torch.stack(
        [
            torch.stack([reference_gradient(model, IDS, position, direction) for direction in directions])
            for position, directions in zip(positions, cotangents)
        ]
    )
    assert relative(gradients, expected) < 1e-8
    # The gradients reach the A matrices too, and no node receives the direction of another.
    assert (gradients.abs().amax(dim=(0, 1)) > 0).double().mean() > 0.9


def test_changes_no_state_and_ignores_the_mode():
    model = tiny(dropout=0.5)
    arguments = IDS, torch.tensor([4]), torch.randn(1, 1, model.config.vocab_size, dtype=torch.float64)
    expected = lora_gradients(model, *arguments)
    model.train()
    model.base_model.model.model.layers[0].eval()
    next(p for n, p in model.named_parameters() if "lora_" in n).grad = (
        torch.ones(())[None, None].expand(2, 16).double()
    )
    before, state = Snapshot(model), torch.get_rng_state()
    with torch.inference_mode():
        in_inference_mode = lora_gradients(model, *arguments)
    with torch.no_grad():
        assert torch.equal(lora_gradients(model, *arguments), expected)
    assert torch.equal(in_inference_mode, expected)
    before.check()
    assert torch.equal(torch.get_rng_state(), state)


def test_unused_parameters_count_as_zeros(student):
    """At the first position the attention has one key only, so q_proj receives no gradient."""
    gradient = lora_gradients(student, IDS, torch.tensor([0]), torch.randn(1, 1, 12, dtype=torch.float64))
    assert gradient.shape == (1, 1, sum(p.numel() for p in lora_parameters(student).values()))
    assert lora_gradients(student, IDS, torch.tensor([], dtype=torch.long), torch.zeros(0, 3, 12)).shape[:2] == (0, 3)
    assert lora_gradients(student, IDS, torch.tensor([1]), torch.zeros(1, 0, 12)).shape[:2] == (1, 0)


def test_parameters_are_those_of_the_active_adapter_that_train(student):
    student.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    assert all(".default." in n for n in lora_parameters(student))
    names = [n for n, _ in student.named_parameters()]
    assert list(lora_parameters(student)) == [n for n in names if ".default." in n and "lora_" in n]
    student.set_adapter("other")
    assert lora_parameters(student)
    assert all(".other." in n for n in lora_parameters(student))
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    assert len(lora_parameters(student)) == 2 * 2  # loaded for inference: all of the adapter
    student.set_adapter("default")
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    half = [n for n in lora_parameters(student) if "layers.1." in n]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in half)
    assert list(lora_parameters(student)) == half


def test_a_base_parameter_that_trains_is_not_a_lora_parameter(student):
    student.get_base_model().lm_head.weight.requires_grad_(True)
    assert all("lora_" in name for name in lora_parameters(student))


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="no LoRA parameters in an active adapter; wrap it with peft"):
        lora_parameters(tiny_base())


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_mode_restores_every_module(student, fails):
    student.train()
    list(student.modules())[5].training = False
    modes = [m.training for m in student.modules()]
    with pytest.raises(RuntimeError) if fails else torch.no_grad(), evaluation_mode(student):
        assert not any(m.training for m in student.modules())
        if fails:
            raise RuntimeError
    assert [m.training for m in student.modules()] == modes


@pytest.mark.parametrize("selects_positions", [True, False])
def test_logits_at_chosen_positions(family, selects_positions, monkeypatch):
    """Also for a model that cannot skip the other positions; padding on the right changes nothing."""
    model = tiny(family)
    if not selects_positions:
        monkeypatch.setattr("odp_callbacks.functional.gradients.forward_arguments", lambda model: frozenset())
    positions = torch.tensor([7, 2])
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[:, positions]
        padded, mask = torch.cat([IDS, torch.tensor([PAD, PAD])])[None], torch.tensor([[1] * 9 + [0] * 2])
        torch.testing.assert_close(logits_at(model, IDS[None], positions), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits_at(model, padded, positions, mask), expected, rtol=1e-5, atol=1e-5)


def test_logits_at_with_other_parameters(student):
    other = randomise(tiny(), "default", 0.2, 5)
    replaced = dict(lora_parameters(other))
    with torch.no_grad():
        logits = logits_at(student, IDS[None], torch.tensor([8]), parameters=replaced)
        assert torch.equal(logits, logits_at(other, IDS[None], torch.tensor([8])))
        assert not torch.equal(logits, logits_at(student, IDS[None], torch.tensor([8])))


@pytest.mark.parametrize(
    ("ids", "positions", "shape", "message"),
    [
        (IDS[None], [1], (1, 1, 12), r"one sequence \(T,\) and its nodes \(N,\), but \(1, 9\) and \(1,\)"),
        (IDS, [1, 2], (1, 1, 12), r"`cotangents` must have shape \(N, C, V\) with N = 2, but \(1, 1, 12\)"),
        (IDS, [1], (1, 12), r"`cotangents` must have shape"),
        (IDS, [0, 9], (2, 1, 12), r"`positions` must lie in \[0, 8\], but they reach from 0 to 9"),
        (IDS, [-1], (1, 1, 12), r"`positions` must lie in"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(student, ids, positions, shape, message):
    with pytest.raises(ValueError, match=message):
        lora_gradients(student, ids, torch.tensor(positions), torch.zeros(shape))
