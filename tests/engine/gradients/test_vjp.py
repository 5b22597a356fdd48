from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.gradients.random_projection import supports_projection
from odp_callbacks.engine.gradients.vjp import lora_modules, node_gram_matrices, segment_ends, summed_vjps
from odp_callbacks.functional import lora_gradients, lora_parameters
from tests.helpers.models import Snapshot, relative, tiny

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])
POSITIONS = [2, 8, 5]


def gram_matrices(*arguments, **options):
    return node_gram_matrices(*arguments, **options).grams


def directions(counts=(3, 1, 5), scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(c, 12, generator=generator, dtype=torch.float64) for c in counts]


def gradients(model, position, cotangents):
    return lora_gradients(model, IDS, torch.tensor([position]), cotangents[None])[0]


@pytest.mark.parametrize("ends", [None, [9], [3, 6, 9], [4, 9]])
@pytest.mark.parametrize("memory", [None, 1])
def test_are_those_of_the_plain_gradients(family, ends, memory):
    """In whatever segments, and one direction at a time where there is no memory."""
    model = tiny(family)
    modules = lora_modules(list(lora_parameters(model)))
    sizes = [sum(p.numel() for n, p in lora_parameters(model).items() if f"{m}.lora_" in n) for m in modules]
    grams = gram_matrices(model, IDS, POSITIONS, directions(), ends=ends, memory=memory)
    for position, cotangents, gram in zip(POSITIONS, directions(), grams, strict=True):
        assert gram.dtype == torch.float64
        rows = gradients(model, position, cotangents)
        assert relative(gram.sum(0), rows @ rows.mT) < 1e-6
        # Each module's own block, and nothing of another's.
        expected = torch.stack([part @ part.mT for part in rows.split(sizes, dim=1)])
        assert relative(gram, expected) < 1e-6
        assert (expected.diagonal(dim1=1, dim2=2) > 0).all()


def test_single_precision_and_directions_of_any_size():
    model = tiny().float()
    wide = gram_matrices(tiny(), IDS, POSITIONS, directions())
    for scale in (1.0, 1e-18, 1e12):  # squared in float32, 1e-36 and 1e24 times anything would be lost
        for found, expected in zip(gram_matrices(model, IDS, POSITIONS, directions(scale=scale)), wide, strict=True):
            assert relative(found / scale**2, expected) < 1e-4


def test_a_zero_direction_and_none(student):
    v = torch.cat([torch.zeros(1, 12), torch.ones(1, 12).cumsum(1)]).double()
    first, second = gram_matrices(student, IDS, [4, 5], [v, v[:0]])
    assert (first[:, 0] == 0).all()
    assert (first[:, :, 0] == 0).all()
    assert (first[:, 1, 1] > 0).all()
    assert second.shape == (len(first), 0, 0)


def test_a_direction_that_is_no_number_is_not_silent_and_spoils_no_other(student):
    v = directions()[0]
    broken = torch.cat([v[:1], torch.full((1, 12), torch.nan).double(), v[1:]])
    (found,), (expected,) = (gram_matrices(student, IDS, [4], [x]) for x in (broken, v))
    assert found[:, 1].isnan().all()
    assert found[:, :, 1].isnan().all()
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found[:, kept[:, None], kept], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(student, outside):
    before, state = Snapshot(student), torch.get_rng_state()
    with outside():
        found = gram_matrices(student, IDS, POSITIONS, directions())
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(found, gram_matrices(student, IDS, POSITIONS, directions()), strict=True):
        assert torch.equal(a, b)


def test_parameters_that_do_not_train_are_left_out(student):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name and "layers.1" in name)
    assert len(lora_modules(list(lora_parameters(student)))) == 3
    rows = gradients(student, 4, directions()[0])
    (gram,) = gram_matrices(student, IDS, [4], directions()[:1])
    assert gram.shape == (3, 3, 3)
    assert relative(gram.sum(0), rows @ rows.mT) < 1e-6


