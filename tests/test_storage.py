"""Records on disk: everything comes back, pandas reads them, nothing is half written, and older versions are read."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from odp_callbacks import Teacher, diagnose
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.records import NodeRecord, ProbeReport
from odp_callbacks.storage import concatenate, load, pool, save, schema
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.records import example_report

ROWS = [
    {"prompt": prompt, "answer": answer} for prompt, answer in zip(("a b", "d", "c", "e f", "b"), "cabda", strict=True)
]
STORED_RECORDS = Path(__file__).parent / "data" / "records"
"""A folder for each version of the format, saved from ``example_report()`` by the code that wrote that version."""
FINGERPRINTS = {
    "version-1-first": "efd524aea3622c0e",
    "version-1": "37e4ab0443e672b5",
    "version-2": "7ad5a29a432cc954",
    "version-3": "7a24a0d5f20b96d3",
}
"""Fingerprint of the columns, metadata and files of each version."""


def run_probe(seed: int = 0, rows: list[dict[str, str]] = ROWS, **config: Any) -> ProbeReport:
    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        return [float(expected in completion) for completion, expected in zip(completions, answer, strict=True)]

    teachers = {"answer": Teacher("{answer} {prompt}"), "base": "base"}
    options = {"max_new_tokens": 8, "continuations": 4, "rollouts_per_question": 2, **config}
    return diagnose(tiny().float(), word_tokenizer(), rows, reward, teachers, seed=seed, **options)


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return run_probe()


def untimed_scalars(report: ProbeReport) -> dict[str, float]:
    return {name: value for name, value in scalars(report).items() if "seconds" not in name}


def assert_same_node(actual: NodeRecord, expected: NodeRecord) -> None:
    for field in fields(actual):
        value, expected_value = getattr(actual, field.name), getattr(expected, field.name)
        if field.name == "gram":
            scale = np.abs(expected_value).max()
            np.testing.assert_allclose(value.sum(axis=0), expected_value.sum(axis=0), rtol=1e-12, atol=1e-12 * scale)
            np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-5 * scale)
        elif field.name == "logit_gram":
            np.testing.assert_allclose(value, expected_value, rtol=1e-12, atol=1e-14)
        elif field.name == "predictors":
            assert set(value) == set(expected_value)
            for name in value:
                np.testing.assert_array_equal(value[name], expected_value[name])
        else:
            np.testing.assert_array_equal(value, expected_value)


@pytest.mark.parametrize("kind", ["full", "update", "empty"])
def test_everything_comes_back(tmp_path: Path, report: ProbeReport, kind: str) -> None:
    saved = {
        "full": lambda: report,
        "update": lambda: run_probe(budget=0),
        "empty": lambda: replace(report, nodes=(), rollouts=(), step=None),
    }[kind]()
    loaded = load(save(saved, tmp_path / "run" / "probe"))
    assert (loaded.teachers, loaded.modules, loaded.rollouts) == (saved.teachers, saved.modules, saved.rollouts)
    assert loaded.settings == {
        name: list(value) if isinstance(value, tuple) else value for name, value in saved.settings.items()
    }
    assert (loaded.stage_seconds, loaded.generated_tokens) == (saved.stage_seconds, saved.generated_tokens)
    for loaded_node, saved_node in zip(loaded.nodes, saved.nodes, strict=True):
        assert_same_node(loaded_node, saved_node)
    assert untimed_scalars(loaded) == pytest.approx(untimed_scalars(saved), rel=1e-6, abs=1e-9, nan_ok=True)


def test_records_of_before_and_after_a_predictor_are_kept_together(tmp_path: Path, report: ProbeReport) -> None:
    before = replace(
        report,
        nodes=tuple(
            replace(node, predictors={k: v for k, v in node.predictors.items() if k != "top_k_overlap"})
            for node in report.nodes
        ),
    )
    both = load(save(concatenate([before, report]), tmp_path / "both"))
    count = len(report.nodes)
    assert all(np.isnan(node.predictors["top_k_overlap"]).all() for node in both.nodes[:count])
    for loaded_node, saved_node in zip(both.nodes[count:], report.nodes, strict=True):
        assert_same_node(replace(loaded_node, rollout=saved_node.rollout), saved_node)
    assert "odp/top_k_overlap/answer/all" not in scalars(before)
    assert scalars(both)["odp/top_k_overlap/answer/all"] == scalars(report)["odp/top_k_overlap/answer/all"]


def test_pandas_reads_the_tables(tmp_path: Path, report: ProbeReport) -> None:
    folder = save(report, tmp_path / "probe")
    nodes = pd.read_parquet(folder / "nodes.parquet")
    assert len(nodes) == len(report.nodes)
    assert nodes.groupby("correct").size().sum() == len(report.nodes)
    assert list(nodes["count"][0]) == list(report.nodes[0].count)
    rewards = pd.read_parquet(folder / "rollouts.parquet")["reward"]
    assert list(rewards) == [rollout.reward for rollout in report.rollouts]


def test_records_are_small(tmp_path: Path, report: ProbeReport) -> None:
    folder = save(report, tmp_path / "probe")
    branches = sum(len(node.tokens) for node in report.nodes)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1000 * branches


def test_nothing_is_half_written_and_nothing_replaced_unasked(
    tmp_path: Path, report: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(report, tmp_path / "probe")
    with pytest.raises(FileExistsError, match="`folder`"):
        save(report, folder)
    write_table: Callable[..., None] = parquet.write_table

    def fail_on_rollouts(table: Any, path: Path, **options: Any) -> None:
        if "rollouts" in str(path):
            raise OSError("disk full")
        write_table(table, path, **options)

    monkeypatch.setattr(parquet, "write_table", fail_on_rollouts)
    with pytest.raises(OSError, match="disk full"):
        save(run_probe(seed=1), folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
    assert untimed_scalars(load(folder)) == pytest.approx(untimed_scalars(report), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("piece", ["<script>alert(1)</script>", "\x00\x1b[31m", "שלום", "\ud800", "x" * 100_000, ""])
def test_hostile_text_is_text(tmp_path: Path, report: ProbeReport, piece: str) -> None:
    hostile_rollout = replace(report.rollouts[0], pieces=(piece,) * 3, text=piece, prompt=piece)
    hostile_report = replace(report, rollouts=(hostile_rollout, *report.rollouts[1:]))
    rollout = load(save(hostile_report, tmp_path / "p")).rollouts[0]
    assert rollout.text == (piece if piece != "\ud800" else "?")
    assert rollout.pieces == (rollout.text,) * 3


def test_other_files_and_later_versions_are_refused(
    tmp_path: Path, report: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "nodes.parquet")
    with pytest.raises(ValueError, match="holds no records"):
        load(tmp_path)
    monkeypatch.setattr(schema, "VERSION", 99)
    save(report, tmp_path / "later")
    monkeypatch.setattr(schema, "VERSION", 0)
    save(report, tmp_path / "unknown")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has version 99 of the records.* install a newer one"):
        load(tmp_path / "later")
    with pytest.raises(ValueError, match=r"unknown version 0; this release reads 1 to \d, so run the probe again"):
        load(tmp_path / "unknown")


@pytest.mark.parametrize("version", list(FINGERPRINTS))
def test_records_of_every_version_are_read(version: str) -> None:
    """The first files of version 1 had no texts of tokens; ``version-1-first`` has no second geometry either."""
    expected, loaded = example_report(), load(STORED_RECORDS / version)
    first = version == "version-1-first"
    assert (loaded.teachers, loaded.modules, loaded.rollouts) == (
        expected.teachers,
        expected.modules,
        expected.rollouts,
    )
    assert (loaded.settings, loaded.stage_seconds) == (expected.settings, expected.stage_seconds)
    assert (loaded.generated_tokens, loaded.continuations) == (expected.generated_tokens, expected.continuations)
    assert loaded.truncated == expected.truncated
    assert loaded.token_text == ({} if first else expected.token_text)
    assert loaded.step is not None
    assert expected.step is not None
    assert (loaded.step.question, loaded.step.correct) == (expected.step.question, expected.step.correct)
    np.testing.assert_array_equal(loaded.step.gram, expected.step.gram)
    for loaded_node, expected_node in zip(loaded.nodes, expected.nodes, strict=True):
        assert_same_node(loaded_node, expected_node)
    assert (loaded.preconditioned is None) == first
    if loaded.preconditioned is not None and expected.preconditioned is not None:
        assert loaded.preconditioned.settings == expected.preconditioned.settings
        for loaded_node, expected_node in zip(loaded.preconditioned.nodes, expected.preconditioned.nodes, strict=True):
            assert_same_node(loaded_node, expected_node)


def columns_of(table_schema: pa.Schema) -> list[tuple[str, str]]:
    """Names and types of the columns; what the elements of a list are called depends on the version of pyarrow."""
    return [(field.name, re.sub(r"<\w+: ", "<", str(field.type))) for field in table_schema]


def format_of(folder: Path) -> dict[str, Any]:
    """Files, columns and entries of the metadata of stored records."""
    nodes = parquet.read_schema(folder / "nodes.parquet")
    metadata = json.loads(nodes.metadata[schema.METADATA_KEY])
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "nodes": columns_of(nodes),
        "rollouts": columns_of(parquet.read_schema(folder / "rollouts.parquet")),
        "metadata": sorted(metadata),
        "step": sorted(metadata["step"]),
        "version": metadata["version"],
    }


def fingerprint(folder: Path) -> str:
    return hashlib.sha256(json.dumps(format_of(folder), sort_keys=True).encode()).hexdigest()[:16]


def test_a_change_of_the_format_raises_its_version(tmp_path: Path) -> None:
    """If this fails, raise ``VERSION`` in storage/schema.py, let storage/reading.py read the version before, save
    ``example_report()`` to tests/data/records/version-<VERSION> and add its fingerprint; never change an old one."""
    current = f"version-{schema.VERSION}"
    assert current in FINGERPRINTS
    written = save(example_report(), tmp_path / "records")
    assert format_of(written) == format_of(STORED_RECORDS / current)
    assert {version: fingerprint(STORED_RECORDS / version) for version in FINGERPRINTS} == FINGERPRINTS
    assert {folder.name for folder in STORED_RECORDS.iterdir()} == set(FINGERPRINTS)


def test_the_records_of_the_benchmark_are_read() -> None:
    """They are of version 1, from before the texts of tokens were stored."""
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "heavy"
    assert len(load(folder).nodes) == 66


def test_probes_put_together_are_one(report: ProbeReport) -> None:
    other = run_probe(seed=5)
    both = concatenate([report, other])
    assert len(both.nodes) == len(report.nodes) + len(other.nodes)
    assert [both.rollouts[node.rollout].question for node in both.nodes] == [node.question for node in both.nodes]
    assert both.generated_tokens["rollouts"] == sum(part.generated_tokens["rollouts"] for part in (report, other))
    assert scalars(both)["odp/questions/answer/all"] == 5, "the same questions are the same clusters"
    assert concatenate([report]).step is report.step
    with pytest.raises(ValueError, match="the same teachers"):
        concatenate([report, replace(other, teachers=("a", "b"))])
    with pytest.raises(ValueError, match="empty"):
        concatenate([])


def test_continuations_of_the_same_nodes_add_up(report: ProbeReport) -> None:
    doubled = pool([report, report])
    for pooled, single in zip(doubled.nodes, report.nodes, strict=True):
        np.testing.assert_array_equal(pooled.count, np.where(single.exact, 1, 2 * single.count))
        np.testing.assert_allclose(pooled.total / pooled.count, single.total / single.count)
    before, after = (scalars(part)["odp/undetermined_share/answer/all"] for part in (report, doubled))
    assert before == after
    with pytest.raises(ValueError, match="the same nodes"):
        pool([report, run_probe(seed=5)])
