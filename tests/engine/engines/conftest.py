"""A real vLLM server for the tests marked ``vllm``."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.vllm import RunningServer, running_server, save_base, vllm_python


@pytest.fixture(scope="session")
def vllm_interpreter() -> Path:
    """The Python that has vLLM."""
    return vllm_python()


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the base that vLLM serves, with a tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def vllm_server(
    vllm_interpreter: Path, served_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A vLLM server that loads adapters."""
    with running_server(vllm_interpreter, served_base, tmp_path_factory.mktemp("server")) as server:
        yield server
