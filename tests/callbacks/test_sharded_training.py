"""Real ZeRO in two processes over gloo; DDP is in ``test_processes.py``, FSDP2 is in ``test_student_replica.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("deepspeed==0.19.8", "hjson", "py-cpuinfo", "ninja", "msgpack", "einops")
"""In a folder of their own: where DeepSpeed is installed, transformers, trl and accelerate import it everywhere."""


@pytest.fixture(scope="module")
def deepspeed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed, installed from PyPI in some ten seconds."""
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed has no other platform")
def test_zero_trains_the_same_bits_and_measures_the_same_with_and_without_sharded_weights(
    deepspeed_folder: Path,
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "sharded.py"), "--smoke"]
    finished = subprocess.run(
        [*command, "--strategies", "zero2", "zero3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(deepspeed_folder), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    form = r"^(zero2|zero3): replica (\w+), same bits with and without (\w+); .* outcomes (\w+) at .* by ([^;]+);"
    lines = re.findall(form, finished.stdout, re.MULTILINE)
    assert [line[:4] for line in lines] == [("zero2", "False", "True", "equal"), ("zero3", "True", "True", "equal")]
    assert all(float(line[4]) < 1e-6 for line in lines)
