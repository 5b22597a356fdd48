"""The body and the head of a model, apart."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.update.split_model import SplitModel, head_has_lora
from odp_callbacks.functional import lora_gradients, lora_parameters
from tests.helpers.long_models import LONG_KINDS, long_student, random_prompt
from tests.helpers.models import relative, tiny, tiny_base


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_forward_mode_is_that_of_each_prefix_alone(kind: str) -> None:
    """Also where the position embedding writes its frequencies in every forward pass, which forward mode forbids."""
    model = long_student(kind)
    sequences, positions = [random_prompt(44), random_prompt(20)], [[20, 31, 32, 43], [19]]
    parameters = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}
    generator = torch.Generator().manual_seed(0)
    tangents = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in parameters.items()
    }
    split = SplitModel(model)
    with torch.no_grad():
        split.hidden_states(sequences, positions, parameters)  # the trials have forward passes of their own

    def logits(values: dict[str, Tensor]) -> Tensor:
        return split.logits(split.hidden_states(sequences, positions, values), values)

    with sdpa_kernel(SDPBackend.MATH):  # the only kernel with a forward mode
        products = torch.func.jvp(logits, (parameters,), (tangents,))[1]  # (5, V)
    places = [(sequence, position) for sequence, wanted in enumerate(positions) for position in wanted]
    tangent = torch.cat([tangent.flatten() for tangent in tangents.values()])
    for product, (sequence, position) in zip(products, places, strict=True):
        jacobian = lora_gradients(
            model, sequences[sequence][: position + 1], torch.tensor([position]), torch.eye(12).double()[None]
        )[0]
        assert relative(product, jacobian @ tangent) < 1e-4


class ShiftedHead(nn.Module):
    """A model whose head depends on the position, a little: its parts cannot be taken apart."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config, self.head = base.model, base.config, base.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        output = self.base_model(input_ids=input_ids, use_cache=use_cache)
        logits = self.head(output.last_hidden_state)
        output.logits = logits * (1 + 4e-3 * torch.arange(logits.shape[1], dtype=logits.dtype))[:, None]
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_difference_shows_in_half_precision_too(dtype: torch.dtype) -> None:
    assert SplitModel(tiny().to(dtype)).splits
    assert not SplitModel(ShiftedHead(tiny_base()).to(dtype)).splits


def test_a_head_that_shares_its_lora_with_the_embeddings_belongs_to_the_body() -> None:
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}
    assert head_has_lora(get_peft_model(tiny_base(tie_word_embeddings=True), LoraConfig(r=2, **options)))
    assert not head_has_lora(get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])))
