"""How a failing probe is kept from stopping the training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.gradients.gradient_stage import GradientWarning


class FailureHandler:
    """Turns exceptions into warnings, so that training goes on; the same warning is issued only once.

    Args:
        strict: Let exceptions pass instead.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self._warnings_issued: set[str] = set()

    @contextmanager
    def guarded(self, context: TrainerContext | None, consequence: str) -> Iterator[None]:
        """Catch an exception in the body of the ``with`` statement and warn about it, unless ``strict``.

        Args:
            context: The trainer, which issues the warning; None where it is not known.
            consequence: What the failure means for the user; the exception's own text follows it.
        """
        try:
            with _gradient_warnings_as_errors() if self.strict else nullcontext():
                yield
        except Exception as error:
            if self.strict:
                raise
            self.warn_of_error(context, consequence, error)

    def warn_of_error(self, context: TrainerContext | None, consequence: str, error: Exception) -> None:
        """Warn once about an exception that was caught."""
        self.warn_once(context, f"{consequence}: {type(error).__name__}: {error}")

    def forget_warnings(self) -> None:
        """Issue each warning once more: another run has started."""
        self._warnings_issued.clear()

    def warn_once(self, context: TrainerContext | None, message: str) -> None:
        """Issue a warning unless the same one was issued before."""
        if message not in self._warnings_issued:
            self._warnings_issued.add(message)
            warn = warnings.warn if context is None else context.warn
            warn(f"odp-callbacks: {message}")

    def inform_once(self, context: TrainerContext, message: str) -> None:
        """Write a message to the log unless the same one was issued before."""
        if message not in self._warnings_issued:
            self._warnings_issued.add(message)
            context.inform(f"odp-callbacks: {message}")


@contextmanager
def _gradient_warnings_as_errors() -> Iterator[None]:
    """Where gradients fail, the engine keeps what it has measured and warns; here it raises instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradientWarning)
        yield
