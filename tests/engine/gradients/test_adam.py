"""Adam's preconditioner, compared with steps that optimizers take."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from odp_callbacks.analysis.node_estimates import estimate
from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.engine import BaseTeacher, Probe, ProbeConfig
from odp_callbacks.engine.gradients.adam import adam_preconditioner
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.vjp import node_gram_matrices
from odp_callbacks.functional import distillation_logit_gradient, lora_gradients, lora_parameters
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate, load, pool, save
from tests.helpers.models import Snapshot, tiny, tiny_base
from tests.helpers.worlds import make_world

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])


def take_random_steps(student: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, seed: int = 0) -> None:
    """Take steps along random gradients, whose size differs between numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in lora_parameters(student).values():
            size = torch.rand(p.shape, generator=generator).exp2() ** 8
            p.grad = (torch.randn(p.shape, generator=generator) * size).to(p)
        optimizer.step()
    optimizer.zero_grad()


def adamw(student: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    settings = {"lr": 1e-4, "betas": (0.0, 0.99), "weight_decay": 0.0, "eps": 1e-6, **options}
    return kind(lora_parameters(student).values(), **settings)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def cosine_between(a: Tensor, b: Tensor) -> Tensor:
    """Cosine without torch's lower bound of 1e-8 on the norms; the steps here are shorter."""
    return a @ b / a.norm() / b.norm()


def step_along(student: nn.Module, optimizer: torch.optim.Optimizer, direction: Tensor) -> Tensor:
    """The step of the optimizer, ``(P,)``, when the ascent direction of the parameters is ``direction``, ``(P,)``."""
    before = flat(lora_parameters(student).values())
    parts = direction.split([p.numel() for p in lora_parameters(student).values()])
    for p, part in zip(lora_parameters(student).values(), parts, strict=True):
        p.grad = -part.view(p.shape).to(p)
    optimizer.step()
    return flat(lora_parameters(student).values()) - before


OPTIMIZER_OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"kind": torch.optim.Adam},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "capturable step": {"foreach": True, "amsgrad": True},
}


@pytest.mark.parametrize("options", OPTIMIZER_OPTIONS.values(), ids=OPTIMIZER_OPTIONS)
def test_the_next_step_is_along_the_preconditioned_gradient(options: dict[str, Any]) -> None:
    student = tiny()
    optimizer = adamw(student, **options)
    assert adam_preconditioner(optimizer, student) is None, "no step was taken yet"
    take_random_steps(student, optimizer)
    preconditioner = adam_preconditioner(optimizer, student)
    assert preconditioner is not None
    assert preconditioner.name == "adam"
    # Too small to change the second moments.
    direction = 1e-6 * torch.randn(384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = flat(preconditioner.weights.values()) * direction
    moved = step_along(student, optimizer, direction)
    assert float(cosine_between(moved, expected)) > 1 - 1e-7
    assert float(cosine_between(moved, direction)) < 0.9
    # The length is that of the learning rate, up to the common factor by which the second moments decay.
    assert float(moved.norm() / (1e-4 * expected.norm())) == pytest.approx(1, abs=0.15)


def test_the_learning_rate_of_a_group_scales_its_weights() -> None:
    student = tiny()
    b_matrices = [p for name, p in lora_parameters(student).items() if "lora_B" in name]
    a_matrices = [p for name, p in lora_parameters(student).items() if "lora_A" in name]
    groups = [{"params": a_matrices}, {"params": b_matrices, "lr": 16e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0)
    take_random_steps(student, optimizer)
    preconditioner = adam_preconditioner(optimizer, student)
    assert preconditioner is not None
    direction = 1e-6 * torch.randn(384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = step_along(student, optimizer, direction)
    expected = flat(preconditioner.weights.values()) * direction
    assert float(cosine_between(moved, expected)) > 1 - 1e-7


def test_two_optimizers_may_share_the_parameters() -> None:
    student = tiny()
    parameters = list(lora_parameters(student).values())
    both = [torch.optim.Adam(parameters[::2], lr=1e-4), torch.optim.AdamW(parameters[1::2], lr=1e-4)]
    for optimizer in both:
        take_random_steps(student, optimizer)
    preconditioner = adam_preconditioner(both, student)
    assert preconditioner is not None
    assert all(bool((weight > 0).all()) for weight in preconditioner.weights.values())


def test_numbers_without_a_second_moment_have_weight_zero() -> None:
    student = tiny()
    optimizer = adamw(student)
    names = list(lora_parameters(student))
    for name, p in lora_parameters(student).items():
        if name != names[0]:
            p.grad = torch.ones_like(p)
            p.grad.view(-1)[0] = 0
    optimizer.step()
    preconditioner = adam_preconditioner(optimizer, student)
    assert preconditioner is not None
    assert not preconditioner.weights[names[0]].any()
    for name in names[1:]:
        assert (preconditioner.weights[name].flatten() > 0).tolist() == [False] + [True] * (
            preconditioner.weights[name].numel() - 1
        )


class UnknownOptimizer(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "known for Adam and AdamW, but .*lora_A.* is trained by SGD"),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), "is trained by RMSprop"),
        (lambda p: torch.optim.NAdam(p, lr=0.1), "is trained by NAdam"),
        (UnknownOptimizer, "is trained by UnknownOptimizer"),
        (lambda p: torch.optim.Adam(list(p)[1:], lr=0.1), "is a parameter of none of the 1 optimizers"),
    ],
)
def test_other_optimizers_are_refused(make: Callable[..., Any], message: str) -> None:
    student = tiny()
    with pytest.raises(ValueError, match=message):
        adam_preconditioner(make(list(lora_parameters(student).values())), student)


