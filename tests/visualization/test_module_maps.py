"""Maps over the LoRA modules: where a module's cell is, and what it shows."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.module_maps import plot_module_maps
from tests.helpers.records import MakeReport, in_modules, many_teachers, split


@pytest.mark.parametrize("teachers", [1, 8])
def test_layers_are_columns_and_modules_are_rows(teachers: int) -> None:
    report = many_teachers(teachers)
    analysis = Analysis(in_modules(report, layers=3))
    plot = plot_module_maps(analysis)
    assert plot is not None
    maps = plot.axes[:teachers]
    assert [axes.get_title(loc="left") for axes in maps] == list(report.teachers)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert [label.get_text() for label in maps[-1].get_xticklabels()] == ["0", "1", "2"]
    values = {s.split: s.figures["gain_weighted_alignment"].value for s in analysis.summaries("module")[:6]}
    drawn_values = np.asarray(maps[0].collections[0].get_array())
    expected = [[values[f"model.layers.{layer}.self_attn.{kind}_proj"] for layer in range(3)] for kind in "qv"]
    np.testing.assert_allclose(drawn_values, expected)
    assert plot_module_maps(Analysis(report)) is None


def test_layers_of_two_towers_have_cells_of_their_own(make_report: MakeReport) -> None:
    report = in_modules(make_report(split))
    names = tuple(f"{tower}.layers.0.{kind}_proj" for tower in ("vision", "language") for kind in "qv")
    plot = plot_module_maps(Analysis(replace(report, modules=names)))
    assert plot is not None
    kinds = [label.get_text() for label in plot.axes[0].get_yticklabels()]
    assert [kind[:6] for kind in kinds] == ["vision", "vision", "langua", "langua"]
    assert np.asarray(plot.axes[0].collections[0].get_array()).shape == (4, 1)


def test_the_confidence_level_decides_which_cells_have_dots(make_report: MakeReport) -> None:
    report = in_modules(make_report(lambda correct, depth: (0.1, -0.1), noise=0.3))
    dots = {}
    for confidence in (0.2, 0.9999):
        plot = plot_module_maps(Analysis(report, confidence))
        assert plot is not None
        dots[confidence] = sum(len(np.asarray(axes.collections[1].get_offsets())) for axes in plot.axes[:2])
    assert dots[0.2] > dots[0.9999] == 0
