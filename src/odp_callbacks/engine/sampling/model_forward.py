"""Call a causal language model with a cache, whatever names its family gives to the arguments."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView
from odp_callbacks.functional.gradients import call_with_parameters, forward_arguments

if TYPE_CHECKING:
    from transformers import Cache


def forward_with_cache(
    model: nn.Module,
    input_ids: Tensor,
    cache: "Cache",
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    shared_prefix: SharedPrefixView | None = None,
    logit_positions: Tensor | None = None,
    parameters: dict[str, Tensor] | None = None,
    accepted_arguments: frozenset[str] | None = None,
) -> Tensor:
    """Run ``model`` on ``input_ids``, add their keys and values to ``cache``, and return logits.

    Args:
        model: Causal language model that takes a transformers cache.
        input_ids: ``(B, T)`` int64.
        cache: Keys and values of the tokens before; extended in place.
        attention_mask: ``(B, past + T)`` int64; None where nothing is padding.
        position_ids: ``(B, T)`` int64; None to count from the cache's length.
        shared_prefix: The levels that the rows share, where the model uses shared prefix attention.
        logit_positions: ``(N,)`` int64, indices into ``T`` whose logits are returned; None for the last.
        parameters: Replacements for parameters of ``model``, by name.
        accepted_arguments: What :func:`~odp_callbacks.functional.gradients.forward_arguments` gives for ``model``;
            None to look it up.

    Returns:
        Logits ``(B, N, V)``.
    """
    if accepted_arguments is None:
        accepted_arguments = forward_arguments(model)
    keywords: dict[str, Any] = {"input_ids": input_ids, "use_cache": True}
    # A release of transformers 5 renamed this argument; both names are supported.
    keywords["cache" if "cache" in accepted_arguments else "past_key_values"] = cache
    if attention_mask is not None:
        keywords["attention_mask"] = attention_mask
    if position_ids is not None and "position_ids" in accepted_arguments:
        keywords["position_ids"] = position_ids
    if shared_prefix is not None:
        keywords["shared_prefix"] = shared_prefix
    selects_logits = "logits_to_keep" in accepted_arguments
    if selects_logits:
        keywords["logits_to_keep"] = 1 if logit_positions is None else logit_positions
    output = call_with_parameters(model, parameters, keywords)
    logits: Tensor = output.logits
    if logit_positions is not None:
        return logits if selects_logits else logits[:, logit_positions]
    return logits[:, -1:]


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of logits that ``model`` gives for a token."""
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output_embeddings, "weight", None)
    config: Any = getattr(model, "config", None)
    return int(weight.shape[0]) if weight is not None else int(config.get_text_config().vocab_size)


def embedded_tokens(model: nn.Module) -> int | None:
    """Return the number of tokens that ``model`` has an embedding for; None if that cannot be seen."""
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    rows = getattr(embeddings, "num_embeddings", None)
    if isinstance(rows, int):
        return rows
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.is_floating_point() else None


def check_embedded(model: nn.Module, sequences: Iterable[Tensor | Sequence[int]], description: str) -> None:
    """Check that ``model`` has an embedding for every token.

    Args:
        model: The model that will read the sequences.
        sequences: Token ids.
        description: What they are, for the message: ``"question 3"``.

    Raises:
        ValueError: If a token id is beyond the embeddings. On an accelerator, such an id would end the process.
    """
    rows = embedded_tokens(model)
    if rows is None:
        return
    for sequence in sequences:
        largest = int(torch.as_tensor(sequence).max()) if len(sequence) else 0
        if largest >= rows:
            raise ValueError(
                f"{description} has the token id {largest}, but {type(model).__name__} has embeddings for {rows} "
                f"tokens only; give a model that has it, for example after `resize_token_embeddings({largest + 1})`."
            )
