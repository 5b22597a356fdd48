"""Columns of the table of tokens and of the table of figures that come from predictors."""

import pytest

from odp_callbacks.analysis.correlations import TARGETS, correlations
from odp_callbacks.analysis.success_by_depth import success_by_depth
from odp_callbacks.analysis.token_table import OF_TEACHERS, token_columns
from tests.helpers.records import MakeReport
from tests.helpers.updates import with_features, with_update


def test_tokens_have_their_predictors_and_figures_their_correlations(make_report: MakeReport) -> None:
    made = make_report(lambda correct, depth: (0.5 - 0.1 * depth, -0.2), questions=5)
    report = with_features(with_update(made, lambda correct: (0.4, -0.1), noise=0.5))
    features, tokens = report.updates[0].features, report.tokens()
    assert features is not None
    assert list(tokens.columns) == token_columns(report)
    assert tokens.columns[11:13].tolist() == ["repetition", "student_entropy"]
    assert tokens.columns[13:].tolist() == [f"{name}_{teacher}" for teacher in report.teachers for name in OF_TEACHERS]
    assert tokens.student_entropy.tolist() == features.student_entropy.tolist()
    assert tokens.reverse_kl_far.tolist() == features.reverse_kl[:, 1].tolist()
    assert tokens.teacher_entropy_near.tolist() == features.teacher_entropy[:, 0].tolist()
    assert tokens.top_k_overlap_near.isna().all(), "these records have none"
    assert tokens.repetition.tolist() == pytest.approx([0.8] * len(tokens)), "each response is 't' eight times"
    figures = report.to_pandas().set_index(["teacher", "split", "figure"])
    for target in TARGETS:
        for (teacher, name), estimate in correlations(report, target=target).items():
            row = figures.loc[(teacher, "all", f"correlation_{name}_with_{target}")]
            assert row.value == pytest.approx(estimate.value, nan_ok=True)
            assert row.low == pytest.approx(estimate.low, nan_ok=True)
    for split, window, estimate in success_by_depth(report):
        assert figures.loc[("student", f"{split} depth {window}", "success")].value == estimate.value
