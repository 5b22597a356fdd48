"""Contributions of layers and modules against explicit gradients."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.module_contributions import module_contributions
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.analysis.update_gain import module_contribution, update_contribution
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import DamagedRecordsError, concatenate, load, save
from odp_callbacks.update_records import ModuleProducts, UpdateGram, UpdateRecord, gram_of_rows
from tests.helpers.records import MakeReport, split

NAMES = (*(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qv"), "lm_head")
SIZE = 4


def draw(groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, UpdateGram]:
    """Questions, success gradients and directions of groups, and their products; a module has ``SIZE`` parameters."""
    rng = np.random.default_rng(seed)
    questions = rng.integers(1, 3, groups).astype(float)
    success, directions = (rng.normal(size=(*shape, SIZE * len(NAMES))) for shape in ((groups,), (groups, 2, 2)))
    cross = np.stack(
        [
            np.einsum("fp,hkcp->fhk", success[:, part], directions[..., part])
            for part in (slice(SIZE * module, SIZE * (module + 1)) for module in range(len(NAMES)))
        ],
        axis=-1,
    )
    gram = gram_of_rows(questions, np.ones((groups, 2)), success, directions)
    return questions, success, directions, replace(gram, modules=ModuleProducts(NAMES, cross))


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    return replace(make_report(split), nodes=(), updates=(UpdateRecord(draw(6)[3]),))


def test_a_module_s_contribution_is_that_of_its_gradients_whichever_groups_count() -> None:
    questions, success, directions, gram = draw(7)
    estimator = module_contribution([gram], 1, np.eye(len(NAMES))[2])
    part = slice(2 * SIZE, 3 * SIZE)
    whole = directions[:, 1].sum(axis=1)
    for kept in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6], [1, 4, 5], [2, 6]):
        total = sum(
            success[[g for g in kept if g != own], part].sum(0)
            / questions[[g for g in kept if g != own]].sum()
            @ whole[own, part]
            for own in kept
        )
        chosen = np.isin(np.arange(7), kept).astype(float)
        expected = total / np.linalg.norm(whole[kept].sum(0))
        assert float(estimator.statistic(chosen)) == pytest.approx(expected, rel=1e-10)


def test_layers_kinds_and_modules_add_up_to_1e_9(report: ProbeReport) -> None:
    found = module_contributions(report)
    assert found is not None
    assert [part.split for part in found.layers] == ["no layer", "layer 0", "layer 1", "layer 2"]
    assert [part.split for part in found.kinds] == ["module q_proj", "module v_proj", "module lm_head"]
    assert [part.split for part in found.modules] == list(NAMES)
    grams = [update.gram for update in report.updates]
    for teacher in range(2):
        whole = float(update_contribution(grams, teacher, (1, 1)).statistic(np.ones(6)))
        for parts in (found.layers, found.kinds, found.modules):
            assert sum(part.estimates[teacher].value for part in parts) == pytest.approx(whole, abs=1e-9)
    estimate = found.layers[1].estimates[0]
    assert estimate.low < estimate.value < estimate.high
    assert estimate.questions == 6


def test_of_all_modules_the_interval_is_that_of_the_whole(report: ProbeReport) -> None:
    from odp_callbacks.analysis.jackknife import jackknife

    grams = [update.gram for update in report.updates]
    of_all = jackknife(module_contribution(grams, 0, np.ones(len(NAMES))))
    whole = jackknife(update_contribution(grams, 0, (1, 1)))
    np.testing.assert_allclose([of_all.value, of_all.low, of_all.high], [whole.value, whole.low, whole.high])


def test_the_table_has_them_and_they_are_stored(report: ProbeReport, tmp_path: object) -> None:
    table = report.to_pandas().query("figure == 'contribution'")
    assert set(table.split) == {part.split for part in module_contributions(report) or ()}
    loaded = load(save(report, f"{tmp_path}/record"))
    again = loaded.to_pandas().query("figure == 'contribution'")
    np.testing.assert_array_equal(again.value, table.value)
    preconditioned = replace(report, settings={"geometry": "adam"})
    both = replace(report, preconditioned=preconditioned).to_pandas().query("figure == 'contribution'")
    assert both.geometry.value_counts().to_dict() == {"euclidean": len(table), "adam": len(table)}


def test_records_without_them_have_no_such_rows(report: ProbeReport, tmp_path: object) -> None:
    """As those that were written before contributions by module were measured."""
    before = replace(report, updates=(UpdateRecord(replace(report.updates[0].gram, modules=None)),))
    loaded = load(save(before, f"{tmp_path}/record"))
    assert loaded.updates[0].gram.modules is None
    assert Analysis(loaded).module_contributions is None
    assert "contribution" not in set(loaded.to_pandas().figure)
    assert Analysis(concatenate([report, loaded])).module_contributions is None
    with pytest.raises(ValueError, match="`grams` has no products by module"):
        module_contribution([loaded.updates[0].gram], 0, np.ones(7))


def test_records_whose_modules_do_not_fit_are_refused(report: ProbeReport, tmp_path: object) -> None:
    (update,) = report.updates
    assert update.gram.modules is not None
    modules = replace(update.gram.modules, names=NAMES[1:])
    damaged = replace(report, updates=(replace(update, gram=replace(update.gram, modules=modules)),))
    with pytest.raises(DamagedRecordsError, match="for 6 modules"):
        load(save(damaged, f"{tmp_path}/record"))


def test_several_measurements_are_pooled_by_their_questions(report: ProbeReport) -> None:
    other = replace(report, updates=(UpdateRecord(draw(5, seed=1)[3]),))
    both = concatenate([report, other])
    found = module_contributions(both)
    assert found is not None
    whole = Analysis(both).summaries()[0].figures["update_contribution"]
    assert sum(part.estimates[0].value for part in found.modules) == pytest.approx(whole.value, abs=1e-9)
