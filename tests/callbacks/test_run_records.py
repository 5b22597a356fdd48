"""Records of a run: what cannot be saved is refused before training, and two runs are never shown as one."""

import shutil
from pathlib import Path

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.cli.saved_records import load_reports
from odp_callbacks.storage import RUN_SETTING
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.monitors import RecordingTrainer, make_monitor, run_steps


@pytest.mark.parametrize("records", ["s3://bucket/records", "memory://records", Path("gs://bucket/records")])
def test_a_url_is_refused_when_the_callback_is_made(
    records: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder `s3:` came into being, and the first probe failed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`records` is .*only local paths are supported"):
        make_monitor(records=records)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for records in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"`records` is .*file' is a file; give a folder"):
            run_steps(make_monitor(records=records, strict=False), 1)


def test_two_runs_in_one_folder_are_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    assert not run_steps(make_monitor(records=records), 4).warnings
    assert len(load_reports([str(records)])) == 2
    trainer = run_steps(make_monitor(records=records), 2)
    assert [warning for warning in trainer.warnings if "another run has saved its probes" in warning]
    assert main(["report", str(records), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert "holds the probes of 2 runs (step-00000002; step-00000004). Name the folders of one of them." in error
    steps = [str(records / f"step-0000000{step}") for step in (2, 4)]
    assert main(["compare", *steps]) == 0
    assert len(load_reports(steps)) == 2, "whoever names them one by one wants them together"
    assert main(["compare", str(records), steps[0]]) == 2


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    records = tmp_path / "records"
    first = make_monitor(records=records)
    run_steps(first, 2)
    resumed, trainer = make_monitor(records=records), RecordingTrainer()
    resumed.prepare(tiny("llama").float().train(), word_tokenizer())
    resumed.load_state_dict(first.state_dict())
    resumed.on_train_start(trainer.context(2))
    for step in (3, 4):
        resumed.on_batch_end(trainer.context(step))
    assert not trainer.warnings
    runs = {report.settings[RUN_SETTING] for _, report in load_reports([str(records)])}
    assert len(runs) == 1


def test_what_cannot_be_read_in_the_folder_does_not_stop_a_run(tmp_path: Path) -> None:
    records = tmp_path / "records"
    run_steps(make_monitor(records=records), 2)
    for name in ("damaged", "other"):
        shutil.copytree(records / "step-00000002", records / name)
    (records / "damaged" / "nodes.parquet").write_bytes(b"PAR1")
    (records / "other" / "nodes.parquet").unlink()
    assert any("another run" in warning for warning in run_steps(make_monitor(records=records), 2).warnings)
