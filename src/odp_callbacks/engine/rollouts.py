"""Student rollouts: the responses that the student gives by itself, and what the verifier says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.verifier import Verifier


@dataclass(frozen=True)
class Rollout:
    """One response of the student.

    Attributes:
        question: What was asked.
        response_ids: The sampled tokens, with the end token if there was one.
        text: The response without end and special tokens, as the verifier sees it.
        truncated: Whether the length limit cut it before an end token.
        reward: In [0, 1]; NaN until it is scored.
        entropy: ``(T,)``, of the student's policy at each position, in nats; None unless a node selector wants it.
    """

    question: Question
    response_ids: tuple[int, ...]
    text: str
    truncated: bool
    reward: float = float("nan")
    entropy: Tensor | None = None

    @property
    def sequence(self) -> Tensor:
        """Prompt and response, ``(P + T,)`` int64."""
        return torch.cat([self.question.prompt_ids, torch.tensor(self.response_ids, dtype=torch.long)])

    def positions(self, depths: Sequence[int]) -> list[int]:
        """Where in :attr:`sequence` the logits are that choose the token at each depth."""
        return [len(self.question.prompt_ids) - 1 + depth for depth in depths]


def response_text(tokenizer: Any, tokens: Sequence[int], eos_token_ids: Sequence[int]) -> str:
    """Decode a response; the token that ended it is not part of what was said."""
    if tokens and tokens[-1] in eos_token_ids:
        tokens = tokens[:-1]
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def sample_rollouts(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    per_question: int,
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    randomness: Randomness | None,
    batch_size: int,
) -> list[Rollout]:
    """Sample ``per_question`` responses to each question; each prompt is prefilled once.

    With ``randomness`` a question's responses depend on its id, and not on the other questions; None draws from
    torch's global stream.

    Returns:
        ``len(questions) * per_question`` rollouts, those of one question together.
    """
    prefixes = prefill_rollouts(model, [q.prompt_ids[:-1] for q in questions])
    starts = [
        ContinuationRequest(i, len(q.prompt_ids) - 1, int(q.prompt_ids[-1]), max_new_tokens)
        for i, q in enumerate(questions)
        for _ in range(per_question)
    ]
    keys = None
    if randomness is not None:
        keys = [randomness.key(q.id, "rollout", i) for q in questions for i in range(per_question)]
    sampled = sample_continuations(
        model,
        prefixes,
        starts,
        temperature=temperature,
        eos_token_ids=eos_token_ids,
        keys=keys,
        batch_size=batch_size,
    )
    return [
        Rollout(
            questions[start.sequence],
            continuation.tokens,
            response_text(tokenizer, continuation.tokens, eos_token_ids),
            continuation.truncated,
        )
        for start, continuation in zip(starts, sampled, strict=True)
    ]


def score_rollouts(verifier: Verifier, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same rollouts, with their rewards."""
    rewards = verifier.score(
        [r.question for r in rollouts], [r.text for r in rollouts], [r.response_ids for r in rollouts]
    )
    return [replace(rollout, reward=value) for rollout, value in zip(rollouts, rewards, strict=True)]


def given_rollouts(
    tokenizer: Any,
    questions: Sequence[Question],
    responses: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> list[Rollout]:
    """Rollouts from responses that exist, those of one question together; what follows an end token is dropped.

    Raises:
        ValueError: If there is not one list of responses for each question, or a response is empty or too long.
    """
    if len(responses) != len(questions):
        raise ValueError(
            f"`responses` must hold one list for each of the {len(questions)} rows, but holds {len(responses)}."
        )
    found = []
    for question, several in zip(questions, responses, strict=True):
        for response in several:
            ids = [int(k) for k in response]
            end = next((t for t, k in enumerate(ids) if k in eos_token_ids), None)
            ids = ids if end is None else ids[: end + 1]
            if not 0 < len(ids) <= max_new_tokens:
                raise ValueError(
                    f"`responses` must have 1 to `max_new_tokens` = {max_new_tokens} tokens each, but one of question "
                    f"{question.id} has {len(ids)}."
                )
            text = response_text(tokenizer, ids, eos_token_ids)
            found.append(Rollout(question, tuple(ids), text, end is None))
    return found


def end_tokens(model: nn.Module, tokenizer: Any, extra: Sequence[int] = ()) -> tuple[int, ...]:
    """Every token that ends a response: the model's, the tokenizer's and the caller's.

    Raises:
        ValueError: If there is none.
    """
    found: set[int] = set(extra)
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    if not found:
        raise ValueError("no end-of-sequence token is known; set `tokenizer.eos_token` or give `eos_token_ids`.")
    return tuple(sorted(found))
