"""Attention in chunks of queries against torch's own, with values and forward-mode derivatives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from odp_callbacks.engine.gradients.tangent_rules import TangentRules

BIAS = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
WINDOW = torch.ones(7, 7, dtype=torch.bool).tril().triu(-2)[None, None]


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "scale": 0.3}, {"attn_mask": WINDOW}, {"attn_mask": BIAS}],
    ids=["all", "causal", "scale", "window", "bias"],
)
@pytest.mark.parametrize("numbers", [1, 60, 10**9])
def test_values_and_tangents_are_those_of_the_plain_kernel(options: dict[str, Any], numbers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 3, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 3, generator=generator, dtype=torch.float64).unbind()
    tangents = tuple(torch.randn(5, *x.shape, generator=generator, dtype=torch.float64) for x in (query, key, value))

    def attend(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, enable_gqa=True, **options)

    def both(*of_one: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(attend, (query, key, value), of_one)

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.vmap(both)(*tangents)
    with TangentRules(numbers):
        found = torch.func.vmap(both)(*tangents)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_dropout_is_refused() -> None:
    states = torch.zeros(1, 1, 2, 2)
    with TangentRules(), pytest.raises(NotImplementedError, match="no dropout"):
        scaled_dot_product_attention(states, states, states, dropout_p=0.1)
