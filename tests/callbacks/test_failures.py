"""What the engine warns of, and keeps its measurement for, is an error where the user asked for errors."""

import warnings

import pytest

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.engine.gradients.gradient_stage import GradientWarning


def warn_of_gradients(strict):
    with FailureHandler(strict).guarded(None, "a probe failed"):
        warnings.warn("the gradients of 3 nodes could not be computed", GradientWarning, stacklevel=1)
        return "a report"


def test_failed_gradients_are_a_warning_unless_strict():
    with pytest.warns(GradientWarning, match="3 nodes"):
        assert warn_of_gradients(strict=False) == "a report"
    with pytest.raises(GradientWarning, match="3 nodes"):
        warn_of_gradients(strict=True)
