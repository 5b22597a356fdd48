"""What a gate is, and what a gate may be able to do besides."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.records import ProbeReport

Gate: TypeAlias = Callable[[Tokens], Tensor]
"""Maps ``N`` tokens to their weights in the loss, ``(N,)``, finite and not negative."""


@runtime_checkable
class Learner(Protocol):
    """A gate that learns from every probe."""

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe."""


@runtime_checkable
class Router(Protocol):
    """A gate that chooses the teacher of each token."""

    def route(self, tokens: Tokens) -> Tensor:
        """Return the index of each token's teacher in ``tokens.teachers``, ``(N,)`` int64."""


@runtime_checkable
class Loggable(Protocol):
    """A gate with scalars that are logged after every probe."""

    def scalars(self) -> Mapping[str, float]:
        """Return the scalars by the names that they are logged under."""


@runtime_checkable
class Stateful(Protocol):
    """A gate with a state that checkpoints must keep."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
