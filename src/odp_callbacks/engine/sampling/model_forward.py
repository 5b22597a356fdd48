"""Call a causal language model with a cache, whatever names its family gives to the arguments."""

from typing import TYPE_CHECKING, Any

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
