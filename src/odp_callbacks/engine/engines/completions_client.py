"""Completions with token ids from an OpenAI-compatible server, many at a time, over HTTP."""

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from typing_extensions import Unpack

from odp_callbacks.engine.engines.interface import UNFINISHED, EngineError, EngineSample, SamplingOptions, nonsense

CONNECTION_SECONDS = 10.0
"""Seconds after which a server that cannot be reached counts as gone."""
MAXIMUM_BYTES = 2**26
"""Bytes of an answer, at most; a longer one is none."""
UNCHANGED_POLICY = {
    "n": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Options without which a server applies those of the model's ``generation_config.json``."""
ANSWER_OPTIONS = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True, "skip_special_tokens": False}
"""Options for answers with token ids, in which nothing ends a response but the stop tokens of the request."""


def is_address(value: object) -> TypeGuard[str]:
    """Whether an option is the address of a server.

    Examples:
        >>> is_address("http://localhost:8000"), is_address("localhost:8000")
        (True, False)
    """
    return isinstance(value, str) and value.startswith(("http://", "https://"))


class CompletionsClient:
    """Sends requests to a server, and gives up where it is gone or silent.

    Args:
        url: Of the server, ``http://`` or ``https://``, with or without ``/v1`` at its end.
        api_key: Sent as a bearer token; None for none.
        timeout: Seconds without any answer after which the server counts as hanging.
        concurrency: The largest number of requests that are sent at a time.
        argument: Name of the option that the server was given as, for messages.
        maximum_bytes: Bytes of an answer, at most; a longer one is none.

    Attributes:
        name: The address without user name and password, for messages.

    Raises:
        ValueError: If the address or an option cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        concurrency: int = 128,
        argument: str = "engine",
        maximum_bytes: int = MAXIMUM_BYTES,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"`{argument}` must be the address of a server such as http://localhost:8000, not {url!r}."
            )
        if not 0 < timeout < float("inf"):
            raise ValueError(f"`timeout` must be a positive number of seconds, but {timeout!r} was given.")
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, but {concurrency!r} was given.")
        self.scheme, self.host, self.port = parts.scheme, parts.hostname, parts.port
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.api_key, self.timeout, self.concurrency = api_key, timeout, concurrency
        self.argument, self.maximum_bytes = argument, maximum_bytes
        shown_host = f"[{self.host}]" if ":" in self.host else self.host
        self.name = f"{self.scheme}://{shown_host}{'' if self.port is None else f':{self.port}'}{self.path}"

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Send one request that the server answers at once, and return the answer.

        Raises:
            EngineError: If it does not answer, or refuses.
        """
        (answer,) = self.post_all(path, [body])
        return answer

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Send requests, many at a time, and return the answers in their order.

        Raises:
            EngineError: If the server does not answer, or refuses.
        """
        answers = self._exchange_all(path, bodies, None)
        # Without a limit of the time, nothing is left unfinished.
        return [answer for answer in answers if answer is not None]

    def sample(
        self, model: str | None, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]
    ) -> list[EngineSample]:
        """Sample one response to each prompt.

        Args:
            model: The name under which the server knows the model or adapter; None for the model that it serves.
            prompts: Token ids.
            **options: How to sample.

        Raises:
            EngineError: If the server does not answer, refuses, or answers nonsense.
        """
        bodies = [
            {
                **({} if model is None else {"model": model}),
                "prompt": list(prompt),
                "max_tokens": limit,
                "seed": seed,
                "temperature": options["temperature"],
                "stop_token_ids": list(options["stop_token_ids"]),
                **UNCHANGED_POLICY,
                **ANSWER_OPTIONS,
            }
            for prompt, limit, seed in zip(prompts, options["max_tokens"], options["seeds"], strict=True)
        ]
        answers = self._exchange_all("/v1/completions", bodies, options.get("seconds"))
        return [UNFINISHED if answer is None else read_sample(self.name, answer) for answer in answers]

    def _exchange_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], seconds: float | None
    ) -> list[bytes | None]:
        """The answers to requests; None for those that were not there after so many seconds."""
        if not bodies:
            return []
        end = float("inf") if seconds is None else time.monotonic() + seconds
        connections, answers = _Connections(self), dict[Future[bytes], bytes]()
        with ThreadPoolExecutor(min(self.concurrency, len(bodies)), "odp-callbacks-engine") as pool:
            try:
                futures = [pool.submit(connections.exchange, path, body) for body in bodies]
                pending: set[Future[bytes]] = set(futures)
                while pending:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    done, pending = wait(pending, min(self.timeout, left), FIRST_COMPLETED)
                    for future in done:
                        answers[future] = future.result()  # raises what went wrong
                    if not done and self.timeout <= left:
                        raise EngineError(
                            f"`{self.argument}` ({self.name}) has answered nothing for {self.timeout:g} seconds; see "
                            "whether the server hangs, or give it a larger `timeout`."
                        )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                connections.close()
        return [answers.get(future) for future in futures]


class _Connections:
    """Connections to a server, one for each thread, which another thread can close while they wait for an answer."""

    def __init__(self, client: CompletionsClient) -> None:
        self._client, self._own = client, threading.local()
        self._lock, self._opened = threading.Lock(), list[HTTPConnection]()
        self._is_closed = False

    def exchange(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Send a request, and return the answer; several threads may do so."""
        client = self._client
        headers = {"Content-Type": "application/json"}
        if client.api_key is not None:
            headers["Authorization"] = f"Bearer {client.api_key}"
        try:
            connection = self._connection()
            connection.request("POST", client.path + path, json.dumps(body).encode(), headers)
            with connection.getresponse() as response:
                answer = response.read(client.maximum_bytes)
                is_whole = response.isclosed()
        except (OSError, HTTPException) as error:
            raise EngineError(
                f"`{client.argument}` ({client.name}) is not there: {type(error).__name__}: {error}; see whether the "
                "server runs."
            ) from error
        if not is_whole:
            what = f"an answer of more than {client.maximum_bytes:,} bytes"
            raise nonsense(client.name, what, client.argument)
        if response.status != 200:
            refusal = EngineError(
                f"`{client.argument}` ({client.name}) refused {path}: {response.status}, {refusal_text(answer)}"
            )
            refusal.is_refusal = True
            raise refusal
        return answer

    def close(self) -> None:
        """Wake the threads that wait for an answer; the server stops working on it."""
        with self._lock:
            self._is_closed = True
            opened = list(self._opened)
        for connection in opened:
            if (channel := connection.sock) is not None:
                with suppress(OSError):  # the other side was faster
                    channel.shutdown(socket.SHUT_RDWR)
                connection.close()

    def _connection(self) -> HTTPConnection:
        """The open connection of this thread."""
        connection: HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            kind = HTTPSConnection if self._client.scheme == "https" else HTTPConnection
            seconds = min(CONNECTION_SECONDS, self._client.timeout)
            connection = self._own.connection = kind(self._client.host, self._client.port, timeout=seconds)
            connection.auto_open = 0  # it would open itself once more behind the back of who closes it
        channel: socket.socket | None = connection.sock
        if channel is None:
            connection.connect()
            channel = connection.sock
            assert channel is not None, "it was connected"
            channel.settimeout(None)  # an answer may take long; who waits for it closes the connection
        with self._lock:
            if self._is_closed:
                connection.close()
                raise ConnectionAbortedError("given up")
            if connection not in self._opened:
                self._opened.append(connection)
        return connection


