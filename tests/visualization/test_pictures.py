"""All pictures of a report: which there are, and that none fails on odd text."""

from dataclasses import replace
from typing import Any

import pytest

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization import plots
from odp_callbacks.visualization.pictures import pictures
from tests.helpers.records import HOSTILE, MakeReport, hostile, in_modules, split


class DiscardedFile:
    """A file that discards what is written to it."""

    def write(self, data: Any) -> int:
        return len(data)

    def flush(self) -> None:
        """Nothing to do."""


def test_a_probe_without_nodes_has_pictures_too(make_report: MakeReport) -> None:
    names = [name for name, _ in pictures(Analysis(replace(make_report(split), nodes=())))]
    assert "summary/alignment_over_depth" in names


@pytest.mark.parametrize("odd_text", [*HOSTILE, "a" * 5000, "\u0644\u0627", "日本" * 40])
def test_every_picture_is_drawn_whatever_the_text_is(make_report: MakeReport, odd_text: str) -> None:
    report = in_modules(hostile(make_report))
    rollouts = tuple(replace(rollout, question=odd_text, prompt=odd_text) for rollout in report.rollouts)
    report = replace(report, teachers=(odd_text, "other"), rollouts=rollouts)
    drawn_names = []
    for name, plot in pictures(Analysis(report)):
        plot.savefig(DiscardedFile(), dpi=60)
        drawn_names.append(name)
    assert len(set(drawn_names)) == 8


def test_a_picture_that_fails_is_skipped_and_the_others_are_drawn(
    make_report: MakeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "plot_gains", fail)
    with pytest.warns(UserWarning, match="the picture summary/gain was skipped: RuntimeError: no ink"):
        names = [name for name, _ in pictures(Analysis(make_report(split)))]
    assert "summary/alignment_over_depth" in names
