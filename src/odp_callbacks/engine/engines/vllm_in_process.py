"""A ``vllm.LLM`` in this process as the engine."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from typing_extensions import Unpack

from odp_callbacks.engine.engines.interface import TOLERANCE, UNFINISHED, EngineError, EngineSample, SamplingOptions
from odp_callbacks.engine.engines.saved_adapter import NamedAdapter, adapter_in_use


class VllmInProcess:
    """Samples with a ``vllm.LLM`` that holds the student's base and was made with ``enable_lora=True``.

    Args:
        llm: The ``vllm.LLM``.
        tolerance: Mean absolute difference between its log-probabilities and the student's, in nats, above which a
            probe refuses it.

    Attributes:
        name: ``"vllm.LLM"``.
        is_colocated: It is on the student's device.
    """

    is_colocated = True

    def __init__(self, llm: Any, *, tolerance: float = TOLERANCE) -> None:
        self.llm, self.tolerance = llm, tolerance
        self.name = "vllm.LLM"
        self._adapter: Any = None
        self._is_base = False
        self._saved: NamedAdapter | None = None
        self._count = 0

    def sync(self, student: nn.Module, step: int) -> None:
        """Save the student's adapter; the engine loads it under a new name with the first request.

        A model that computes without an adapter is the engine's own.
        """
        self.release()
        if adapter_in_use(student) is None:
            self._is_base = True
            return
        from vllm.lora.request import LoRARequest

        self._count += 1
        self._saved = NamedAdapter(student, step)
        # vLLM tells adapters apart by their numbers, too; the user's own ones are small.
        self._adapter = LoRARequest(self._saved.name, 10**6 + self._count, str(self._saved.path))
        with failing_as_engine_error(self.name, "to load the student's adapter"):
            self.llm.llm_engine.add_lora(self._adapter)

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt from the adapter that was saved last."""
        if self._adapter is None and not self._is_base:
            raise EngineError(f"`engine` ({self.name}) has no adapter; call `sync` first.")
        return sample_with_llm(self.llm, self.name, self._adapter, prompts, **options)

    def release(self) -> None:
        """Unload the adapter, and remove its folder."""
        adapter, self._adapter, self._is_base = self._adapter, None, False
        saved, self._saved = self._saved, None
        with suppress(Exception):  # what made the engine fail was said before, or will be at the next probe
            if adapter is not None:
                self.llm.llm_engine.remove_lora(adapter.lora_int_id)
        if saved is not None:
            saved.remove()


def sample_with_llm(
    llm: Any,
    name: str,
    adapter: Any,
    prompts: Sequence[Sequence[int]],
    **options: Unpack[SamplingOptions],
) -> list[EngineSample]:
    """Sample one response to each prompt with a ``vllm.LLM``.

    The engine's steps are made here, so that requests can be given up between two of them.

    Args:
        llm: The ``vllm.LLM``.
        name: What messages call it.
        adapter: The ``LoRARequest`` of all requests; None for the model as it is.
        prompts: Token ids.
        **options: How to sample.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    seconds = options.get("seconds")
    end = float("inf") if seconds is None else time.monotonic() + seconds
    engine, run = llm.llm_engine, uuid.uuid4().hex[:12]
    names = [f"odp-callbacks-{run}-{number}" for number in range(len(prompts))]
    samples: dict[str, EngineSample] = {}
    with failing_as_engine_error(name, "to sample"):
        try:
            each = zip(names, prompts, options["max_tokens"], options["seeds"], strict=True)
            for request, prompt, limit, seed in each:
                parameters = SamplingParams(
                    max_tokens=limit,
                    seed=seed,
                    temperature=options["temperature"],
                    stop_token_ids=list(options["stop_token_ids"]),
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(request, {"prompt_token_ids": list(prompt)}, parameters, lora_request=adapter)
            while len(samples) < len(names) and time.monotonic() < end:
                for output in engine.step():
                    if output.finished and output.request_id in names:
                        samples[output.request_id] = _read_output(output.outputs[0])
        finally:
            if unfinished := [request for request in names if request not in samples]:
                engine.abort_request(unfinished)
    return [samples.get(request, UNFINISHED) for request in names]


def _read_output(output: Any) -> EngineSample:
    """The sample in one output of vLLM."""
    tokens = tuple(int(token) for token in output.token_ids)
    log_probabilities = tuple(
        float(of_position[token].logprob) for token, of_position in zip(tokens, output.logprobs, strict=True)
    )
    return EngineSample(tokens, log_probabilities, output.finish_reason)


@contextmanager
def failing_as_engine_error(name: str, purpose: str) -> Iterator[None]:
    """Turn what an engine in this process raises into an :class:`EngineError`, which says what was asked of it."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"`engine` ({name}) failed {purpose}: {type(error).__name__}: {error}") from error
