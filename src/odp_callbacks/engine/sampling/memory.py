"""How much memory is left."""

import psutil
import torch

SHARE = 0.5
"""Of the memory that is free, what one stage of a probe may take."""


def free_bytes(device: torch.device, limit: float | None = None) -> int:
    """Bytes that a stage of the probe may take on ``device``.

    Args:
        device: Where the model is.
        limit: The most that the user allows, in bytes.

    Examples:
        >>> import torch
        >>> free_bytes(torch.device("cpu"), 1000)
        1000
    """
    if device.type == "cuda":
        # What torch's allocator holds and does not use is free for us, too.
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    return int(SHARE * free if limit is None else min(SHARE * free, limit))
