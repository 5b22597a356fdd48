"""The student's LoRA parameters, and the plain vector-Jacobian product that gives gradients on them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.functional.working_precision import check_floating_point


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters that the student trains, by name, in ``model.named_parameters()`` order.

    Only the active adapters count. Where some of their parameters require gradients and others do not, only the
    former are returned; where none does (an adapter loaded for inference), all of them are. Parameters that share
    their memory (peft's ``ensure_weight_tying``) are returned once, under the first of their names.

    Args:
        model: A peft model, or any module that contains peft's LoRA layers.

    Returns:
        The parameters by name; at least one.

    Raises:
        ValueError: If there are no LoRA parameters in an active adapter.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"]))
        >>> [tuple(parameter.shape) for parameter in lora_parameters(model).values()]
        [(2, 8), (24, 2)]
    """
    active = active_lora_parameters(model)
    trained = {name: parameter for name, parameter in active.items() if parameter.requires_grad}
    if not active:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no LoRA parameters in an active adapter; "
            "wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    return trained or active


def active_lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters that the student uses, by name: those of the active adapters, trained at present or not.

    Parameters that share their memory are returned once, as by :func:`lora_parameters`.
    """
    active = _active_parameters(model)
    repeated = _tied_parameters(active)
    return {name: parameter for name, parameter in active.items() if name not in repeated}


def _active_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every LoRA parameter of an active adapter, by name."""
    from peft.tuners.lora import LoraLayer

    modules = dict(model.named_modules())  # walked once: of a deep model it takes longer than all that follows
    active: set[int] = set()
    for layer in (module for module in modules.values() if isinstance(module, LoraLayer)):
        for container in (getattr(layer, name) for name in layer.adapter_layer_names):
            for adapter in layer.active_adapters:
                if adapter in container:
                    content = container[adapter]
                    parameters = [content] if isinstance(content, nn.Parameter) else content.parameters()
                    active.update(id(parameter) for parameter in parameters)
    by_name: dict[str, nn.Parameter] = {}
    for prefix, module in modules.items():
        for name, parameter in module._parameters.items():
            if id(parameter) in active:
                active.remove(id(parameter))  # a shared parameter has its first name
                by_name[f"{prefix}.{name}" if prefix else name] = parameter
    return by_name


def _tied_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, bool]]:
    """Parameters that lie in the memory of an earlier one.

    Returns:
        By their name: the name of the earlier parameter, and whether this one is its transpose.
    """
    first_names: dict[int, str] = {}
    tied_parameters = {}
    for name, parameter in parameters.items():
        address = parameter.data_ptr() if parameter.numel() else 0
        if address and (earlier := first_names.setdefault(address, name)) != name:
            original = parameters[earlier]
            tied_parameters[name] = (
                earlier,
                parameter.shape != original.shape or parameter.stride() != original.stride(),
            )
    return tied_parameters


def call_with_parameters(model: nn.Module, parameters: Mapping[str, Tensor] | None, keywords: dict[str, Any]) -> Any:
    """Run ``model`` with other values of some LoRA parameters.

    Args:
        model: The model.
        parameters: New values by parameter name, as in :func:`lora_parameters`; None for the model's own. A parameter
            that is tied to one of these also takes its value.
        keywords: Keyword arguments of the model's forward.

    Returns:
        The output of the model.
    """
    if parameters is None:
        return model(**keywords)
    values = dict(parameters)
    for name, (earlier, transposed) in _tied_parameters(_active_parameters(model)).items():
        if earlier in values:
            values[name] = values[earlier].mT if transposed else values[earlier]
    return torch.func.functional_call(model, values, (), keywords)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode, and restore the mode of every module afterwards.

    4-bit layers of bitsandbytes stay in training mode. In evaluation mode they pack their weights in place for
    inference on some CPUs, and gradients can no longer pass through them.
    """
    previous_modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in previous_modes:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        yield
    finally:
        for module, training in previous_modes:
            module.training = training


def drops_out(model: nn.Module) -> bool:
    """Whether dropout changes what the model returns in its present mode.

    Besides modules of dropout, attributes such as Llama's ``attention_dropout`` count, which a module in training mode
    passes to a function.

    Examples:
        >>> drops_out(nn.Dropout(0.1).train()), drops_out(nn.Dropout(0.1).eval()), drops_out(nn.Dropout(0.0).train())
        (True, False, False)
    """
    for module in model.modules():
        if module.training:
            rates = [value for name, value in vars(module).items() if "dropout" in name or "drop_prob" in name]
            if isinstance(module, nn.modules.dropout._DropoutNd):
                rates.append(module.p)
            if any(isinstance(rate, float) and rate > 0 for rate in rates):
                return True
    return False


def logits_at(
    model: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    parameters: dict[str, Tensor] | None = None,
) -> Tensor:
    """Logits of ``model`` at chosen positions only.

    Args:
        model: A causal language model.
        input_ids: ``(B, T)``, integer.
        positions: ``(N,)``, integer, the same for every sequence of the batch.
        attention_mask: ``(B, T)`` or None.
        parameters: Replacements for parameters of ``model``, by name.

    Returns:
        ``(B, N, V)``.
    """
    keywords: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        keywords["attention_mask"] = attention_mask
    selects_positions = "logits_to_keep" in forward_arguments(model)
    if selects_positions:
        keywords["logits_to_keep"] = positions
    output = call_with_parameters(model, parameters, keywords)
    logits: Tensor = output.logits
    return logits if selects_positions else logits[:, positions]


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the language model's own ``forward``, which peft's wrapper hides."""
    from peft import PeftModel

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return frozenset(inspect.signature(inner.forward).parameters)


