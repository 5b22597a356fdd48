import pytest
import torch

from odp_callbacks.engine.gradients.gram_matrices import lora_modules
from odp_callbacks.engine.gradients.random_projection import supports_projection
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.functional import lora_gradients, lora_parameters
from tests.helpers.models import Snapshot, relative, tiny

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])
POSITIONS = [2, 8, 5]


def gram_matrices(*arguments, **options):
    return node_gram_matrices(*arguments, **options).grams


def directions(counts=(3, 1, 5), scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(c, 12, generator=generator, dtype=torch.float64) for c in counts]


def reference_gradients(model, position, cotangents):
    return lora_gradients(model, IDS, torch.tensor([position]), cotangents[None])[0]


@pytest.mark.parametrize("ends", [None, [9], [3, 6, 9], [4, 9]])
@pytest.mark.parametrize("max_memory_bytes", [None, 1])
def test_gram_matrices_are_those_of_the_reference_gradients(family, ends, max_memory_bytes):
    """In any segments, and with one direction at a time where there is no memory for more."""
    model = tiny(family)
    modules = lora_modules(list(lora_parameters(model)))
    sizes = [sum(p.numel() for n, p in lora_parameters(model).items() if f"{m}.lora_" in n) for m in modules]
    grams = gram_matrices(model, IDS, POSITIONS, directions(), ends=ends, max_memory_bytes=max_memory_bytes)
    for position, cotangents, gram in zip(POSITIONS, directions(), grams, strict=True):
        assert gram.dtype == torch.float64
        rows = reference_gradients(model, position, cotangents)
        assert relative(gram.sum(0), rows @ rows.mT) < 1e-6
        # Each module has its own matrix, to which no other module contributes.
        expected = torch.stack([part @ part.mT for part in rows.split(sizes, dim=1)])
        assert relative(gram, expected) < 1e-6
        assert (expected.diagonal(dim1=1, dim2=2) > 0).all()


def test_single_precision_and_directions_of_any_size():
    model = tiny().float()
    wide = gram_matrices(tiny(), IDS, POSITIONS, directions())
    for scale in (1.0, 1e-18, 1e12):  # float32 cannot hold the squares, 1e-36 and 1e24 times the numbers
        for gram, expected in zip(gram_matrices(model, IDS, POSITIONS, directions(scale=scale)), wide, strict=True):
            assert relative(gram / scale**2, expected) < 1e-4


def test_zero_directions_and_nodes_without_directions(student):
    v = torch.cat([torch.zeros(1, 12), torch.ones(1, 12).cumsum(1)]).double()
    first, second = gram_matrices(student, IDS, [4, 5], [v, v[:0]])
    assert (first[:, 0] == 0).all()
    assert (first[:, :, 0] == 0).all()
    assert (first[:, 1, 1] > 0).all()
    assert second.shape == (len(first), 0, 0)


def test_a_direction_with_nan_gives_nan_and_leaves_the_others_unchanged(student):
    v = directions()[0]
    broken = torch.cat([v[:1], torch.full((1, 12), torch.nan).double(), v[1:]])
    (gram,), (expected,) = (gram_matrices(student, IDS, [4], [x]) for x in (broken, v))
    assert gram[:, 1].isnan().all()
    assert gram[:, :, 1].isnan().all()
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(gram[:, kept[:, None], kept], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_the_students_state_is_unchanged(student, outside):
    before, state = Snapshot(student), torch.get_rng_state()
    with outside():
        grams = gram_matrices(student, IDS, POSITIONS, directions())
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(grams, gram_matrices(student, IDS, POSITIONS, directions()), strict=True):
        assert torch.equal(a, b)


def test_parameters_that_do_not_train_are_left_out(student):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name and "layers.1" in name)
    assert len(lora_modules(list(lora_parameters(student)))) == 3
    rows = reference_gradients(student, 4, directions()[0])
    (gram,) = gram_matrices(student, IDS, [4], directions()[:1])
    assert gram.shape == (3, 3, 3)
    assert relative(gram.sum(0), rows @ rows.mT) < 1e-6


def test_modules_keep_their_order(student):
    modules = lora_modules(list(lora_parameters(student)))
    assert modules == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_sums_over_nodes_are_those_of_the_reference_gradients(family):
    model, cotangents = tiny(family), directions((3, 2, 5))
    cotangents[1][1] = 0  # a teacher that equals the student at one node
    weights = [1.0, 4.0, 0.5]
    rows = [reference_gradients(model, p, v)[-2:] for p, v in zip(POSITIONS, cotangents, strict=True)]
    expected = sum(w * r for w, r in zip(weights, rows, strict=True))
    together = torch.stack([w * v[-2:] for w, v in zip(weights, cotangents, strict=True)], dim=1)
    assert relative(summed_vjps(model, IDS, POSITIONS, together).double(), expected) < 1e-6
    one_by_one = summed_vjps(model, IDS, POSITIONS, together, max_memory_bytes=1)
    assert relative(one_by_one.double(), expected) < 1e-6


def test_the_backward_from_a_node_ends_with_its_segment(student):
    """A direction goes through the tokens up to the end of its segment, not of the sequence."""
    gram_matrices(student, IDS, [2], directions((1,)))  # finds out what the student's graph allows
    token_counts = []
    hooks = [
        module.register_full_backward_hook(
            lambda module, grad_input, grad_output: token_counts.append(grad_output[0].shape[-2])
        )
        for name, module in student.named_modules()
        if name.endswith("layers.1.mlp")
    ]
    gram_matrices(student, IDS, [2, 8], directions((1, 1)), ends=[3, 9])
    for hook in hooks:
        hook.remove()
    assert token_counts == [3, 6], "each node reaches the top layer in its own segment only"


def test_the_sum_of_zero_directions_is_zero(student):
    cotangents = torch.stack([torch.zeros(2, 12), torch.randn(2, 12, generator=torch.Generator().manual_seed(0))])
    sums = summed_vjps(student, IDS, [4, 8], cotangents)
    assert (sums[0] == 0).all()
    assert (sums[1] != 0).any()


class UnbatchedLayer(torch.autograd.Function):
    """A custom layer whose backward takes no batch of directions, and which has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, v):
        return torch.from_numpy(2 * v.numpy())


def test_layers_whose_backward_is_not_batched_give_the_same_results(student):
    layer = student.get_base_model().model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, args, output: 2 * output)
    expected = node_gram_matrices(student, IDS, POSITIONS, directions()).grams
    together = torch.stack([v[-1:] for v in directions()], dim=1)
    sums = summed_vjps(student, IDS, POSITIONS, together)
    hook.remove()
    layer.register_forward_hook(lambda module, args, output: UnbatchedLayer.apply(output))
    grams = node_gram_matrices(student, IDS, POSITIONS, directions()).grams
    for gram, batched in zip(grams, expected, strict=True):
        torch.testing.assert_close(gram, batched, rtol=1e-9, atol=0)
    torch.testing.assert_close(summed_vjps(student, IDS, POSITIONS, together), sums, rtol=1e-4, atol=1e-5)
    assert not supports_projection(student)
    assert supports_projection(tiny())
