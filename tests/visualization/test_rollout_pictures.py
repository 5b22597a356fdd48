"""Pictures of rollouts: how tokens are drawn, and what is left out of a long response."""

from dataclasses import replace

import matplotlib.figure
import numpy as np
from matplotlib import colormaps
from matplotlib.patches import FancyBboxPatch

from odp_callbacks.analysis.node_estimates import DEFINED, UNDETERMINED
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.rollout_pictures import (
    COLOURS,
    INFLUENCE_KEY,
    KEY,
    most_informative_rollout,
    plot_rollout,
)
from tests.helpers.records import MakeReport, many_teachers, split
from tests.helpers.updates import update_only, with_texts, with_update


def framed_tokens(plot: matplotlib.figure.Figure) -> list[tuple[str, FancyBboxPatch]]:
    """Find the tokens that have a frame, with its patch."""
    candidates = [(text.get_text(), text.get_bbox_patch()) for text in plot.axes[0].texts]
    return [(text, patch) for text, patch in candidates if patch is not None]


def test_significant_tokens_are_filled_and_the_others_only_framed(make_report: MakeReport) -> None:
    report = make_report(split)
    totals = {0: (0.0, 4.0), 2: (2.0, 2.5), 5: (2.0, 2.0)}  # by depth: significant, not significant, no difference
    report = replace(report, nodes=tuple(replace(node, total=np.array(totals[node.depth])) for node in report.nodes))
    analysis = Analysis(report)
    rollout_index = most_informative_rollout(analysis, correct=True)
    assert rollout_index is not None
    node_indices = [index for index, node in enumerate(report.nodes) if node.rollout == rollout_index]
    significant = analysis.significant_tokens()[node_indices]
    assert significant.tolist() == [[True, True], [False, False], [False, False]]
    assert analysis.status[node_indices, 0].tolist() == [DEFINED, DEFINED, UNDETERMINED]
    drawn_tokens = framed_tokens(plot_rollout(analysis, rollout_index))
    assert len(drawn_tokens) == 3 * len(report.teachers)
    for (_, patch), style in zip(drawn_tokens, ["filled", "framed", "dashed"] * 2, strict=True):
        is_white = patch.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
        assert is_white == (style != "filled")
        assert (patch.get_linestyle() == "--") == (style == "dashed")
        is_grey = len(set(patch.get_edgecolor()[:3])) == 1
        assert is_grey == (style != "framed")


def test_of_a_long_response_the_lines_with_measured_tokens_are_shown(make_report: MakeReport) -> None:
    report = many_teachers(8, depths=(0, 700, 1500, 4000))
    pieces = tuple(f"w{depth}" for depth in range(4096))
    long_rollouts = tuple(replace(rollout, pieces=pieces) for rollout in report.rollouts)
    plot = plot_rollout(Analysis(replace(report, rollouts=long_rollouts)), 0)
    assert plot.get_size_inches()[1] < 20
    texts = [text.get_text() for text in plot.axes[0].texts]
    assert [text for text, _ in framed_tokens(plot)] == ["w0", "w700", "w1500"] * 8, (
        "the fourth does not fit, and the key says so"
    )
    assert texts.count("…") == 3 * 8
    assert texts[-1] == f"{KEY.format(level='95%')}\n1 more measured tokens are not shown"
    few_teachers = replace(make_report(split, depths=(0, 700, 1500, 4000)), rollouts=long_rollouts)
    tokens = framed_tokens(plot_rollout(Analysis(few_teachers), 0))
    assert [text for text, _ in tokens] == ["w0", "w700", "w1500", "w4000"] * 2


def test_the_confidence_level_decides_which_tokens_are_filled(make_report: MakeReport) -> None:
    report = make_report(split)
    totals = {0: (0.0, 4.0), 2: (0.0, 3.0), 5: (1.0, 3.0)}
    report = replace(report, nodes=tuple(replace(node, total=np.array(totals[node.depth])) for node in report.nodes))
    filled = {}
    for confidence in (0.8, 0.9999):
        plot = plot_rollout(Analysis(report, confidence), 0)
        white = (1.0, 1.0, 1.0, 1.0)
        filled[confidence] = sum(patch.get_facecolor() != white for _, patch in framed_tokens(plot))
        assert f"the {100 * confidence:g}% interval" in plot.axes[0].texts[-1].get_text()
    assert filled == {0.8: 6, 0.9999: 4}


def test_every_token_is_coloured_by_its_influence(make_report: MakeReport) -> None:
    report = with_update(make_report(split), lambda correct: (0.4 if correct else 0.05, -0.3), noise=0.2)
    analysis = Analysis(report)
    rollout_index = most_informative_rollout(analysis, correct=True)
    assert rollout_index is not None
    influence = analysis.influence
    assert influence is not None
    place = influence.tokens_of(rollout_index)
    plot = plot_rollout(analysis, rollout_index)
    drawn = framed_tokens(plot)
    assert len(drawn) == 8 * len(report.teachers), "all tokens, not only the measured ones"
    significant, value = influence.significant[place].T.ravel(), influence.value[place].T.ravel()
    for (_, patch), filled, share in zip(drawn, significant, (value / influence.scale).clip(-1, 1), strict=True):
        if filled:
            assert patch.get_facecolor() == colormaps[COLOURS]((share + 1) / 2)
        else:
            assert patch.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
            red, _, blue, _ = patch.get_edgecolor()
            assert abs(share) < 0.1 or (blue > red) == (share > 0)
    assert plot.axes[0].texts[-1].get_text() == INFLUENCE_KEY.format(level="95%")
    assert plot.axes[1].get_xlabel() == "influence"
    assert f"{influence.scale:.1e}" in plot.axes[1].get_xticklabels()[-1].get_text()


def test_the_rollout_with_the_most_significant_tokens_is_drawn(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.4 if correct else 0.05, 0.0), noise=0.2)
    influence = Analysis(report).influence
    assert influence is not None
    for correct in (True, False):
        index = most_informative_rollout(Analysis(report), correct)
        assert index is not None
        assert report.rollouts[index].correct == correct
        counts = [
            int(influence.significant[influence.tokens_of(other)].sum())
            for other, rollout in enumerate(report.rollouts)
            if rollout.correct == correct
        ]
        assert influence.significant[influence.tokens_of(index)].sum() == max(counts)


def test_of_a_long_response_the_lines_of_the_largest_influence_are_shown(make_report: MakeReport) -> None:
    report = with_texts(many_teachers(8, depths=(0,), questions=4), 2000)
    report = update_only(report, lambda correct: tuple(0.1 * teacher for teacher in range(8)))
    (update,) = report.updates
    assert update.influence is not None
    by_fold = np.where(update.influence.depth[None, :, None] == 1500, 1.0, update.influence.by_fold)
    influence = replace(update.influence, by_fold=by_fold.astype(np.float32))
    plot = plot_rollout(Analysis(replace(report, updates=(replace(update, influence=influence),))), 0)
    assert plot.get_size_inches()[1] < 20
    texts = [text.get_text() for text in plot.axes[0].texts]
    for depth in (0, 1, 1500):
        assert texts.count(f"·w{depth}") == 8, depth
    assert texts.count("·w1000") == 0
    drawn = len(framed_tokens(plot)) // 8
    assert texts[-1].endswith(f"\n{2000 - drawn} more tokens, of smaller influence, are not shown")
