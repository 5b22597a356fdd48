"""Engines in tests: the student's own sampler behind the interface of an engine, and servers that fail."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import torch
from torch import nn

from odp_callbacks.engine.deadline import Clock, Deadline
from odp_callbacks.engine.engines import EngineSample
from odp_callbacks.engine.engines.interface import UNFINISHED
from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.functional.policies import token_log_probs


class OwnSampler:
    """An engine that samples with a model as probes do; with the same seed it samples the same tokens.

    Args:
        clock: Tells when the time is up.

    Attributes:
        calls: Number of prompts in each call.
        synced: The student's weights at each sync.
        released: How often it was released.
    """

    name, tolerance = "own sampler", 0.05

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock, self.calls, self.synced, self.released = clock, list[int](), list[dict[str, torch.Tensor]](), 0
        self.student: Any = None

    def sync(self, student: nn.Module, step: int) -> None:
        self.student = student
        self.synced.append({name: weight.detach().clone() for name, weight in student.state_dict().items()})

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        seeds: Sequence[int],
        temperature: float,
        stop_token_ids: Sequence[int],
        seconds: float | None = None,
    ) -> list[EngineSample]:
        self.calls.append(len(prompts))
        sequences = [torch.tensor(prompt) for prompt in prompts]
        requests = [
            ContinuationRequest(index, len(prompt) - 1, prompt[-1], limit)
            for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        prefilled = prefill_rollouts(self.student, [s[:-1] for s in sequences], max_new_tokens=max(max_tokens))
        sampled = sample_continuations(
            self.student,
            prefilled,
            requests,
            temperature=temperature,
            eos_token_ids=stop_token_ids,
            keys=seeds,
            batch_size=64,
            deadline=None if seconds is None else Deadline(seconds, self.clock),
        )
        samples = []
        for sequence, continuation in zip(sequences, sampled, strict=True):
            if continuation.unfinished:
                samples.append(UNFINISHED)
                continue
            whole = torch.cat([sequence, torch.tensor(continuation.tokens)])
            (logits,) = node_logits(self.student, [whole[:-1]], [range(len(sequence) - 1, len(whole) - 1)])
            log_probs = token_log_probs(logits, whole[len(sequence) :], 1.0)
            reason = "length" if continuation.truncated else "stop"
            samples.append(EngineSample(continuation.tokens, tuple(log_probs.tolist()), reason))
        return samples

    def release(self) -> None:
        self.released += 1


Answer = Callable[[str, dict[str, Any]], bytes | tuple[int, bytes] | None]
"""From path and body of a request to the answer, with a status if it is not 200; b"" hangs up, None never answers."""


@contextmanager
def serving(answer: Answer, on_headers: Callable[[Any], object] = lambda headers: None) -> Iterator[str]:
    """A server on this machine that answers as it is told; yields its address."""
    is_over = Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            on_headers(self.headers)
            answered = answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if not answered:
                self.close_connection = True
                if answered is None:
                    is_over.wait(30)
                return
            status, content = answered if isinstance(answered, tuple) else (200, answered)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
