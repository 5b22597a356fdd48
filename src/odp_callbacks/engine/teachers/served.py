"""A teacher behind a server: its likeliest tokens at each position, and what is missing."""

import math
import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from odp_callbacks.analysis.teacher_coverage import Coverage
from odp_callbacks.engine.deadline import Clock
from odp_callbacks.engine.engines.completions_client import CompletionsClient
from odp_callbacks.engine.engines.vllm_server import KEY_VARIABLE
from odp_callbacks.engine.prompts import text_tokenizer
from odp_callbacks.engine.teachers.context import Context
from odp_callbacks.engine.teachers.kinds import Teacher
from odp_callbacks.engine.teachers.prompt_log_probs import ARGUMENT, TokenLogProbs, ask_client, ask_server
from odp_callbacks.engine.teachers.token_spans import TokenAlignment
from odp_callbacks.engine.unit_costs import UnitCosts
from odp_callbacks.functional.returned_tokens import ReturnedTokens

MAXIMUM_BYTES = 2**30
"""Bytes of an answer, at most: a token takes about 80, and there are ``top_k`` of them at each position."""
SCORED_TOKENS = "scored tokens"
"""A kind of work: tokens of prompts and responses that a server has read."""
KEPT_NUMBERS = 2**24
"""Log-probabilities that are kept, at most: one probe asks several times about the same responses."""


