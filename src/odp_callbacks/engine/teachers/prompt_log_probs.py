"""Log-probabilities of tokens that exist already, asked of a server in vLLM's way or of a client of TRL."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from odp_callbacks.engine.engines.completions_client import UNCHANGED_POLICY, CompletionsClient
from odp_callbacks.engine.engines.interface import EngineError, check_log_probabilities, nonsense

ARGUMENT = "teachers"
"""The option that messages name."""
ROUNDING = 0.01
"""By how much probabilities may add up to more than 1: servers round them."""

TokenLogProbs = dict[int, float]
"""Log-probabilities at one position, by token."""


def ask_server(
    client: CompletionsClient, model: str | None, sequences: Sequence[Sequence[int]], starts: Sequence[int], top_k: int
) -> list[list[TokenLogProbs]]:
    """Ask a vLLM server for the likeliest tokens at each position of sequences, one request for each.

    Args:
        client: Sends the requests.
        model: The name under which the server knows the model; None for the one that it serves.
        sequences: Token ids.
        starts: For each sequence, the first token that is asked about.
        top_k: How many tokens at each position.

    Returns:
        For each sequence and each token from its start, the likeliest tokens there, and always the token itself.

    Raises:
        EngineError: If the server does not answer, refuses, or answers nonsense.
    """
    named = {} if model is None else {"model": model}
    bodies = [
        {
            **named,
            "prompt": list(sequence),
            "max_tokens": 1,
            "temperature": 1.0,
            **UNCHANGED_POLICY,
            "prompt_logprobs": top_k,
        }
        for sequence in sequences
    ]
    try:
        answers = client.post_all("/v1/completions", bodies)
    except EngineError as error:
        if "max_logprobs" not in str(error) and "max allowed" not in str(error):
            raise
        raise EngineError(f"{error} Start the server with `--max-logprobs {top_k}`, or lower `top_k`.") from error
    return [
        read_prompt_log_probs(client.name, answer, sequence, start)
        for answer, sequence, start in zip(answers, sequences, starts, strict=True)
    ]


def read_prompt_log_probs(name: str, answer: bytes, sequence: Sequence[int], start: int) -> list[TokenLogProbs]:
    """Read the log-probabilities of a prompt's tokens from a completion of vLLM.

    Args:
        name: Of the server.
        answer: What it sent.
        sequence: The prompt.
        start: The first token that was asked about.

    Raises:
        EngineError: If it has none, or they cannot be such.

    Examples:
        >>> answer = b'{"choices": [{"prompt_logprobs": [null, {"5": {"logprob": -0.5}, "3": {"logprob": -1.5}}]}]}'
        >>> read_prompt_log_probs("a server", answer, [4, 5], 1)
        [{5: -0.5, 3: -1.5}]
    """
    try:
        (choice,) = json.loads(answer)["choices"]
        positions = choice["prompt_logprobs"]
        if len(positions) != len(sequence):
            raise nonsense(name, "not one position for each token", ARGUMENT)
        read = [
            {int(token): float(entry["logprob"]) for token, entry in position.items()} for position in positions[start:]
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        shown = answer[:120].decode("utf-8", "replace")
        raise nonsense(
            name, f"no completion with the log-probabilities of its prompt, but {shown!r}", ARGUMENT
        ) from error
    check_log_probs(name, read, sequence[start:])
    return read


def ask_client(
    client: Any, name: str, sequences: Sequence[Sequence[int]], starts: Sequence[int], top_k: int
) -> list[list[TokenLogProbs]]:
    """Ask a client of TRL, such as the ``teacher_client`` of a trainer; arguments as in :func:`ask_server`.

    Args:
        client: Has ``get_sequence_logprobs(sequences, prompt_lengths, top_logprobs, temperature)``.
        name: What messages call it.
        sequences: Token ids.
        starts: For each sequence, the first token that is asked about.
        top_k: How many tokens at each position.
    """
    try:
        result = client.get_sequence_logprobs(
            sequences=[list(sequence) for sequence in sequences],
            prompt_lengths=list(starts),
            top_logprobs=top_k,
            temperature=1.0,
        )
    except Exception as error:
        raise EngineError(f"`{ARGUMENT}` ({name}) failed to score: {type(error).__name__}: {error}") from error
    try:
        read = [_read_client(result, number) for number in range(len(sequences))]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise nonsense(
            name, f"no log-probabilities of sequences ({type(error).__name__}: {error})", ARGUMENT
        ) from error
    for log_probs, sequence, start in zip(read, sequences, starts, strict=True):
        check_log_probs(name, log_probs, sequence[start:])
    return read


def _read_client(result: Mapping[str, Any], number: int) -> list[TokenLogProbs]:
    """What TRL's client returned for one sequence; what it filled up with -inf is left out."""
    parts = ("logprob_token_ids", "logprobs"), ("actual_token_ids", "actual_logprobs")
    (likeliest_ids, likeliest), (actual_ids, actual) = ([result[name][number] for name in names] for names in parts)
    return [
        {
            int(token): float(value)
            for token, value in zip([*own_ids, *ids], [*own, *values], strict=True)
            if value != -math.inf
        }
        for ids, values, own_ids, own in zip(likeliest_ids, likeliest, actual_ids, actual, strict=True)
    ]


def check_log_probs(name: str, positions: Sequence[TokenLogProbs], tokens: Sequence[int]) -> None:
    """Check that there is one position for each token, and that these can be log-probabilities.

    Args:
        name: Of the server.
        positions: What it returned.
        tokens: The tokens that were asked about.

    Raises:
        EngineError: If that is not so.

    Examples:
        >>> check_log_probs("a server", [{1: -0.1, 2: -0.1}], [1])
        Traceback (most recent call last):
        ...
        odp_callbacks.engine.engines.interface.EngineError: `teachers` (a server) answered nonsense: probabilities \
that add up to more than 1.
    """
    if len(positions) != len(tokens):
        raise nonsense(name, "not one position for each token", ARGUMENT)
    for position in positions:
        check_log_probabilities(name, position.values(), ARGUMENT)
        if sum(map(math.exp, position.values())) > 1 + ROUNDING:
            raise nonsense(name, "probabilities that add up to more than 1", ARGUMENT)
        if min(position, default=-1) < 0:
            raise nonsense(name, "a position without a token", ARGUMENT)
