"""Being a guest in somebody's training run: whatever the measurement touches is put back bit for bit."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from odp_callbacks.functional.gradients import evaluating


@contextmanager
def preserving_training_state(*models: nn.Module) -> Iterator[None]:
    """Measure inside, leave no trace outside.

    Models are put into evaluation mode and back, each module into the mode that it had. The random streams of torch
    (CPU and every CUDA device in use), numpy and Python are put back, also where a reward function drew from them.
    Gradients are off inside unless they are switched on, and inference mode, which would forbid them, is left. What was
    compiled runs uncompiled: a probe's many shapes would be compiled one by one, and push out what the training needs.

    Args:
        models: The models that will run.
    """
    with ExitStack() as stack:
        stack.callback(_restore_random_state, _random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for model in models:
            stack.enter_context(evaluating(model))
        yield


def _random_state() -> tuple[Any, Any, Any, list[torch.Tensor]]:
    # Asking a CUDA device for its state would start CUDA in a process that does not use it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002 (the users' legacy stream)


def _restore_random_state(state: tuple[Any, Any, Any, list[torch.Tensor]]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002 (as above)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
