"""All pictures of a report: which there are, and that none fails on odd text."""

from dataclasses import replace
from typing import Any

import pytest

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization import plots
from odp_callbacks.visualization.pictures import pictures
from tests.helpers.records import HOSTILE, MakeReport, hostile, in_modules, split
from tests.helpers.updates import update_only, with_update


class DiscardedFile:
    """A file that discards what is written to it."""

    def write(self, data: Any) -> int:
        return len(data)

    def flush(self) -> None:
        """Nothing to do."""


def test_a_probe_without_nodes_has_pictures_too(make_report: MakeReport) -> None:
    names = [name for name, _ in pictures(Analysis(replace(make_report(split), nodes=())))]
    assert "summary/alignment_over_depth" in names


def test_pictures_of_the_update_come_first_by_name(make_report: MakeReport) -> None:
    report = with_update(make_report(split), lambda correct: (0.6, -0.4))
    names = [name for name, _ in pictures(Analysis(report))]
    assert sorted(names)[:2] == names[:2] == ["gain/all_teachers", "gain/by_class_and_depth"]
    assert "summary/gain" in names
    alone = [name for name, _ in pictures(Analysis(replace(report, nodes=())))]
    assert alone == ["gain/all_teachers", "gain/by_class_and_depth", "rollout/correct", "rollout/incorrect"]


def test_rollouts_of_odd_texts_are_drawn_by_influence(make_report: MakeReport) -> None:
    report = update_only(hostile(make_report), lambda correct: (0.6, -0.4))
    names = []
    for name, plot in pictures(Analysis(report)):
        plot.savefig(DiscardedFile(), dpi=60)
        names.append(name)
    assert len(names) == 4


def test_without_influences_there_is_no_waterfall_and_rollouts_are_plain(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4), influence=False)
    drawn = dict(pictures(Analysis(report)))
    assert list(drawn) == ["gain/all_teachers", "rollout/correct", "rollout/incorrect"]
    assert all(text.get_bbox_patch() is None for text in drawn["rollout/correct"].axes[0].texts)


@pytest.mark.slow
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