def read_sample(name: str, answer: bytes) -> EngineSample:
    """Read one completion.

    Args:
        name: Of the engine.
        answer: What the server sent.

    Raises:
        EngineError: If it is no completion with token ids and log-probabilities.

    Examples:
        >>> read_sample("a server", b'{"choices": [{"token_ids": [4], "finish_reason": "length", '
        ...     b'"logprobs": {"token_logprobs": [-0.5]}}]}')
        EngineSample(token_ids=(4,), log_probabilities=(-0.5,), finish_reason='length')
    """
    try:
        (choice,) = json.loads(answer)["choices"]
        token_ids = tuple(int(token) for token in choice["token_ids"])
        log_probabilities = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
        reason = choice["finish_reason"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        shown = answer[:120].decode("utf-8", "replace")
        raise nonsense(name, f"no completion with token ids and log-probabilities, but {shown!r}") from error
    if reason not in ("stop", "length"):
        raise nonsense(name, f"a response ended by {reason!r}")
    return EngineSample(token_ids, log_probabilities, reason)


def refusal_text(answer: bytes) -> str:
    """What a server says about a request that it refuses.

    Examples:
        >>> refusal_text(b'{"error": {"message": "no such model"}}'), refusal_text(b"<html>")
        ('no such model', '<html>')
    """
    text = answer[:400].decode("utf-8", "replace")
    try:
        return str(json.loads(answer)["error"]["message"])[:400]
    except (ValueError, KeyError, TypeError):
        return text
