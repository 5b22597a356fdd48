"""Pictures: what they hold, and what they do with too much of it."""

from dataclasses import replace
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch

from odp_callbacks.analysis.node_estimates import DEFINED, UNDETERMINED
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization import plots
from odp_callbacks.visualization.rollout_pictures import KEY, rollout_figure, telling_rollout
from odp_callbacks.visualization.tensorboard import pictures
from tests.helpers.records import HOSTILE, MakeReport, hostile, in_modules, many_teachers, split


def boxes(figure: matplotlib.figure.Figure) -> list[tuple[str, FancyBboxPatch]]:
    """Tokens with a frame: text and patch."""
    found = [(text.get_text(), text.get_bbox_patch()) for text in figure.axes[0].texts]
    return [(text, patch) for text, patch in found if patch is not None]


def test_sure_tokens_are_filled_and_the_others_only_framed(make_report: MakeReport) -> None:
    report = make_report(split)
    totals = {0: (0.0, 4.0), 2: (2.0, 2.5), 5: (2.0, 2.0)}  # clear, doubtful, no difference
    report = replace(report, nodes=tuple(replace(n, total=np.array(totals[n.depth])) for n in report.nodes))
    analysis = Analysis(report)
    index = telling_rollout(analysis, correct=True)
    assert index is not None
    here = [n for n, node in enumerate(report.nodes) if node.rollout == index]
    assert analysis.sure()[here].tolist() == [[True, True], [False, False], [False, False]]
    assert analysis.status[here, 0].tolist() == [DEFINED, DEFINED, UNDETERMINED]
    drawn = boxes(rollout_figure(analysis, index))
    assert len(drawn) == 3 * len(report.teachers)
    for (_, patch), kind in zip(drawn, ["filled", "framed", "dashed"] * 2, strict=True):
        white = patch.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
        assert white == (kind != "filled")
        assert (patch.get_linestyle() == "--") == (kind == "dashed")
        grey = len(set(patch.get_edgecolor()[:3])) == 1
        assert grey == (kind != "framed")


def test_of_a_long_response_the_lines_with_measured_tokens_are_shown(make_report: MakeReport) -> None:
    report = many_teachers(8, depths=(0, 700, 1500, 4000))
    long = tuple(replace(r, pieces=tuple(f"w{d}" for d in range(4096))) for r in report.rollouts)
    figure = rollout_figure(Analysis(replace(report, rollouts=long)), 0)
    assert figure.get_size_inches()[1] < 20
    said = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text, _ in boxes(figure)] == ["w0", "w700", "w1500"] * 8, (
        "the fourth does not fit, and that is said"
    )
    assert said.count("…") == 3 * 8
    assert said[-1] == f"{KEY.format(sure=95)}; 1 more measured tokens are not shown"
    alone = rollout_figure(Analysis(replace(make_report(split, depths=(0, 700, 1500, 4000)), rollouts=long)), 0)
    assert [text for text, _ in boxes(alone)] == ["w0", "w700", "w1500", "w4000"] * 2


@pytest.mark.parametrize("teachers", [1, 8])
def test_layers_stand_across_and_modules_down(teachers: int) -> None:
    report = many_teachers(teachers)
    analysis = Analysis(in_modules(report, layers=3))
    figure = plots.by_module(analysis)
    assert figure is not None
    maps = figure.axes[:teachers]
    assert [axes.get_title(loc="left") for axes in maps] == list(report.teachers)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert [label.get_text() for label in maps[-1].get_xticklabels()] == ["0", "1", "2"]
    summaries = {s.split: s.figures["gain_weighted_alignment"].value for s in analysis.summaries("module")[:6]}
    shown = np.asarray(maps[0].collections[0].get_array())
    wanted = [[summaries[f"model.layers.{i}.self_attn.{m}_proj"] for i in range(3)] for m in "qv"]
    np.testing.assert_allclose(shown, wanted)
    assert plots.by_module(Analysis(report)) is None


def test_layers_of_two_towers_are_told_apart(make_report: MakeReport) -> None:
    report = in_modules(make_report(split))
    names = tuple(f"{tower}.layers.0.{m}_proj" for tower in ("vision", "language") for m in "qv")
    figure = plots.by_module(Analysis(replace(report, modules=names)))
    assert figure is not None
    kinds = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [kind[:6] for kind in kinds] == ["vision", "vision", "langua", "langua"]
    assert np.asarray(figure.axes[0].collections[0].get_array()).shape == (4, 1)


def test_a_probe_without_nodes_has_pictures_too(make_report: MakeReport) -> None:
    names = [name for name, _ in pictures(replace(make_report(split), nodes=()))]
    assert "summary/alignment_over_depth" in names


def test_a_withheld_alignment_is_shown_hollow_and_uncorrected(make_report: MakeReport) -> None:
    report = make_report(split)
    few = tuple(replace(n, count=np.array([1, 1]), total=n.total.round() / 4) for n in report.nodes)
    analysis = Analysis(replace(report, nodes=few))
    summary = analysis.summaries("depth")[0].figures["gain_weighted_alignment"]
    assert np.isnan(summary.value)
    figure = plots.over_depth(analysis)
    (first, *_) = figure.axes[0].containers
    assert first[0].get_ydata() == pytest.approx(summary.uncorrected)
    assert first[0].get_markerfacecolor() == "none"


@pytest.mark.parametrize("odd", [*HOSTILE, "a" * 5000, "\u0644\u0627", "日本" * 40])
def test_every_picture_is_drawn_whatever_the_text_is(make_report: MakeReport, odd: str) -> None:
    report = in_modules(hostile(make_report))
    rollouts = tuple(replace(r, question=odd, prompt=odd) for r in report.rollouts)
    report = replace(report, teachers=(odd, "other"), rollouts=rollouts)
    drawn = []
    for name, figure in pictures(report):
        figure.savefig(Nowhere(), dpi=60)
        drawn.append(name)
    assert len(set(drawn)) == 8


class Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)

    def flush(self) -> None:
        """Nothing to do."""


def test_a_picture_that_fails_does_not_take_the_others_along(
    make_report: MakeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "gains", broken)
    with pytest.warns(UserWarning, match="no picture summary/gain: RuntimeError: no ink"):
        names = [name for name, _ in pictures(make_report(split))]
    assert "summary/alignment_over_depth" in names
