"""What happens where a part of an update cannot be measured: the report keeps everything else."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from odp_callbacks.engine.engines.interface import EngineError
from odp_callbacks.engine.gradients.gradient_stage import GradientWarning
from odp_callbacks.text import short_reason

Result = TypeVar("Result")


def measured_or_none(measure: Callable[[], Result], what: str) -> Result | None:
    """Return what a part of an update measures, or None with a :class:`GradientWarning` if that fails.

    Args:
        measure: Measures it.
        what: What the warning calls it.

    Raises:
        EngineError: If a server is gone: then the other stages would only wait for it again.
        Exception: Whatever is neither a kernel's failure nor a lack of memory: a rule or a teacher that fails or is
            refused would do so in each probe.

    Examples:
        >>> measured_or_none(lambda: 3, "the number")
        3
    """
    try:
        return measure()
    except EngineError:
        raise
    except (MemoryError, RuntimeError) as error:
        warnings.warn(
            f"{what} could not be measured, so its figures are missing; all else is in the report "
            f"({short_reason(error)}).",
            category=GradientWarning,
            stacklevel=2,
        )
    return None
