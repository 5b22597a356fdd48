"""Backward passes that hold the graph of one layer at a time.

A forward pass without a graph keeps the input of each layer. The backward passes then go from the last layer to the
first. Each layer is computed once more, this time with a graph, and all directions go back through it before the layer
below is computed. Memory holds the inputs of all layers and the graph of one. Source: Chen, Xu, Zhang, Guestrin,
"Training deep nets with sublinear memory cost", arXiv:1604.06174; that several directions share the recomputed layer
is ours.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.replaced_forward import replaced_forward


class UnchainedLayersError(RuntimeError):
    """The layers of a model are no chain in which each reads what the one before it returned."""


@dataclass(frozen=True)
class _LayerCall:
    """One call of a layer.

    Attributes:
        name: The layer's name in the model.
        layer: The layer.
        states: What it read, ``(B, T, H)``, as a leaf.
        output: What it returned, as a leaf.
        arguments: Its positional arguments, as it was called.
        keywords: Its keyword arguments, as it was called.
    """

    name: str
    layer: nn.Module
    states: Tensor
    output: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class LayerTape:
    """A forward pass of a model, ready for backward passes that recompute its layers.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        run: Runs the model and returns what is differentiated, ``(N, F)``. It is called once, and once more for each
            direction if graphs are fresh.
        parameters: The values of parameters that ``run`` uses in place of the model's own, as leaves of the graph.
        fresh_graphs: Compute every layer anew for each direction, for layers that write into what they have saved.

    Attributes:
        outputs: ``(N, F)``, what ``run`` returned.

    Raises:
        UnchainedLayersError: If the model's layers are no chain.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        *,
        fresh_graphs: bool = False,
    ) -> None:
        self._run, self._parameters, self._fresh = run, dict(parameters or {}), fresh_graphs
        self._layers = recomputable_layers(model)
        self._calls: list[_LayerCall] = []
        self._first_input = torch.empty(0)
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(replaced_forward(layer, self._recorder(name, layer, layer.forward)))
            self.outputs = run()
        if not self._calls:
            raise UnchainedLayersError("the model has no layers that can be computed again")
        if len({call.name for call in self._calls}) < len(self._calls):
            raise UnchainedLayersError("the model calls a layer more than once")

    def gradients(
        self, cotangents: Tensor, before_direction: Callable[[int], None] | None = None, anchor: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Send directions on the outputs back.

        Args:
            cotangents: ``(C, N, F)``.
            before_direction: Called with the index of a direction before it goes through a layer.
            anchor: A further leaf, whose graph a backward visits in every layer; its gradient is not returned.

        Yields:
            For each layer from the last to the first, and then for all other parameters together: the gradients
            ``(C, *shape)`` of the parameters, by name. Each parameter that is used comes once.
        """
        outside = {name: leaf for name, leaf in self._parameters.items() if self._layer_of(name) is None}
        begin = before_direction or (lambda index: None)
        directions = list(cotangents)

        def above() -> tuple[Tensor, Tensor | None]:
            return (self._replayed() if self._fresh else self.outputs), self._calls[-1].output

        of_others = self._through(above, _with_anchor(outside, anchor), directions, begin, keep_graph=True)
        depends_below = self._first_input.grad_fn is not None
        for place, call in reversed(list(enumerate(self._calls))):
            leaves = {name: leaf for name, leaf in self._parameters.items() if self._layer_of(name) == call.name}
            compute = partial(self._recomputed, call, place > 0 or depends_below)
            yield self._through(compute, _with_anchor(leaves, anchor), directions, begin)
        if depends_below:
            below = partial(lambda first: (first, None), self._first_input)
            through_input = self._through(below, _with_anchor(outside, anchor), directions, begin, keep_graph=True)
            of_others = {name: of_others[name] + gradient for name, gradient in through_input.items()}
        yield of_others

    def flat_gradients(self, cotangents: Tensor) -> Tensor:
        """The gradients of all parameters side by side, in the order in which they were given.

        Args:
            cotangents: ``(C, N, F)``.

        Returns:
            ``(C, P)`` on the CPU, in float32 or wider.
        """
        return side_by_side(self.gradients(cotangents), self._parameters, len(cotangents))

    def _recorder(self, name: str, layer: nn.Module, own_forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer without a graph, which notes what the layer read and returned."""

        def forward(*arguments: Any, **keywords: Any) -> Any:
            given = self._checked_input(name, keywords.get("hidden_states", arguments[0] if arguments else None))
            if not self._calls:
                self._first_input = given
            self._check_others(name, arguments if "hidden_states" in keywords else arguments[1:], keywords)
            states = given.detach()
            positional, named = _reading(states, arguments, keywords)
            with torch.no_grad():
                returned = own_forward(*positional, **named)
            hidden = returned if isinstance(returned, Tensor) else returned[0]
            output = hidden.detach().requires_grad_(hidden.is_floating_point())
            self._calls.append(_LayerCall(name, layer, states, output, arguments, keywords))
            return output if isinstance(returned, Tensor) else (output, *returned[1:])

        return forward

    def _checked_input(self, name: str, given: Any) -> Tensor:
        if not isinstance(given, Tensor):
            raise UnchainedLayersError(f"{name} reads no hidden states")
        if self._calls and given is not self._calls[-1].output:
            raise UnchainedLayersError(f"{name} does not read what the layer before it returned")
        return given

    def _check_others(self, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Raise if another argument depends on parameters, whose gradients would be lost."""
        others = [value for key, value in keywords.items() if key != "hidden_states"]
        for value in (*arguments, *others):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    raise UnchainedLayersError(f"{name} also reads something that depends on parameters")

    def _replayed(self) -> Tensor:
        """The outputs once more: the layers return what they returned, and what is above them is computed anew."""
        calls = iter(self._calls)

        def returned(layer: nn.Module) -> Callable[..., Any]:
            return lambda *_, **__: next(calls).output

        with ExitStack() as stack:
            for layer in self._layers.values():
                stack.enter_context(replaced_forward(layer, returned(layer)))
            return self._run()

    def _recomputed(self, call: _LayerCall, needs_input: bool) -> tuple[Tensor, Tensor | None]:
        """The output of a layer with its graph, and its input if that gets a gradient."""
        states = call.states.detach().requires_grad_(needs_input)
        prefix = f"{call.name}."
        values = {name.removeprefix(prefix): leaf for name, leaf in self._parameters.items() if name.startswith(prefix)}
        returned = torch.func.functional_call(call.layer, values, *_reading(states, call.arguments, call.keywords))
        return (returned if isinstance(returned, Tensor) else returned[0]), (states if needs_input else None)

    def _through(
        self,
        compute: Callable[[], tuple[Tensor, Tensor | None]],
        leaves: Mapping[str, Tensor],
        directions: list[Tensor],
        before_direction: Callable[[int], None],
        keep_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Send directions through one part of the model; each is replaced by the gradient at what the part read."""
        columns: dict[str, list[Tensor]] = {name: [] for name in leaves if name}
        output, states = compute()
        for index, direction in enumerate(directions):
            if index and self._fresh:
                output, states = compute()
            before_direction(index)
            inputs = [*leaves.values(), *([] if states is None else [states])]
            gradients: tuple[Tensor | None, ...] = (None,) * len(inputs)
            if output.requires_grad and inputs:
                retain = keep_graph or (index + 1 < len(directions) and not self._fresh)
                gradients = torch.autograd.grad(
                    output, inputs, direction.to(output), retain_graph=retain, allow_unused=True
                )
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=False):
                if name:
                    columns[name].append(torch.zeros_like(leaf) if gradient is None else gradient)
            if states is not None:
                directions[index] = torch.zeros_like(states) if gradients[-1] is None else gradients[-1]
        return {name: torch.stack(column) for name, column in columns.items()}

    def _layer_of(self, name: str) -> str | None:
        """The layer that a parameter is in."""
        return next((layer for layer in self._layers if name.startswith(f"{layer}.")), None)


def side_by_side(parts: Iterable[Mapping[str, Tensor]], parameters: Mapping[str, Tensor], count: int) -> Tensor:
    """Gradients that come in parts, in the order of the parameters; zeros for a parameter that no part has.

    Args:
        parts: Gradients ``(C, *shape)`` by the name of the parameter.
        parameters: All parameters, ``P`` numbers together.
        count: ``C``.

    Returns:
        ``(C, P)`` on the CPU, in float32 or wider.
    """
    rows = {
        name: torch.zeros(count, leaf.numel(), dtype=torch.promote_types(leaf.dtype, torch.float32))
        for name, leaf in parameters.items()
    }
    for part in parts:
        for name, gradient in part.items():
            rows[name].copy_(gradient.flatten(1))
    return torch.cat(list(rows.values()), dim=1)


def recomputable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that transformers can compute again in a backward pass, by name; not those inside of others.

    Args:
        model: A model of transformers, with or without peft.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _reading(
    states: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of a layer with other hidden states."""
    if "hidden_states" in keywords:
        return arguments, {**keywords, "hidden_states": states}
    return (states, *arguments[1:]), keywords


def _with_anchor(leaves: Mapping[str, Tensor], anchor: Tensor | None) -> dict[str, Tensor]:
    """Leaves with the anchor, whose name is empty."""
    return dict(leaves) if anchor is None else {**leaves, "": anchor}
