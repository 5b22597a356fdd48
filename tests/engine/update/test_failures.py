"""What rollouts and continuations have cost is not lost to an error in the measurement of the update."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.engine.engines.interface import EngineError
from odp_callbacks.engine.gradients.gradient_stage import GradientWarning
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.records import ProbeReport
from tests.helpers.models import tiny
from tests.helpers.probes import make_probe, measure

LOST = r"the update could not be measured, so its figures are missing; all else .* \(RuntimeError: a kernel failed\)"
QUESTIONS = [{"prompt": prompt, "answer": "d"} for prompt in ("a b c", "c")]


def report_of(**options: object) -> ProbeReport:
    return measure(tiny(), "base", rows=QUESTIONS, max_new_tokens=4, nodes=1, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def fail(method: str, error: Exception) -> None:
        def raise_error(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(UpdateGradients, method, raise_error)

    return fail


@pytest.fixture(scope="module")
def whole() -> ProbeReport:
    return report_of()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("a kernel failed"), LOST),
        (torch.OutOfMemoryError("no smaller batch fits"), r"update could not .* \(OutOfMemoryError: no smaller batch"),
    ],
)
@pytest.mark.filterwarnings("ignore:a batch of:UserWarning", "ignore:gradients did not fit:UserWarning")
def test_an_update_that_fails_leaves_rollouts_and_nodes(
    error: Exception, message: str, whole: ProbeReport, failing: Callable[..., None]
) -> None:
    failing("segment_rows", error)
    with pytest.warns(GradientWarning, match=message) as warned:
        report = report_of()
    assert len([one for one in warned if one.category is GradientWarning]) == 1
    assert report.updates == ()
    assert report.rollouts == whole.rollouts
    assert report.generated_tokens == whole.generated_tokens
    assert report.left_out == whole.left_out
    for record, expected in zip(report.nodes, whole.nodes, strict=True):
        np.testing.assert_array_equal(record.total, expected.total)
        np.testing.assert_array_equal(record.gram, expected.gram)


@pytest.mark.parametrize(
    ("method", "what", "options"),
    [
        ("influences", "the influence of tokens", {}),
        ("weighted_rows", "the gain of rules", {"rules": {"sure": lambda tokens: tokens.teacher_entropy < 1.0}}),
    ],
)
def test_a_part_that_fails_leaves_the_gain(
    method: str, what: str, options: dict[str, Any], whole: ProbeReport, failing: Callable[..., None]
) -> None:
    failing(method, RuntimeError("a kernel failed"))
    with pytest.warns(GradientWarning, match=f"{what} could not be measured"):
        report = report_of(budget=0, **options)
    (update,), (expected,) = report.updates, whole.updates
    np.testing.assert_allclose(update.gram.cross, expected.gram.cross, rtol=1e-5, atol=1e-9)
    assert (update.influence is None) == (method == "influences")
    assert update.rules is None


def test_with_a_limit_of_the_time_it_fails_alike(failing: Callable[..., None]) -> None:
    failing("segment_rows", RuntimeError("a kernel failed"))
    with pytest.warns(GradientWarning, match=LOST):
        report = report_of(seconds=600)  # far away: on a busy machine, 20 s left no time for nodes
    assert report.updates == ()
    assert report.nodes
    assert len(report.rollouts) == 4
    assert "questions_without_update" not in report.left_out, "time was not what was missing"


def test_strict_raises(failing: Callable[..., None]) -> None:
    for method in ("influences", "segment_rows"):
        failing(method, RuntimeError("a kernel failed"))
        with (
            FailureHandler(strict=True).guarded(None, "a probe failed"),
            pytest.raises(GradientWarning, match=r"\(RuntimeError: a kernel failed\)"),
        ):
            report_of(budget=0)


def test_a_server_that_is_gone_still_costs_the_probe(failing: Callable[..., None]) -> None:
    failing("segment_rows", EngineError("`teachers` (a server) is not there"))
    with pytest.raises(EngineError, match="is not there"):
        make_probe(tiny(), budget=0).run(QUESTIONS)
