"""The update of a probe: groups, classes, geometry, influences and what a report says of them."""

from typing import Any

import numpy as np
import pandas
import pytest
import torch

from odp_callbacks import BaseTeacher, ProbeReport, Teacher, diagnose
from odp_callbacks.analysis.update_gain import update_contribution, update_gain
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.update import measurement
from odp_callbacks.engine.update.measurement import UpdateMeter
from odp_callbacks.functional import lora_parameters
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.functional.updates import update_gain as gain_of_gradients
from tests.engine.update.test_gradient_rows import make_gradients
from tests.helpers.models import Snapshot, tiny, word_tokenizer

ROWS = [{"prompt": p, "answer": a} for p, a in zip(("a b", "c", "b a d", "d c", "a"), "abcde", strict=True)]
TEACHERS = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0)


def make_rollouts(rewards: tuple[float, ...] = REWARDS) -> list[Rollout]:
    """Two rollouts of each question, of unequal lengths."""
    questions = as_questions(ROWS, word_tokenizer())
    return [
        Rollout(questions[i // 2], tuple(6 + (i + depth) % 6 for depth in range(1 + i % 4)), "", False, reward)
        for i, reward in enumerate(rewards)
    ]


def starts_right(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
    return [float(a in c.split()) for c, a in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    student = tiny().float()
    snapshot = Snapshot(student)
    measured = diagnose(
        student, word_tokenizer(), ROWS, starts_right, TEACHERS, budget=0, rollouts_per_question=6, max_new_tokens=4
    )
    snapshot.check()
    return measured


def test_it_equals_the_gain_of_explicit_gradients() -> None:
    gradients, rollouts = make_gradients(tiny()), make_rollouts()
    record = UpdateMeter(gradients).measure(rollouts, influence=False).record
    question = torch.arange(10) // 2
    advantages = leave_one_out_advantages(torch.tensor(REWARDS, dtype=torch.float64), question) / 2
    rows = torch.stack(
        [
            torch.cat([row.flatten(1) for row in gradients.rows([rollout], [float(advantage)])[0].values()], dim=1)
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]
    )  # (R, 1 + K, P)
    correct = torch.tensor([reward >= 1 for reward in REWARDS])
    by_question = lambda part: torch.stack([part[question == i].sum(0) for i in range(5)])  # noqa: E731
    success = by_question(rows[:, 0])
    for classes, chosen in (((1, 1), correct | True), ((1, 0), correct), ((0, 1), ~correct)):
        direction = by_question(rows[:, 1] * chosen[:, None])
        expected = float(gain_of_gradients(success, direction).mean())
        assert float(update_gain([record.gram], 0, classes).statistic(np.ones(5))) == pytest.approx(expected, rel=1e-4)
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    assert record.gram.tokens.sum(axis=0).tolist() == [int(lengths[correct].sum()), int(lengths[~correct].sum())]


@pytest.mark.parametrize("folds", [2, 3, 4, 5])
def test_influences_add_up_to_the_contribution_to_1e_5(folds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of folds; there are five questions, one group each."""
    monkeypatch.setattr(measurement, "FOLDS", folds)
    record = UpdateMeter(make_gradients(tiny().float())).measure(make_rollouts()).record
    influence = record.influence
    assert influence is not None
    weights = np.where(np.isnan(influence.by_fold), 0.0, influence.fold_questions[:, None, None])
    mean = (weights * np.nan_to_num(influence.by_fold.astype(float))).sum(axis=0) / weights.sum(axis=0)
    correct = np.array([REWARDS[i] >= 1 for i in influence.rollout])
    for classes, chosen in (((1, 1), correct | True), ((1, 0), correct), ((0, 1), ~correct)):
        for teacher in range(2):
            total = float(mean[chosen, teacher].sum() / influence.direction_norm[teacher])
            expected = float(update_contribution([record.gram], teacher, classes).statistic(np.ones(5)))
            assert total == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_influences_are_measured_in_parts_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, sizes = make_gradients(tiny()), []
    own = gradients.influences

    def in_little_memory(rollouts: Any, *arguments: Any) -> torch.Tensor:
        if len(rollouts) > 2:
            raise torch.OutOfMemoryError("too large")
        sizes.append(len(rollouts))
        return own(rollouts, *arguments)

    monkeypatch.setattr(gradients, "influences", in_little_memory)
    monkeypatch.setattr(measurement, "FOLDS", 2)
    with pytest.warns(UserWarning, match="did not fit into memory"):
        parts = UpdateMeter(gradients).measure(make_rollouts()).record.influence
    monkeypatch.setattr(gradients, "influences", own)
    expected = UpdateMeter(gradients).measure(make_rollouts()).record.influence
    assert parts is not None
    assert expected is not None
    assert max(sizes) == 2
    np.testing.assert_allclose(parts.by_fold, expected.by_fold, rtol=1e-5, atol=1e-9)


def test_questions_share_groups_where_memory_is_short() -> None:
    gradients = make_gradients(tiny())
    size = sum(p.numel() for p in lora_parameters(gradients.student).values())
    meter = UpdateMeter(gradients, max_memory_bytes=2 * 4 * size * 5 * 3)
    assert meter._group_count(1000, size * 5) == measurement.MINIMUM_GROUPS
    assert UpdateMeter(gradients)._group_count(1000, size * 5) == measurement.MAXIMUM_GROUPS
    assert UpdateMeter(gradients)._group_count(3, size * 5) == 3


def test_another_geometry_scales_every_gradient() -> None:
    gradients = make_gradients(tiny())
    scales = {name: torch.full(p.shape, 2.0) for name, p in lora_parameters(gradients.student).items()}
    measured = UpdateMeter(gradients).measure(make_rollouts(), influence=False, square_roots=scales)
    assert measured.preconditioned is not None
    np.testing.assert_allclose(measured.preconditioned.cross, 4 * measured.record.gram.cross, rtol=1e-6)


def test_a_diagnosis_without_continuations_measures_the_update_and_no_node(report: ProbeReport) -> None:
    assert report.nodes == ()
    assert report.continuations == 0
    figures = report.to_pandas()
    assert list(figures.columns[:6]) == ["teacher", "split", "figure", "value", "low", "high"]
    gains = figures[figures.figure == "update_gain"].set_index(["teacher", "split"])
    assert set(gains.index) == {
        (teacher, split)
        for teacher in ("answer", "base")
        for split in ("all", "correct", "incorrect", "incorrect-correct")
    } | {("answer - base", split) for split in ("all", "correct", "incorrect")}
    answer = gains.loc[("answer", "all")]
    assert answer.low < answer.value < answer.high
    difference = gains.loc[("answer - base", "all")]
    assert difference.value == pytest.approx(answer.value - gains.loc[("base", "all")].value)


def test_every_response_token_has_a_row(report: ProbeReport) -> None:
    tokens = report.tokens()
    assert len(tokens) == sum(len(rollout.pieces) for rollout in report.rollouts)
    assert list(tokens.columns[:5]) == ["question", "rollout", "depth", "text", "reward"]
    assert (tokens.influence_answer_low < tokens.influence_answer).all()
    assert (tokens.influence_answer < tokens.influence_answer_high).all()
    first = tokens[tokens.rollout == 3]
    assert first.depth.tolist() == list(range(len(report.rollouts[3].pieces)))
    assert first.text.tolist() == list(report.rollouts[3].pieces)


def test_it_is_saved_and_merged(report: ProbeReport, tmp_path: Any) -> None:
    from odp_callbacks.storage import concatenate

    loaded = ProbeReport.load(report.save(tmp_path / "probe"))
    pandas.testing.assert_frame_equal(loaded.to_pandas(), report.to_pandas(), rtol=1e-12)
    pandas.testing.assert_frame_equal(loaded.tokens(), report.tokens(), rtol=1e-12)
    both = concatenate([report, loaded])
    assert len(both.updates) == 2
    once, twice = (r.to_pandas().query("figure == 'update_gain' and split == 'all'") for r in (report, both))
    assert twice.value.tolist() == pytest.approx(once.value.tolist())
    tokens = both.tokens()
    assert tokens.influence_answer[: len(tokens) // 2].tolist() == tokens.influence_answer[len(tokens) // 2 :].tolist()


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2]])
def test_few_questions_give_a_value_or_a_reason(rows: list[dict[str, str]]) -> None:
    measured = diagnose(
        tiny().float(), word_tokenizer(), rows, starts_right, {"base": "base"}, budget=0, max_new_tokens=3
    )
    (row,) = measured.to_pandas().query("figure == 'update_gain' and split == 'all'").itertuples()
    assert row.note == ("one question" if len(rows) == 1 else "2 questions")
    assert np.isnan(row.value) == (len(rows) == 1)


def test_one_rollout_a_question_is_compared_with_the_other_questions() -> None:
    measured = diagnose(
        tiny().float(), word_tokenizer(), ROWS, starts_right, {"base": "base"},
        budget=0, rollouts_per_question=1, max_new_tokens=4, seed=1,
    )  # fmt: skip
    assert {rollout.reward for rollout in measured.rollouts} == {0.0, 1.0}
    (row,) = measured.to_pandas().query("figure == 'update_gain' and split == 'all'").itertuples()
    assert row.low < row.value < row.high


def test_modules_add_up_to_the_whole_in_both_geometries() -> None:
    gradients = make_gradients(tiny())
    scales = {name: torch.rand(p.shape).double() for name, p in lora_parameters(gradients.student).items()}
    measured = UpdateMeter(gradients).measure(make_rollouts(), influence=False, square_roots=scales)
    assert measured.preconditioned is not None
    for gram in (measured.record.gram, measured.preconditioned):
        assert gram.modules is not None
        assert len(gram.modules.names) == 6
        scale = np.abs(gram.modules.cross).max()
        np.testing.assert_allclose(gram.modules.cross.sum(-1), gram.cross.sum(-1), rtol=0, atol=1e-9 * scale)