def test_modules_keep_their_order(student):
    modules = lora_modules(list(lora_parameters(student)))
    assert modules == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_sums_over_nodes_are_those_of_the_plain_gradients(family):
    model, cotangents = tiny(family), directions((3, 2, 5))
    cotangents[1][1] = 0  # a silent teacher at one node
    weights = [1.0, 4.0, 0.5]
    sums = node_gram_matrices(model, IDS, POSITIONS, cotangents, weights=weights, last=2).sums
    rows = [gradients(model, p, v)[-2:] for p, v in zip(POSITIONS, cotangents, strict=True)]
    expected = sum(w * r for w, r in zip(weights, rows, strict=True))
    assert relative(sums.double(), expected) < 1e-6
    together = torch.stack([w * v[-2:] for w, v in zip(weights, cotangents, strict=True)], dim=1)
    assert relative(summed_vjps(model, IDS, POSITIONS, together).double(), expected) < 1e-6


@given(
    nodes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6)), min_size=1, max_size=7, unique_by=lambda n: n[0]),
    overhead=st.floats(0, 300),
)
def test_segments_are_the_cheapest_of_all(nodes, overhead):
    """Against every way to cut at nodes."""
    positions, counts = zip(*nodes, strict=True)

    def cost(ends):
        total = 0.0
        for s, (start, end) in enumerate(pairwise([0, *ends]), 1):
            total += sum(c for p, c in nodes if start <= p < end) * end + 2 * s * overhead
        return total

    at = sorted(p + 1 for p in positions)
    every = [(*cut, at[-1]) for k in range(len(at)) for cut in combinations(at[:-1], k)]
    found = segment_ends(positions, counts, overhead)
    assert found[-1] == at[-1]
    assert cost(found) == pytest.approx(min(map(cost, every)))


def test_the_backward_of_a_node_passes_nothing_behind_it(student):
    """Tokens that go back: each direction up to its segment's end, not to the sequence's."""
    seen = []
    hooks = [
        module.register_full_backward_hook(lambda m, gin, gout: seen.append(gout[0].shape[-2]))
        for name, module in student.named_modules()
        if name.endswith("layers.1.mlp")
    ]
    gram_matrices(student, IDS, [2, 8], directions((1, 1)), ends=[3, 9])
    for hook in hooks:
        hook.remove()
    assert seen == [3, 6], "the last node passes both segments, the first its own (the top layer of the other is cut)"


def test_a_sum_of_nothing_is_nothing_in_single_precision(student):
    cotangents = torch.stack([torch.zeros(2, 12), torch.randn(2, 12, generator=torch.Generator().manual_seed(0))])
    found = summed_vjps(student, IDS, [4, 8], cotangents)
    assert (found[0] == 0).all()
    assert (found[1] != 0).any()


class OneByOne(torch.autograd.Function):
    """A layer of somebody's own: its backward takes no batch of directions, and it knows no tangents."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, v):
        return torch.from_numpy(2 * v.numpy())


def test_layers_whose_backward_takes_one_direction_at_a_time(student):
    layer = student.get_base_model().model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, args, output: 2 * output)
    expected, sums, _ = node_gram_matrices(student, IDS, POSITIONS, directions(), weights=[1.0] * 3, last=1)
    together = torch.stack([v[-1:] for v in directions()], dim=1)
    hook.remove()
    layer.register_forward_hook(lambda module, args, output: OneByOne.apply(output))
    found, found_sums, _ = node_gram_matrices(student, IDS, POSITIONS, directions(), weights=[1.0] * 3, last=1)
    for gram, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gram, other, rtol=1e-9, atol=0)
    torch.testing.assert_close(found_sums, sums, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(summed_vjps(student, IDS, POSITIONS, together), sums, rtol=1e-4, atol=1e-5)
    assert not supports_projection(student)
    assert supports_projection(tiny())
