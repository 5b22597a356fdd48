"""Layers that are computed again one by one, against the whole graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from odp_callbacks.engine.gradients.layer_tape import LayerTape, UnchainedLayersError
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import Snapshot, relative, tiny

IDS = torch.tensor([[1, 5, 6, 9, 7, 8]])


def leaves_of(student: Any) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in lora_parameters(student).items()}


def logits_of(student: Any, leaves: dict[str, Tensor]) -> Tensor:
    logits: Tensor = torch.func.functional_call(student, leaves, (IDS,), {"use_cache": False}).logits
    return logits[0]


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "lm_head", "v_proj"]])
@pytest.mark.parametrize("fresh_graphs", [False, True])
def test_gradients_are_those_of_the_whole_graph(targets: list[str], fresh_graphs: bool) -> None:
    """Also of parameters below and above the layers."""
    from peft import LoraConfig, get_peft_model

    from tests.helpers.models import randomise, tiny_base

    student: Any = get_peft_model(tiny_base("qwen3"), LoraConfig(r=2, target_modules=targets))
    student = randomise(student, "default", 0.3, 0).double().eval()
    leaves = leaves_of(student)
    logits = logits_of(student, leaves)
    directions = torch.randn(3, *logits.shape, dtype=torch.float64)
    expected = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logits, list(leaves.values()), v, retain_graph=True)])
            for v in directions
        ]
    )
    snapshot = Snapshot(student)
    tape = LayerTape(student, lambda: logits_of(student, leaves), leaves, fresh_graphs=fresh_graphs)
    assert relative(tape.flat_gradients(directions), expected) < 1e-12
    assert relative(tape.flat_gradients(directions[1:]), expected[1:]) < 1e-12
    assert not any("forward" in module.__dict__ for module in student.modules())
    snapshot.check()


def test_one_layer_has_a_graph_at_a_time() -> None:
    """What autograd keeps at any time does not grow with the number of layers."""

    def most_kept(layers: int) -> int:
        student = tiny("qwen3", num_hidden_layers=layers)
        leaves = leaves_of(student)
        weights = {p.data_ptr() for p in student.parameters()}
        kept: dict[int, int] = {}
        most = 0

        def pack(tensor: Tensor) -> "Held":
            nonlocal most
            held = Held(tensor)
            if tensor.data_ptr() not in weights:
                kept[id(held)] = tensor.numel()
                most = max(most, sum(kept.values()))
            return held

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

            def __del__(self) -> None:
                kept.pop(id(self), None)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            tape = LayerTape(student, lambda: logits_of(student, leaves), leaves)
            tape.flat_gradients(torch.ones(2, *tape.outputs.shape, dtype=torch.float64))
        return most

    assert most_kept(6) == most_kept(3)


def test_layers_that_are_no_chain_are_noticed() -> None:
    student: Any = tiny("qwen3")
    layer = student.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1, *arguments[1:]))
    with pytest.raises(UnchainedLayersError, match="does not read what the layer before it returned"):
        LayerTape(student, lambda: logits_of(student, leaves_of(student)))
