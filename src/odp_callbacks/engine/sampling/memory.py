"""How much memory a stage of the probe may use."""

from typing import Any

import psutil
import torch
from torch import nn

USABLE_SHARE = 0.5
"""Share of the free memory that one stage of a probe may use."""


def free_bytes(device: torch.device, max_memory_bytes: float | None = None) -> int:
    """Count the bytes that a stage of the probe may use on ``device``.

    Args:
        device: Where the model is.
        max_memory_bytes: The user's limit in bytes; None for half of what is free.

    Returns:
        Half of the free memory in bytes, or the user's limit where that is smaller.

    Examples:
        >>> import torch
        >>> free_bytes(torch.device("cpu"), 1000)
        1000
    """
    if device.type == "cuda":
        # Memory that torch's allocator has reserved and does not use is free for the probe, too.
        available, _ = torch.cuda.mem_get_info(device)
        available += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        available = psutil.virtual_memory().available
    usable = USABLE_SHARE * available
    return int(usable if max_memory_bytes is None else min(usable, max_memory_bytes))


def cache_bytes_of_token(model: nn.Module) -> int:
    """Bytes that the keys and values of one token take in a model of transformers, at most."""
    parameter = next(model.parameters())
    config: Any = model.config
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * parameter.element_size())
