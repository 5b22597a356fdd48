"""What continuations have cost is not lost to an error in the gradients after them."""

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.engine.gradients import node_gradients
from odp_callbacks.records import ProbeReport
from tests.helpers.probes import external_teacher, probe_world
from tests.helpers.worlds import make_world


def probe_of_nodes() -> ProbeReport:
    world = make_world()
    world.table = {text: float(reward > 0.9) for text, reward in world.table.items()}
    options = {"branch_mass": 0.3, "max_branches": 1, "tail_draws": 1, "teacher_branch_probability": None}
    return probe_world(world, {"other": external_teacher()}, 4, rollouts_per_question=1, continuations=2, **options)


@pytest.fixture(scope="module")
def expected() -> ProbeReport:
    return probe_of_nodes()


def test_outcomes_stay_in_the_report_when_gradients_fail(
    expected: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a kernel failed")

    for name in ("node_gram_matrices", "projected_gram_matrices", "summed_vjps"):
        monkeypatch.setattr(node_gradients, name, fail)
    with (
        pytest.warns(UserWarning, match=r"gradients of \d+ nodes could not be computed.*RuntimeError: a kernel failed"),
        pytest.warns(UserWarning, match="the report has no step alignment"),
    ):
        report = probe_of_nodes()
    assert report.generated_tokens == expected.generated_tokens
    assert report.step is None
    failed = [record for record in report.nodes if np.isnan(record.gradient_inclusion)]
    assert failed
    for record, exact in zip(report.nodes, expected.nodes, strict=True):
        np.testing.assert_array_equal(record.total, exact.total)
        np.testing.assert_array_equal(record.count, exact.count)
        assert not record.has_gradients
    # No undefined number is 0; what needs no gradients is as it was.
    assert "gradients failed" in {summary.figures["predicted_gain"].note for summary in summarise(report)}
    for summary, whole in zip(summarise(report), summarise(expected), strict=True):
        for name in ("predicted_gain", "alignment", "gain_weighted_alignment"):
            value = summary.figures[name].value
            assert np.isnan(value) or value == whole.figures[name].value == 0, "where no outcomes differ, it is 0"
        found, exact = (one.figures["logit_alignment"] for one in (summary, whole))
        assert (found.value, found.uncorrected) == pytest.approx((exact.value, exact.uncorrected), nan_ok=True)


def test_gradients_that_do_not_fit_are_computed_again_with_less_memory(
    expected: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = node_gradients.node_gram_matrices

    def hungry(*arguments: object, max_memory_bytes: float | None = None, **options: object) -> object:
        if max_memory_bytes is None:
            raise torch.OutOfMemoryError("out of memory")
        return own(*arguments, max_memory_bytes=max_memory_bytes, **options)  # type: ignore[arg-type]  # options are of any type

    monkeypatch.setattr(node_gradients, "node_gram_matrices", hungry)
    with pytest.warns(UserWarning, match="are computed again with less; a smaller `max_memory_bytes`"):
        report = probe_of_nodes()
    for record, exact in zip(report.nodes, expected.nodes, strict=True):
        np.testing.assert_allclose(record.gram, exact.gram, rtol=1e-6, atol=1e-12)