def test_a_parameter_that_is_stepped_on_twice_is_refused() -> None:
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    student = get_peft_model(tiny_base(tie_word_embeddings=True), LoraConfig(r=2, **options))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"steps on .* twice"):
        adam_preconditioner(optimizer, student)


def test_a_compiled_student_is_the_student() -> None:
    student = tiny()
    optimizer = adamw(student)
    take_random_steps(student, optimizer)
    compiled = adam_preconditioner(optimizer, torch.compile(student, backend="eager"))
    assert compiled is not None
    assert compiled.weights.keys() == lora_parameters(student).keys()


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_optimizers_of_bitsandbytes(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # bitsandbytes keeps the states of small parameters in 32 bits in any case.
    student = tiny(hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=4).float()
    optimizer = getattr(bitsandbytes.optim, kind)(
        lora_parameters(student).values(), lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, min_8bit_size=64
    )
    take_random_steps(student, optimizer)
    optimizer.param_groups[0]["lr"] = 100.0  # so that float32 resolves the step
    preconditioner = adam_preconditioner(optimizer, student)
    assert preconditioner is not None
    size = sum(p.numel() for p in lora_parameters(student).values())
    direction = 1e-4 * torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = flat(preconditioner.weights.values()) * direction
    moved = step_along(student, optimizer, direction)
    assert float(cosine_between(moved, expected)) > 0.99


def random_preconditioner(student: nn.Module, seed: int = 0) -> Preconditioner:
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.rand(p.shape, generator=generator).double() * 5 for n, p in lora_parameters(student).items()}
    return Preconditioner("drawn", weights)