class ServedTeacher(Teacher):
    """A teacher behind a vLLM server, or behind a client of TRL: its ``top_k`` likeliest tokens at each position.

    Where tokens do not come back, their mass is known and its spread is not. It takes the shape of the student's
    policy, so that a divergence is the one in which all of them are one outcome
    (:mod:`~odp_callbacks.functional.returned_tokens`). The report states the missing mass.

    With a ``tokenizer`` whose vocabulary is another one than the student's, responses are encoded anew by their text.
    A token is measured where both tokenizers have one token for the same piece of the text, on the tokens whose text
    is the same in both vocabularies; the mass of all others is missing. The other tokens of a response are counted and
    not measured, as if the loss left them out (:mod:`~odp_callbacks.engine.teachers.token_spans`).

    Args:
        url: Of a vLLM server, such as ``http://localhost:8000``, started with ``--max-logprobs`` of at least ``top_k``;
            or an object with TRL's method ``get_sequence_logprobs(sequences, prompt_lengths, top_logprobs,
            temperature)``, such as the ``teacher_client`` of a trainer.
        context: As in :class:`Teacher`.
        model_name: The name under which the server knows the model; None for the one that it serves.
        top_k: How many tokens to ask for at each position.
        tokenizer: The teacher's tokenizer, or a processor that holds it; it encodes the teacher's prompts. None stands
            for the student's, whose vocabulary the teacher must then have.
        timeout: Seconds without any answer after which the server counts as hanging.
        concurrency: The largest number of requests that are sent at a time.
        api_key: Of the server; None for that of the environment variable ``VLLM_API_KEY``, if there is one.

    Attributes:
        coverage: How much of the teacher's policy came back since the last probe began.
        costs: What the server took for its answers in all probes.
        clock: Tells the time.

    Raises:
        ValueError: If the address or an option cannot be used.

    Examples:
        >>> ServedTeacher("http://user:password@localhost:8000/v1", "The answer is {answer}. {prompt}", top_k=100)
        ServedTeacher('http://localhost:8000', top_k=100)
    """

    def __init__(
        self,
        url: Any,
        context: Context | None = None,
        *,
        model_name: str | None = None,
        top_k: int = 64,
        tokenizer: Any = None,
        timeout: float = 120.0,
        concurrency: int = 16,
        api_key: str | None = None,
    ) -> None:
        super().__init__(context)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, but {top_k!r} was given.")
        self.model_name, self.top_k = model_name, top_k
        self.tokenizer = None if tokenizer is None else text_tokenizer(tokenizer)
        self.client: Any = url
        if isinstance(url, str):
            self.client = CompletionsClient(
                url,
                api_key=os.environ.get(KEY_VARIABLE) if api_key is None else api_key,
                timeout=timeout,
                concurrency=concurrency,
                argument=ARGUMENT,
                maximum_bytes=MAXIMUM_BYTES,
            )
        elif not callable(getattr(url, "get_sequence_logprobs", None)):
            raise ValueError(
                "`url` must be the address of a vLLM server, or an object with TRL's method `get_sequence_logprobs`, "
                f"but {url!r} was given."
            )
        self.name: str = getattr(self.client, "name", type(self.client).__name__)
        self.coverage, self.costs = Coverage(), UnitCosts()
        self.clock: Clock = time.perf_counter
        self._alignment: TokenAlignment | None = None
        self._kept: dict[tuple[tuple[int, ...], tuple[int, ...]], ReturnedTokens] = {}

    def __repr__(self) -> str:
        """The address alone: a key must not be in there."""
        return f"ServedTeacher({self.name!r}, top_k={self.top_k})"

    def policy(self, student: nn.Module) -> NoReturn:
        """A served teacher has no model here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`teachers` has a teacher behind a server, which scores responses and has no model here; to sample from a "
            "teacher, use `ModelTeacher`."
        )

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Compare the vocabularies, without a word to the server.

        Raises:
            ValueError: If the two tokenizers share no token.
        """
        vocabulary = None if self.tokenizer is None else self.tokenizer.get_vocab()
        student_tokenizer = text_tokenizer(tokenizer)
        if vocabulary is None or vocabulary == student_tokenizer.get_vocab():
            self._alignment = None
        elif self._alignment is None or self._alignment.student_tokenizer is not student_tokenizer:
            self._alignment = TokenAlignment(student_tokenizer, self.tokenizer)

    def begin_probe(self) -> None:
        """Forget what earlier probes asked, and begin to count anew."""
        self.coverage = Coverage()
        self._kept.clear()

    def seconds_for(self, prompts: Sequence[Tensor], responses: Sequence[Sequence[int]]) -> float:
        """Seconds that the server will take, by what it has taken; 0 if that is unknown.

        Args:
            prompts: The teacher's prompt for each response, ``(P'_r,)`` int64.
            responses: The student's response tokens; those that this probe has asked about take no time.
        """
        keys = {(tuple(prompt.tolist()), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)}
        tokens = sum(len(prompt) + len(response) for prompt, response in keys - self._kept.keys())
        return self.costs.predict(SCORED_TOKENS, tokens)

    def returned_tokens(
        self, prompts: Sequence[Tensor], responses: Sequence[Sequence[int]], depths: Sequence[Sequence[int]]
    ) -> list[ReturnedTokens]:
        """Ask for the likeliest tokens at depths of responses; what a probe has asked already is taken from there.

        Args:
            prompts: The teacher's prompt for each response, ``(P'_r,)`` int64.
            responses: The student's response tokens.
            depths: ``N_r`` depths for each response.

        Returns:
            ``N_r`` positions for each response, in the student's vocabulary, on the CPU.

        Raises:
            EngineError: If the server does not answer, refuses, or answers nonsense.
        """
        keys = [(tuple(prompt.tolist()), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        scored = dict(zip(new, self._ask(new), strict=True)) if new else {}
        by_response = [self._kept[key] if key in self._kept else scored[key] for key in keys]
        for key, returned in scored.items():
            self._kept[key] = returned
        while sum(returned.token_ids.numel() for returned in self._kept.values()) > KEPT_NUMBERS:
            del self._kept[next(iter(self._kept))]  # the oldest
        return [returned[list(chosen)] for returned, chosen in zip(by_response, depths, strict=True)]

    def _ask(self, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[ReturnedTokens]:
        """All positions of responses, given as prompt and response."""
        encoded = [self._encode(response) for _, response in asked]
        sequences = [[*prompt, *tokens] for (prompt, _), (tokens, _) in zip(asked, encoded, strict=True)]
        starts = [len(prompt) for prompt, _ in asked]
        with self.costs.measuring(SCORED_TOKENS, sum(map(len, sequences)), self.clock):
            if isinstance(self.client, CompletionsClient):
                positions = ask_server(self.client, self.model_name, sequences, starts, self.top_k)
            else:
                positions = ask_client(self.client, self.name, sequences, starts, self.top_k)
        scored = []
        for (_, response), (_, pairs), of_response in zip(asked, encoded, positions, strict=True):
            returned = self._returned(len(response), pairs, of_response)
            missing = returned.missing_mass()[[depth for depth, _ in pairs]]
            self.coverage = self.coverage.with_response(len(response), missing.tolist())
            scored.append(returned)
        return scored

    def _encode(self, response: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The teacher's tokens of a response, and which of them are the student's."""
        if self._alignment is not None:
            return self._alignment.teacher_tokens(response)
        return list(response), [(place, place) for place in range(len(response))]

    def _returned(
        self, length: int, pairs: Sequence[tuple[int, int]], positions: Sequence[TokenLogProbs]
    ) -> ReturnedTokens:
        """What came back for a response of so many tokens, in the student's vocabulary."""
        width = max([len(positions[place]) for _, place in pairs], default=1)
        token_ids = torch.zeros(length, width, dtype=torch.long)
        log_probs = torch.full((length, width), -math.inf)
        for depth, place in pairs:
            tokens = torch.tensor(list(positions[place]))
            values = torch.tensor(list(positions[place].values()))
            if self._alignment is not None:
                known = self._alignment.student_ids
                tokens = torch.where(tokens < len(known), known[tokens.clamp(max=len(known) - 1)], -1)
                tokens, values = tokens[tokens >= 0], values[tokens >= 0]
            token_ids[depth, : len(tokens)], log_probs[depth, : len(tokens)] = tokens, values
        return ReturnedTokens(token_ids, log_probs)