def lora_gradients(model: nn.Module, input_ids: Tensor, positions: Tensor, cotangents: Tensor) -> Tensor:
    r"""Gradients on the LoRA parameters of directions on the logits: the vector-Jacobian products :math:`J_u^\top v`.

    :math:`J_u` is the Jacobian of node :math:`u`'s logits with respect to the LoRA parameters. This is the plain and
    exact form, with one backward for each direction, in evaluation mode. The engine's batched form is tested against
    it. Neither ``.grad`` nor any other state of ``model`` changes.

    Args:
        model: Causal language model with LoRA, of any transformers family.
        input_ids: ``(T,)``, one sequence, without padding.
        positions: ``(N,)``, integer: the position whose logits decide the next token at each node.
        cotangents: ``(N, C, V)``, floating: ``C`` directions on each node's logits.

    Returns:
        ``(N, C, P)``: ``P`` is the number of LoRA parameters, flattened in ``model.named_parameters()`` order.

    Raises:
        ValueError: If there are no LoRA parameters, or the shapes or positions do not fit.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"]))
        >>> lora_gradients(model, torch.tensor([1, 2, 3]), torch.tensor([2]), torch.ones(1, 4, 11)).shape
        torch.Size([1, 4, 64])
    """
    _check_arguments(input_ids, positions, cotangents)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in lora_parameters(model).items()}
    leaves = list(parameters.values())
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
        logits = logits_at(model, input_ids[None], positions, parameters=parameters)[0]  # (N, V)
        cotangents = cotangents.to(logits)
        gradients = [
            flatten_gradients(
                torch.autograd.grad(logits[node_index], leaves, direction, retain_graph=True, allow_unused=True),
                parameters,
            )
            for node_index in range(len(positions))
            for direction in cotangents[node_index]
        ]
    parameter_count = sum(parameter.numel() for parameter in leaves)
    if not gradients:
        return cotangents.new_zeros(*cotangents.shape[:2], parameter_count)
    return torch.stack(gradients).view(*cotangents.shape[:2], parameter_count)


def flatten_gradients(gradients: tuple[Tensor | None, ...], parameters: dict[str, Tensor]) -> Tensor:
    """Concatenate the gradients of several parameters.

    Args:
        gradients: One for each parameter, ``(*batch, *shape)``; None, for a parameter that was not used, counts as
            zeros.
        parameters: The parameters, each of its ``shape``.

    Returns:
        ``(*batch, P)``.
    """
    pairs = list(zip(gradients, parameters.values()))
    batch_shape = next(
        (gradient.shape[: gradient.dim() - parameter.dim()] for gradient, parameter in pairs if gradient is not None),
        (),
    )
    return torch.cat(
        [
            parameter.new_zeros(*batch_shape, parameter.numel())
            if gradient is None
            else gradient.reshape(*batch_shape, parameter.numel())
            for gradient, parameter in pairs
        ],
        dim=-1,
    )


def _check_arguments(input_ids: Tensor, positions: Tensor, cotangents: Tensor) -> None:
    """Raise ``ValueError`` unless one sequence, its nodes and their directions fit each other."""
    check_floating_point("cotangents", cotangents)
    if input_ids.dim() != 1 or positions.dim() != 1:
        raise ValueError(
            "`input_ids` and `positions` must be one sequence (T,) and its nodes (N,), "
            f"but {tuple(input_ids.shape)} and {tuple(positions.shape)} were given."
        )
    if cotangents.dim() != 3 or len(cotangents) != len(positions):
        raise ValueError(
            f"`cotangents` must have shape (N, C, V) with N = {len(positions)}, "
            f"but {tuple(cotangents.shape)} was given."
        )
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < len(input_ids)):
        raise ValueError(
            f"`positions` must lie in [0, {len(input_ids) - 1}], but they reach from {int(positions.min())} "
            f"to {int(positions.max())}."
        )