def test_preconditioned_gram_matrices_are_those_of_scaled_gradients(family: str) -> None:
    student, generator = tiny(family), torch.Generator().manual_seed(0)
    directions = [torch.randn(c, 12, generator=generator, dtype=torch.float64) for c in (3, 1, 4)]
    preconditioner = random_preconditioner(student)
    square_roots = preconditioner.square_roots(student)
    weights = flat(preconditioner.weights.values())
    node_grams = node_gram_matrices(student, IDS, [2, 8, 5], directions, square_roots=square_roots)
    for n, position in enumerate([2, 8, 5]):
        rows = lora_gradients(student, IDS, torch.tensor([position]), directions[n][None])[0]
        torch.testing.assert_close(
            node_grams.preconditioned[n].sum(0), (rows * weights) @ rows.mT, rtol=1e-5, atol=1e-8
        )
        torch.testing.assert_close(node_grams.grams[n].sum(0), rows @ rows.mT, rtol=1e-5, atol=1e-8)
    sketches = projected_gram_matrices(
        student, IDS, [2, 8, 5], directions, 4000, torch.Generator().manual_seed(0), square_roots=square_roots
    )
    for sketch, exact in zip(sketches, node_grams.preconditioned, strict=True):
        whole = exact.sum(0)
        torch.testing.assert_close(sketch[0], whole, rtol=0.1, atol=0.1 * float(whole.max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.popitem(), "a weight for each of the student's 12 LoRA parameters"),
        (lambda w: w.update(other=torch.ones(1)), "'other' is in only one"),
        (lambda w: w.update({next(iter(w)): torch.ones(3)}), r"of shape \(2, 16\) for .* but its shape is \(3,\)"),
        (lambda w: next(iter(w.values())).fill_(-1), "non-negative"),
        (lambda w: next(iter(w.values())).fill_(torch.nan), "finite"),
    ],
)
def test_a_preconditioner_that_does_not_fit_is_refused(change: Callable[..., Any], message: str) -> None:
    student = tiny()
    preconditioner = random_preconditioner(student)
    change(preconditioner.weights)
    with pytest.raises(ValueError, match=message):
        preconditioner.square_roots(student)


def run_probe(world: Any, other: nn.Module, preconditioner: Preconditioner | None, **config: Any) -> ProbeReport:
    options = {"nodes": "every", "branch_mass": 1.0, "max_branches": 5, "max_new_tokens": 3, "continuations": 2}
    instrument = Probe(
        world.model,
        world.tokenizer,
        world.reward,
        {"other": other, "base": BaseTeacher()},
        ProbeConfig(**{**options, **config}),
    )
    return instrument.run([world.row] * 2, seed=1, preconditioner=preconditioner)


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny_base(vocabulary=5, seed=50, eos_token_id=0, pad_token_id=None, bos_token_id=None)


def test_predicted_gain_is_the_gain_of_a_step_of_adam(other: nn.Module) -> None:
    """A step is taken on a copy. The node's success is enumerated, with the success of each token held constant."""
    world = make_world(
        "gpt2", seed=3, initializer_range=0.5
    )  # GPT-2 is in float64 throughout, because the steps are small
    optimizer = adamw(world.model)
    take_random_steps(world.model, optimizer)
    preconditioner = adam_preconditioner(optimizer, world.model)
    assert preconditioner is not None
    report = run_probe(world, other, preconditioner)
    assert report.preconditioned is not None
    with torch.no_grad():
        nodes = world.solve()
        weights = flat(preconditioner.weights.values())
    words = ["</s>", *"abcdefg"]
    compared = set()
    for record, euclidean in zip(report.preconditioned.nodes, report.nodes, strict=True):
        prefix = tuple(words.index(p) for p in report.rollouts[record.rollout].pieces[: record.depth])
        if prefix in compared:
            continue
        compared.add(prefix)
        node = nodes[prefix]
        q = node.success[record.tokens].numpy()
        known = {"count": np.ones_like(record.count), "total": q, "total_square": q * q, "exact": q == q}
        with_adam, without = (estimate(replace(r, **known)) for r in (record, euclidean))
        with torch.no_grad():
            teacher_logits = other(input_ids=world.ids(prefix)[None]).logits[0, -1]
        direction = distillation_logit_gradient(node.logits, teacher_logits)
        (d,) = world.parameter_gradients(node, direction)
        copy = deepcopy(world)
        states = deepcopy(optimizer.state_dict())
        again = adamw(copy.model)
        again.load_state_dict(states)
        moved = step_along(copy.model, again, 1e-3 * d)
        with torch.no_grad():
            after = copy.model(input_ids=world.ids(prefix)[None]).logits[0, -1]
        change = (torch.softmax(after, -1) - torch.softmax(node.logits, -1)) @ node.success
        length = (moved**2 / weights).sum().sqrt()
        assert float(change / length) == pytest.approx(with_adam.predicted_gain[0], rel=1e-3, abs=1e-7)
        assert with_adam.predicted_gain[0] != pytest.approx(without.predicted_gain[0], rel=0.05)
        p = torch.softmax(node.logits, -1)
        g, d = world.parameter_gradients(node, p * (node.success - p @ node.success), direction)
        cosine = (g * weights) @ d / ((g * weights) @ g).sqrt() / ((d * weights) @ d).sqrt()
        assert with_adam.alignment[0] == pytest.approx(float(cosine), abs=1e-5)
    assert len(compared) > 3


