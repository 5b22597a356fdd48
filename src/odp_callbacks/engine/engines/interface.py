"""What an engine outside the student's own model must do to sample for a probe."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import nn
from typing_extensions import NotRequired, TypedDict, Unpack

FinishReason = Literal["stop", "length", "unfinished"]
"""Why a sample ended: at a stop token, at its limit, or because the time was up."""
TOLERANCE = 0.05
"""Mean absolute difference of log-probabilities, in nats, up to which an engine is taken to sample from the student."""


class EngineError(RuntimeError):
    """An engine is gone, silent, answers nonsense, or does not sample from the student.

    Attributes:
        is_refusal: Whether it is there and understood the request, but refused it.
    """

    is_refusal = False


@dataclass(frozen=True)
class EngineSample:
    """What an engine sampled for one prompt.

    Attributes:
        token_ids: The sampled tokens, including the stop token if one was sampled.
        log_probabilities: One for each token, in nats. With a temperature of 1 they are those of the student's policy;
            with another one, some engines give those at a temperature of 1 and others those of the sampling.
        finish_reason: Why it ended; an unfinished one has no token.
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish_reason: FinishReason


UNFINISHED = EngineSample((), (), "unfinished")
"""The sample of a prompt for which the time did not suffice."""


class SamplingOptions(TypedDict):
    """How an engine samples, as keyword arguments.

    Attributes:
        max_tokens: For each prompt, the largest number of tokens to sample, at least 1.
        seeds: For each prompt, the seed of its draws, in [0, 2^63).
        temperature: Divides the logits.
        stop_token_ids: Tokens that end a response; no other token does.
        seconds: Time after which what is not done is given up as unfinished; None or missing for no limit.
    """

    max_tokens: Sequence[int]
    seeds: Sequence[int]
    temperature: float
    stop_token_ids: Sequence[int]
    seconds: NotRequired[float | None]


@runtime_checkable
class SamplingEngine(Protocol):
    """Samples from the student in another place than the student's own model.

    Attributes:
        name: What messages and records call the engine.
        tolerance: Mean absolute difference between its log-probabilities and the student's, in nats, above which a
            probe refuses it.
    """

    name: str
    tolerance: float

    def sync(self, student: nn.Module, step: int) -> None:
        """Take over the policy that the student has now: its LoRA adapter, or its base while no adapter is active.

        Args:
            student: The student, usually a model with LoRA.
            step: Distinguishes this adapter from the earlier ones.

        Raises:
            EngineError: If that fails.
        """

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt, with a temperature and no other change of the policy.

        Args:
            prompts: Token ids; nothing is put in front of them.
            **options: How to sample.

        Returns:
            Samples in the order of ``prompts``.

        Raises:
            EngineError: If the engine is gone, says nothing for too long, or answers nonsense.
        """

    def release(self) -> None:
        """Give back what :meth:`sync` took; called after every probe, also after one that failed."""


def check_samples(
    name: str,
    samples: Sequence[EngineSample],
    max_tokens: Sequence[int],
    stop_token_ids: Collection[int],
    vocabulary: int,
) -> None:
    """Check that what an engine returned can be samples of a student.

    Args:
        name: Of the engine.
        samples: What it returned.
        max_tokens: For each prompt, the largest number of tokens.
        stop_token_ids: Tokens that end a response.
        vocabulary: Number of tokens that the student knows.

    Raises:
        EngineError: If it cannot; the message says why.

    Examples:
        >>> check_samples("a server", [EngineSample((7,), (-0.1,), "length")], [1], (), vocabulary=5)
        Traceback (most recent call last):
        ...
        odp_callbacks.engine.engines.interface.EngineError: `engine` (a server) answered nonsense: token 7 is not in \
the student's vocabulary of 5.
    """
    if len(samples) != len(max_tokens):
        raise nonsense(name, f"{len(samples)} samples for {len(max_tokens)} prompts")
    for sample, limit in zip(samples, max_tokens, strict=True):
        tokens, reason = sample.token_ids, sample.finish_reason
        if reason == "unfinished":
            continue
        if not 0 < len(tokens) <= limit:
            raise nonsense(name, f"{len(tokens)} tokens where 1 to {limit} were asked for")
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise nonsense(name, f"token {token} is not in the student's vocabulary of {vocabulary}")
        if any(token in stop_token_ids for token in tokens[:-1]):
            raise nonsense(name, "a response goes on after a stop token")
        if (tokens[-1] in stop_token_ids) != (reason == "stop"):
            raise nonsense(name, f"a response ends with token {tokens[-1]}, and the reason given is {reason!r}")
        if reason == "length" and len(tokens) < limit:
            raise nonsense(name, f"a response ends at {len(tokens)} tokens without a stop token; its limit is {limit}")
        if len(sample.log_probabilities) != len(tokens):
            raise nonsense(name, f"{len(sample.log_probabilities)} log-probabilities of {len(tokens)} tokens")
        check_log_probabilities(name, sample.log_probabilities)


def check_log_probabilities(name: str, values: Iterable[float], argument: str = "engine") -> None:
    """Check that numbers can be log-probabilities, which may be rounded to a little more than 0.

    Args:
        name: Of the engine.
        values: The numbers.
        argument: Name of the option that the engine was given as.

    Raises:
        EngineError: If one cannot.
    """
    if any(math.isnan(value) or value > 1e-3 for value in values):
        raise nonsense(name, "a log-probability is not a number, or above 0", argument)


def nonsense(name: str, what: str, argument: str = "engine") -> EngineError:
    """The error for an answer that cannot be used."""
    return EngineError(f"`{argument}` ({name}) answered nonsense: {what}.")
