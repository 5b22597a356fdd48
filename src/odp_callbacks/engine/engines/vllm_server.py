"""A vLLM server as the engine: the adapter of the moment is loaded there for each probe."""

import os
import re
from collections.abc import Sequence

from torch import nn
from typing_extensions import Unpack

from odp_callbacks.engine.engines.completions_client import CompletionsClient
from odp_callbacks.engine.engines.interface import TOLERANCE, EngineError, EngineSample, SamplingOptions
from odp_callbacks.engine.engines.saved_adapter import NamedAdapter, adapter_in_use

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable that holds the key of the server, the same that vLLM reads."""


class VllmServer:
    """Samples with a vLLM server that serves the student's base and loads adapters at run time.

    The server is started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``. For every probe, the
    adapter is saved in a new folder, which the server must be able to read, and loaded under a new name, by which the
    server keys its cache of prefixes.

    Args:
        url: Of the server, such as ``http://localhost:8000``.
        timeout: Seconds without any answer after which the server counts as hanging.
        tolerance: Mean absolute difference between its log-probabilities and the student's, in nats, above which a
            probe refuses it.
        concurrency: The largest number of requests that are sent at a time.
        folder: Where adapters are saved, a folder that this machine and the server share; None for the temporary
            folder.
        api_key: Of the server; None for that of the environment variable ``VLLM_API_KEY``, if there is one.

    Attributes:
        name: The address, without a password.

    Raises:
        ValueError: If the address or an option cannot be used.

    Examples:
        >>> VllmServer("http://user:password@localhost:8000/v1", timeout=600).name
        'http://localhost:8000'
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        tolerance: float = TOLERANCE,
        concurrency: int = 128,
        folder: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
    ) -> None:
        api_key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
        self.client = CompletionsClient(url, api_key=api_key, timeout=timeout, concurrency=concurrency)
        self.name = self.client.name
        self.tolerance = tolerance
        self.folder = None if folder is None else os.fspath(folder)
        self._adapter: NamedAdapter | None = None
        self._is_loaded = self._is_base = False

    def __repr__(self) -> str:
        """The address alone: records keep it, and a key must not be in there."""
        return f"VllmServer({self.name!r})"

    def sync(self, student: nn.Module, step: int) -> None:
        """Save the student's adapter, and load it under a new name; the one before is unloaded.

        A model that computes without an adapter is the one that the server serves.
        """
        self.release()
        if adapter_in_use(student) is None:
            self._is_base = True
            return
        self._adapter = adapter = NamedAdapter(student, step, self.folder)
        adapter.path.chmod(0o755)  # the server may run as another user
        try:
            self.client.post("/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.path)})
        except EngineError as error:
            if not error.is_refusal:
                raise
            message = re.sub(r"\S*odp-callbacks-\S+", "…", str(error))  # or each probe would say something else
            raise EngineError(
                f"{message} To load the student's adapter, start the server with `--enable-lora`, a `--max-lora-rank` "
                "that is large enough, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read "
                f"{adapter.path.parent}."
            ) from error
        self._is_loaded = True

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt from the adapter that was loaded last."""
        if self._is_base:
            return self.client.sample(None, prompts, **options)
        if self._adapter is None or not self._is_loaded:
            raise EngineError(f"`engine` ({self.name}) has no adapter; call `sync` first.")
        return self.client.sample(self._adapter.name, prompts, **options)

    def release(self) -> None:
        """Unload the adapter, and remove its folder; a server that is gone has nothing to unload."""
        adapter, was_loaded = self._adapter, self._is_loaded
        self._adapter, self._is_loaded, self._is_base = None, False, False
        if adapter is None:
            return
        try:
            if was_loaded:
                self.client.post("/v1/unload_lora_adapter", {"lora_name": adapter.name})
        except EngineError:
            pass  # what made the server fail was said before, or will be at the next probe
        finally:
            adapter.remove()
