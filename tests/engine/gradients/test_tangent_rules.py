"""Forward mode with constants against torch's own, and what it leaves out."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.tangent_rules import TangentRules
from tests.helpers.models import FAMILIES, tiny

CONSTANT = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROW = CONSTANT[0]
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant factors": lambda x, y: 3 * x * CONSTANT + CONSTANT * y + torch.mul(x, ROW) + x * 0.5,
    "two tangents": lambda x, y: x * y + x / (2 + y**2) - (x - y) * (x + y),
    "quotients": lambda x, y: x / (2 + CONSTANT**2) + torch.div(y, 3) + 1 / (2 + x**2) + CONSTANT / (2 + y**2),
    "sums": lambda x, y: (x + 1) * (2 + y) * (CONSTANT + x) * torch.add(x, CONSTANT, alpha=2),
    "differences": lambda x, y: (x - 1) * (2 - y) * (CONSTANT - x) * torch.sub(x, CONSTANT),
    "larger constants": lambda x, y: (x[0] + CONSTANT) * (CONSTANT - y[0]) * (x[0] * CONSTANT),
    "linear layers": lambda x, y: (
        nn.functional.linear(x, CONSTANT, ROW[:3]) @ y + nn.functional.linear(CONSTANT, x) @ y
    ),
    "linear layers with tangents": lambda x, y: nn.functional.linear(x, y, x[:, 0]) + nn.functional.linear(CONSTANT, y),
    "transposed linear layers": lambda x, y: torch.addmm(ROW[:3], x, CONSTANT.mT) + torch.addmm(x[:, 0], y, x.mT),
    "layer norm": lambda x, y: (
        nn.functional.layer_norm(x, (4,), ROW, CONSTANT[1]) + nn.functional.layer_norm(y, (4,), ROW)
    ),
    "layer norm with tangents": lambda x, y: (
        nn.functional.layer_norm(x, (4,), y[0], ROW) + nn.functional.layer_norm(y, (4,))
    ),
    "other precision": lambda x, y: (x.float() + CONSTANT) * (y.float() * ROW),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_tangents_are_those_of_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    tangents = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64).unbind()

    def both(*of_one: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(OPERATORS[name], (x, y), of_one)

    expected = torch.func.vmap(both)(*tangents)
    with TangentRules():
        found = torch.func.vmap(both)(*tangents)
        plain = OPERATORS[name](x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(plain, OPERATORS[name](x, y), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_calls_no_shape_function_in_python(family: str) -> None:
    student = tiny(family)
    parameters = {name: p.detach() for name, p in student.named_parameters() if "lora_" in name}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def logits(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(student, values, (), {"input_ids": ids, "use_cache": False}).logits
        return output

    called: list[str] = []

    def note(frame: object, event: str, argument: object) -> None:
        code = getattr(frame, "f_code", None)
        if event == "call" and code is not None and "_prims_common" in code.co_filename:
            called.append(code.co_name)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(logits, (parameters,), (tangents,))
        with TangentRules():
            before = sys.getprofile()
            sys.setprofile(note)
            try:
                found = torch.func.jvp(logits, (parameters,), (tangents,))
            finally:
                sys.setprofile(before)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not called
