import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks.engine.sampling.decoder.projections import Projection, linear_parts
from tests.helpers.models import randomise


class Pair(nn.Module):
    """Two linear layers that read the same inputs; LoRA is on the first, or on both."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4, bias=bias), nn.Linear(5, 3)

    def forward(self, inputs):
        return torch.cat([self.first(inputs), self.second(inputs)], dim=1)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("targets", [["first"], ["first", "second"]])
@pytest.mark.parametrize("has_order", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_layers(merge, targets, has_order, bias):
    torch.manual_seed(0)
    model = get_peft_model(Pair(bias), LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    model = randomise(model, "default", 0.5, 0).double().eval()
    pair = model.base_model.model
    inputs = torch.randn(6, 5, dtype=torch.float64)
    order = torch.randperm(7) if has_order else None
    parts = [linear_parts(pair.first), linear_parts(pair.second)]
    with torch.no_grad():
        expected = pair(inputs)[:, order] if has_order else pair(inputs)
        projection = Projection.of(parts, torch.float64, order, merge=merge)
        torch.testing.assert_close(projection(inputs), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_outputs_are_added_to_sums_of_any_precision(merge):
    torch.manual_seed(0)
    model = randomise(get_peft_model(Pair(True), LoraConfig(r=2, target_modules=["first"])), "default", 0.5, 0).eval()
    layer = model.base_model.model.first
    inputs = torch.randn(6, 5)
    projection = Projection.of([linear_parts(layer)], torch.float32, merge=merge)
    for dtype in (torch.float32, torch.float64):
        sums = torch.ones(6, 4, dtype=dtype)
        projection.add(inputs, sums)
        with torch.no_grad():
            torch.testing.assert_close(sums, 1 + layer(inputs).to(dtype), rtol=1e-5, atol=1e-5)


def test_layers_that_compute_something_else_are_refused():
    class Odd(nn.Linear):
        pass

    with pytest.raises(NotImplementedError, match="a layer is a Odd"):
        linear_parts(Odd(2, 2))
    model = get_peft_model(Pair(True), LoraConfig(r=2, target_modules=["first"], lora_dropout=0.5))
    with pytest.raises(NotImplementedError, match="plain LoRA in evaluation mode"):
        linear_parts(model.train().base_model.model.first)
