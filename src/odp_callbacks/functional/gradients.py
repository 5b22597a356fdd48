"""Gradients on the LoRA parameters: which parameters those are, and the plain pull-back through the model."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from odp_callbacks.functional.working_precision import floating


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters that the student trains, by name, in ``model.named_parameters()`` order.

    Those of the active adapters. Where some of them require gradients and others do not, only the former; where
    none does (an adapter loaded for inference), all of them. Parameters that share their memory (peft's
    ``ensure_weight_tying``) are one, under the first of their names.

    Args:
        model: A peft model, or any module with peft's LoRA layers inside.

    Raises:
        ValueError: If there is none.
    """
    found = _active(model)
    found = {name: p for name, p in found.items() if name not in _shared(found)}
    trained = {name: p for name, p in found.items() if p.requires_grad}
    if not found:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no LoRA parameters in an active adapter; "
            "wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    return trained or found


def _active(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every LoRA parameter of an active adapter, by name."""
    active: set[int] = set()
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for container in (getattr(layer, name) for name in layer.adapter_layer_names):
            for adapter in layer.active_adapters:
                if adapter in container:
                    held = container[adapter]
                    active.update(id(p) for p in ([held] if isinstance(held, nn.Parameter) else held.parameters()))
    return {name: p for name, p in model.named_parameters() if id(p) in active}


def _shared(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, bool]]:
    """Names whose parameter lies in the memory of an earlier one: that one's name, and whether it is its transpose."""
    first: dict[int, str] = {}
    found = {}
    for name, p in parameters.items():
        place = p.data_ptr() if p.numel() else 0
        if place and (earlier := first.setdefault(place, name)) != name:
            found[name] = earlier, p.shape != parameters[earlier].shape or p.stride() != parameters[earlier].stride()
    return found


def call_with(model: nn.Module, parameters: Mapping[str, Tensor] | None, keywords: dict[str, Any]) -> Any:
    """Run ``model`` with other values of some LoRA parameters, also where they are known by another name."""
    if parameters is None:
        return model(**keywords)
    values = dict(parameters)
    for name, (earlier, transposed) in _shared(_active(model)).items():
        if earlier in values:
            values[name] = values[earlier].mT if transposed else values[earlier]
    return torch.func.functional_call(model, values, (), keywords)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode, and afterwards each module back into the mode that it had.

    bitsandbytes' layers of 4 bits are left in training mode: in the other one they pack their weights in place for
    inference on some CPUs, and no gradient passes them any more.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
        positions: ``(N,)``, integer, shared by the batch.
        attention_mask: ``(B, T)`` or None.
        parameters: Replacements for parameters of ``model``, by name.

    Returns:
        ``(B, N, V)``.
    """
    keywords: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        keywords["attention_mask"] = attention_mask
    cut = "logits_to_keep" in forward_arguments(model)
    if cut:
        keywords["logits_to_keep"] = positions
    output = call_with(model, parameters, keywords)
    logits: Tensor = output.logits
    return logits if cut else logits[:, positions]


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the language model's own ``forward`` takes (peft's wrapper hides them)."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return frozenset(inspect.signature(inner.forward).parameters)


def lora_gradients(model: nn.Module, input_ids: Tensor, positions: Tensor, cotangents: Tensor) -> Tensor:
    r"""Pull directions on the logits back to the LoRA parameters, :math:`J_u^\top v`, one backward for each.

    The plain, exact form, in evaluation mode; the engine's batched one is tested against it. Neither ``.grad`` nor
    any other state of ``model`` changes.

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
    check_pullback(input_ids, positions, cotangents)
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model).items()}
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        logits = logits_at(model, input_ids[None], positions, parameters=parameters)[0]  # (N, V)
        cotangents = cotangents.to(logits)
        pulled = [
            flatten(
                torch.autograd.grad(logits[n], list(parameters.values()), v, retain_graph=True, allow_unused=True),
                parameters,
            )
            for n in range(len(positions))
            for v in cotangents[n]
        ]
    size = sum(p.numel() for p in parameters.values())
    if not pulled:
        return cotangents.new_zeros(*cotangents.shape[:2], size)
    return torch.stack(pulled).view(*cotangents.shape[:2], size)


def flatten(gradients: tuple[Tensor | None, ...], parameters: dict[str, Tensor]) -> Tensor:
    """Concatenate gradients ``(*batch, *shape)`` to ``(*batch, P)``; a parameter that was not used counts as zeros."""
    batch = next((g.shape[: g.dim() - p.dim()] for g, p in zip(gradients, parameters.values()) if g is not None), ())
    return torch.cat(
        [
            p.new_zeros(*batch, p.numel()) if g is None else g.reshape(*batch, p.numel())
            for g, p in zip(gradients, parameters.values())
        ],
        dim=-1,
    )


def check_pullback(input_ids: Tensor, positions: Tensor, cotangents: Tensor) -> None:
    """Raise ``ValueError`` unless one sequence, its nodes and their directions fit each other."""
    floating("cotangents", cotangents)
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
