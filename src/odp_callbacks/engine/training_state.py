"""Preserving the state of a training run: whatever a measurement changes is restored bit for bit."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.functional.gradients import evaluation_mode


@contextmanager
def preserving_training_state(*models: nn.Module) -> Iterator[None]:
    """Restore the state of a training run after a measurement.

    Models run in evaluation mode, and each module returns to the mode that it had. The random streams of torch (on the
    CPU and on every CUDA device in use), numpy and Python are restored, even if a reward function drew from them.

    Inside, gradients are off until they are switched on, and inference mode, which forbids them, is left. Compiled
    modules run uncompiled: otherwise each of a probe's many shapes would be compiled, and would evict the graphs that
    the training needs. The user's functions run under the defaults of torch that hold outside.

    Autocasting goes on without its cache. The casts that the training has in there stay valid and unseen, and none is
    added: each backward pass would leave the casts of its own parameters until the outermost block of autocasting ends,
    and a student whose weights are moved on trial would be read as it was before.

    Args:
        *models: The models that the measurement runs.
    """
    with ExitStack() as stack:
        stack.callback(_restore_random_state, _random_state())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(remembering_user_defaults())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(preserving_rotary_state(*models))
        for model in models:
            stack.enter_context(evaluation_mode(model))
        yield


def _random_state() -> tuple[Any, Any, Any, list[torch.Tensor]]:
    """The states of the random streams of Python, numpy, torch on the CPU, and torch on every CUDA device in use."""
    # Reading the state of a CUDA device would initialise CUDA in a process that does not use it.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda_states  # noqa: NPY002 (the users' legacy stream)


def _restore_random_state(state: tuple[Any, Any, Any, list[torch.Tensor]]) -> None:
    python_state, numpy_state, cpu_state, cuda_states = state
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002 (as above)
    torch.set_rng_state(cpu_state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)
