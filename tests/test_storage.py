"""Records on disk: everything comes back, pandas reads them, and nothing is ever half written."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from odp_callbacks import Teacher, diagnose, storage
from odp_callbacks.analysis.summaries import scalars
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate, load, pool, save
from tests.helpers.models import tiny, word_tokenizer

ROWS = [{"prompt": p, "answer": a} for p, a in zip(("a b", "d", "c", "e f", "b"), "cabda", strict=True)]


def measure(seed=0, rows=ROWS, **config):
    def reward(prompts, completions, answer):
        return [float(a in c) for c, a in zip(completions, answer, strict=True)]

    teachers = {"answer": Teacher("{answer} {prompt}"), "base": "base"}
    options = {"max_new_tokens": 8, "continuations": 4, "rollouts_per_question": 2, **config}
    return diagnose(tiny().float(), word_tokenizer(), rows, reward, teachers, seed=seed, **options)


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return measure()


def logged(report):
    return {name: value for name, value in scalars(report).items() if "seconds" not in name}


@pytest.mark.parametrize("kind", ["full", "free", "empty"])
def test_everything_comes_back(tmp_path, report, kind):
    given = {"full": report, "free": measure(budget=0), "empty": replace(report, nodes=(), rollouts=(), step=None)}[
        kind
    ]
    found = load(save(given, tmp_path / "run" / "probe"))
    assert (found.teachers, found.modules, found.rollouts) == (given.teachers, given.modules, given.rollouts)
    assert found.settings == {k: list(v) if isinstance(v, tuple) else v for k, v in given.settings.items()}
    assert (found.seconds, found.generated_tokens) == (given.seconds, given.generated_tokens)
    for x, y in zip(found.nodes, given.nodes, strict=True):
        for f in fields(x):
            a, b = getattr(x, f.name), getattr(y, f.name)
            if f.name == "gram":
                np.testing.assert_allclose(a.sum(axis=0), b.sum(axis=0), rtol=1e-12, atol=1e-12 * np.abs(b).max())
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
            elif f.name == "logit_gram":
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
            elif f.name == "predictors":
                assert set(a) == set(b)
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name])
            else:
                np.testing.assert_array_equal(a, b)
    assert logged(found) == pytest.approx(logged(given), rel=1e-6, abs=1e-9, nan_ok=True)


def test_pandas_reads_it(tmp_path, report):
    path = save(report, tmp_path / "probe")
    frame = pd.read_parquet(path / "nodes.parquet")
    assert len(frame) == len(report.nodes)
    assert frame.groupby("correct").size().sum() == len(report.nodes)
    assert list(frame["count"][0]) == list(report.nodes[0].count)
    assert list(pd.read_parquet(path / "rollouts.parquet")["reward"]) == [r.reward for r in report.rollouts]


def test_it_is_small(tmp_path, report):
    path = save(report, tmp_path / "probe")
    assert sum(f.stat().st_size for f in path.iterdir()) < 4000 * len(report.nodes)


def test_nothing_is_half_written_and_nothing_replaced_unasked(tmp_path, report, monkeypatch):
    path = save(report, tmp_path / "probe")
    with pytest.raises(FileExistsError, match="`folder`"):
        save(report, path)

    def fail(*arguments, **options):
        raise OSError("disk full")

    write = parquet.write_table
    monkeypatch.setattr(
        storage.parquet, "write_table", lambda t, p, **o: fail() if "rollouts" in str(p) else write(t, p, **o)
    )
    with pytest.raises(OSError, match="disk full"):
        save(measure(seed=1), path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["probe"]
    assert logged(load(path)) == pytest.approx(logged(report), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("piece", ["<script>alert(1)</script>", "\x00\x1b[31m", "שלום", "\ud800", "x" * 100_000, ""])
def test_hostile_text_is_text(tmp_path, report, piece):
    rollout = replace(report.rollouts[0], pieces=(piece,) * 3, text=piece, prompt=piece)
    found = load(save(replace(report, rollouts=(rollout, *report.rollouts[1:])), tmp_path / "p")).rollouts[0]
    assert found.text == (piece if piece != "\ud800" else "?")
    assert found.pieces == (found.text,) * 3


def test_other_files_and_later_versions_are_refused(tmp_path, report, monkeypatch):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "nodes.parquet")
    with pytest.raises(ValueError, match="holds no records"):
        load(tmp_path)
    monkeypatch.setattr(storage, "VERSION", 99)
    save(report, tmp_path / "later")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 99"):
        load(tmp_path / "later")


def test_probes_put_together_are_one(report):
    other = measure(seed=5)
    both = concatenate([report, other])
    assert len(both.nodes) == len(report.nodes) + len(other.nodes)
    assert [both.rollouts[n.rollout].question for n in both.nodes] == [n.question for n in both.nodes]
    assert both.generated_tokens["rollouts"] == sum(r.generated_tokens["rollouts"] for r in (report, other))
    found = scalars(both)
    assert found["odp/questions/answer/all"] == 5, "the same questions are the same clusters"
    assert concatenate([report]).step is report.step
    with pytest.raises(ValueError, match="the same teachers"):
        concatenate([report, replace(other, teachers=("a", "b"))])
    with pytest.raises(ValueError, match="empty"):
        concatenate([])


def test_continuations_of_the_same_nodes_add_up(report):
    doubled = pool([report, report])
    for a, b in zip(doubled.nodes, report.nodes, strict=True):
        np.testing.assert_array_equal(a.count, np.where(b.exact, 1, 2 * b.count))
        np.testing.assert_allclose(a.total / a.count, b.total / b.count)
    before, after = (scalars(r)["odp/undetermined_share/answer/all"] for r in (report, doubled))
    assert before == after
    with pytest.raises(ValueError, match="the same nodes"):
        pool([report, measure(seed=5)])
