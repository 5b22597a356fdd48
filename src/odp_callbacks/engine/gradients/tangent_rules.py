"""Forward mode for products and sums with constants, without the tensors of zeros that torch puts in their place.

Where one factor has no tangent, torch multiplies by a tensor of zeros, whose shape it works out in Python: half a
millisecond for every norm, rotary embedding and scaled LoRA layer, and a frozen linear layer is computed once more on
zeros. Here the tangent of such an operator is the operator itself, applied to the tangent; the numbers are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from odp_callbacks.engine.gradients.chunked_attention import CHUNK_NUMBERS, chunked_attention

Operator = Callable[..., Any]


class TangentRules(TorchFunctionMode):
    """Within the block, forward mode is cheap for constants, and attention is computed for some queries at a time.

    Args:
        numbers: Attention scores that are held at a time, at most.

    Examples:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> with TangentRules():
        ...     moved = torch.func.jvp(lambda x: 3 * x * weight + 1, (torch.ones(2),), (torch.ones(2),))
        >>> moved
        (tensor([4., 7.]), tensor([3., 6.]))
    """

    def __init__(self, numbers: int = CHUNK_NUMBERS) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(
        self,
        func: Operator,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Apply the rule of an operator; call all others, and those whose arguments are not as the rule expects."""
        if func is nn.functional.scaled_dot_product_attention:
            with self:  # the products of the attention follow the rules, too
                return chunked_attention(self.numbers, *args, **(kwargs or {}))
        rule, named = _RULES.get(func), kwargs or {}
        result = None if rule is None or (named and rule is not _layer_norm) else rule(func, *args, **named)
        return func(*args, **named) if result is None else result


def _parts(value: Any) -> tuple[Any, Tensor | None]:
    """A value without its tangent, and its tangent; None for a constant, such as every parameter itself."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value, None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, tangent


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    """A value with its tangent."""
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual


def _product(operator: Operator, first: Any, second: Any) -> Tensor | None:
    """A product; None if both factors are constant."""
    (left, left_tangent), (right, right_tangent) = _parts(first), _parts(second)
    if left_tangent is None and right_tangent is None:
        return None
    product = operator(left, right)
    if right_tangent is None:
        return _dual(product, operator(left_tangent, right))
    if left_tangent is None:
        return _dual(product, operator(left, right_tangent))
    return _dual(product, operator(left_tangent, right) + operator(left, right_tangent))


def _quotient(operator: Operator, first: Any, second: Any) -> Tensor | None:
    """The quotient by a constant; None for others."""
    (left, tangent), (right, other_tangent) = _parts(first), _parts(second)
    if tangent is None or other_tangent is not None:
        return None
    return _dual(operator(left, right), operator(tangent, right))


def _sum(operator: Operator, first: Any, second: Any) -> Tensor | None:
    """The sum with a constant that is not larger; None for others."""
    (left, left_tangent), (right, right_tangent) = _parts(first), _parts(second)
    tangent = left_tangent if right_tangent is None else right_tangent
    if tangent is None or (left_tangent is not None and right_tangent is not None):
        return None
    total = operator(left, right)
    return _dual(total, tangent.to(total.dtype)) if total.shape == tangent.shape else None


def _difference(operator: Operator, first: Any, second: Any) -> Tensor | None:
    """The difference to a constant that is not larger; None for others."""
    return None if _parts(second)[1] is not None else _sum(operator, first, second)


def _linear(operator: Operator, states: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """A linear layer with constant parameters; None for others."""
    if _parts(weight)[1] is not None or _parts(bias)[1] is not None:
        return None
    states, tangent = _parts(states)
    if tangent is None:
        return None
    return _dual(operator(states, weight, bias), operator(tangent, weight))


def _transposed_linear(operator: Operator, bias: Any, states: Any, weight: Any) -> Tensor | None:
    """A linear layer with constant parameters, as transformers' ``Conv1D`` writes it; None for others."""
    if _parts(weight)[1] is not None or _parts(bias)[1] is not None:
        return None
    states, tangent = _parts(states)
    if tangent is None:
        return None
    return _dual(operator(bias, states, weight), torch.mm(tangent, weight))


def _layer_norm(
    operator: Operator, states: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    """Layer normalisation with constant parameters; None for others."""
    primal, tangent = _parts(states)
    if tangent is None or weight is None or _parts(weight)[1] is not None or _parts(bias)[1] is not None:
        return None
    normalised_tangent = _parts(operator(states, shape, None, None, eps))[1]
    return _dual(operator(primal, shape, weight, bias, eps), normalised_tangent * weight)


_RULES: dict[Operator, Callable[..., Tensor | None]] = {
    nn.functional.linear: _linear,
    nn.functional.layer_norm: _layer_norm,
    torch.addmm: _transposed_linear,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _sum),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _difference),
}
"""By operator: what gives its value with its tangent, or None."""