@pytest.mark.parametrize("config", [{}, {"budget": 200}, {"budget": 0}, {"projections": 2, "max_branches": 4}])
def test_both_geometries_use_the_same_nodes_and_continuations(
    other: nn.Module, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "projections" in config:
        monkeypatch.setattr("odp_callbacks.engine.gradients.gradient_stage.projection_is_cheaper", lambda *_: True)
    world = make_world(seed=3, initializer_range=0.5)
    before = Snapshot(world.model)
    report = run_probe(world, other, random_preconditioner(world.model), **config)
    before.check()
    twin = report.preconditioned
    assert twin is not None
    assert (report.settings["geometry"], twin.settings["geometry"]) == ("euclidean", "drawn")
    for a, b in zip(report.nodes, twin.nodes, strict=True):
        np.testing.assert_array_equal(a.total, b.total)
        assert a.gram.shape == b.gram.shape
        assert not np.allclose(a.gram, b.gram)
    alone = run_probe(world, other, None, **config)
    assert alone.preconditioned is None
    if "projections" not in config:  # exact gradients only
        for a, b in zip(report.nodes, alone.nodes, strict=True):
            np.testing.assert_array_equal(a.gram, b.gram)
            np.testing.assert_array_equal(a.total, b.total)
    if report.step is not None and twin.step is not None:
        assert not np.allclose(report.step.gram, twin.step.gram)


def test_equal_weights_give_the_euclidean_geometry(other: nn.Module) -> None:
    world = make_world(seed=3, initializer_range=0.5)
    preconditioner = Preconditioner(
        "flat", {n: torch.full(p.shape, 4.0) for n, p in lora_parameters(world.model).items()}
    )
    report = run_probe(world, other, preconditioner)
    assert report.preconditioned is not None
    assert report.step is not None
    assert report.preconditioned.step is not None
    np.testing.assert_allclose(report.preconditioned.step.gram, 4 * report.step.gram, rtol=1e-5, atol=1e-9)
    for a, b in zip(summarise(report), summarise(report.preconditioned), strict=True):
        for name in ("alignment", "gain_weighted_alignment", "step_alignment", "predicted_gain"):
            factor = 2 if name == "predicted_gain" else 1
            np.testing.assert_allclose(b.figures[name].value, factor * a.figures[name].value, rtol=1e-4)


def test_both_geometries_are_saved_and_combined(other: nn.Module, tmp_path: Any) -> None:
    world = make_world(seed=3, initializer_range=0.5)
    report = run_probe(world, other, random_preconditioner(world.model))
    loaded = load(save(report, tmp_path / "probe"))
    assert loaded.preconditioned is not None
    assert report.preconditioned is not None
    assert loaded.preconditioned.settings["geometry"] == "drawn"
    for a, b in zip(loaded.preconditioned.nodes, report.preconditioned.nodes, strict=True):
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-5, atol=1e-5 * np.abs(b.gram).max())
    for combine, factor in ((concatenate, 1), (pool, 2)):
        both = combine([report, report]).preconditioned
        assert both is not None
        assert both.nodes[0].total.sum() >= factor * report.preconditioned.nodes[0].total[~report.nodes[0].exact].sum()
    assert concatenate([report, run_probe(world, other, None)]).preconditioned is None
    with pytest.raises(ValueError, match="geometry"):
        concatenate([report, report.preconditioned])
