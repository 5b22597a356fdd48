"""Choose the backend that samples a model's continuations: the fastest one that gives the model's own logits."""

import warnings
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from odp_callbacks.engine.sampling.backend_trials import try_repeated_cache, try_shared_prefix

BACKENDS = ("shared prefix", "repeated cache", "generate")
"""From the fastest to the one that serves every model. All sample from the same distribution."""


class BackendSelection:
    """Remembers for each model which backend works, why faster ones do not, and whether a warning was logged.

    Models are held weakly: a model that is deleted is forgotten.
    """

    def __init__(self) -> None:
        self._backends: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._failures: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._warned: WeakSet[nn.Module] = WeakSet()

    def backend_of(self, model: nn.Module) -> str:
        """Return the first of :data:`BACKENDS` that works for ``model``; each is tried once for each model."""
        if model not in self._backends:
            self._backends[model], self._failures[model] = _try_backends(model)
        return self._backends[model]

    def backend_with_warning(self, model: nn.Module) -> str:
        """Return the same as :meth:`backend_of`, and log a warning once for each model that needs a slower backend."""
        backend = self.backend_of(model)
        if backend != BACKENDS[0] and model not in self._warned:
            self._warned.add(model)
            warnings.warn(
                f"continuations of {type(model).__name__} are sampled by the backend {backend!r}, which is slower and "
                f"has the same distribution. Faster backends do not work for this model ({self._failures[model]}).",
                stacklevel=3,  # points at the caller of the function that calls this method
            )
        return backend

    def clear(self) -> None:
        """Forget all models."""
        self._backends.clear()
        self._failures.clear()
        self._warned.clear()


SELECTION = BackendSelection()
"""What is known of the models of this process."""


def backend_of(model: nn.Module) -> str:
    """Return the first of :data:`BACKENDS` that gives this model's own logits.

    Each backend is tried on a few tokens and compared with the model's full forward pass, once for each model.

    Args:
        model: Causal language model, in evaluation mode.
    """
    return SELECTION.backend_of(model)


def _try_backends(model: nn.Module) -> tuple[str, str]:
    """Try the backends in turn; return the first that works, and why those before it do not."""
    failures = []
    for backend, trial in zip(BACKENDS, (try_shared_prefix, try_repeated_cache), strict=False):
        try:
            trial(model)
        except torch.OutOfMemoryError:
            raise  # This says nothing about the model.
        except Exception as error:
            failures.append(f"{backend}: {error or type(error).__name__}")
        else:
            return backend, "; ".join(failures)
    return BACKENDS[-1], "; ".join(failures)
