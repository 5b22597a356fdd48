"""Student rollouts: the responses that the student samples by itself, and their rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.journal import Journal, sample_unless_stored
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rewards import UnscoredError
from odp_callbacks.engine.rollout_cuts import cut_rollouts
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.randomness import Randomness, fresh_keys
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback
from odp_callbacks.engine.unit_costs import TOKENS, UnitCosts
from odp_callbacks.engine.verifier import Verifier

if TYPE_CHECKING:
    from odp_callbacks.engine.engines.student_engine import StudentEngine


@dataclass(frozen=True)
class Rollout:
    """One response of the student.

    Attributes:
        question: The question.
        response_ids: ``T`` sampled tokens, including the end token if there is one.
        text: The response without end and special tokens, as the verifier receives it.
        truncated: Whether the length limit cut the response before an end token.
        reward: The verifier's reward in [0, 1], or any finite number that was given; NaN until the response is scored.
        entropy: ``(T,)``, entropy of the student's policy at each position in nats; None unless the node selector
            uses it.
    """

    question: Question
    response_ids: tuple[int, ...]
    text: str
    truncated: bool
    reward: float = float("nan")
    entropy: Tensor | None = None

    @property
    def sequence(self) -> Tensor:
        """Prompt and response tokens, ``(P + T,)`` int64."""
        return torch.cat([self.question.prompt_ids, torch.tensor(self.response_ids, dtype=torch.long)])

    def positions(self, depths: Sequence[int]) -> list[int]:
        """Return the positions in :attr:`sequence` whose logits give the policy at each depth."""
        return [len(self.question.prompt_ids) - 1 + depth for depth in depths]


def question_indices(rollouts: Sequence[Rollout]) -> list[int]:
    """Number the questions of rollouts in the order in which they come; rollouts of one question share the object.

    Examples:
        >>> first, second = (Question(name, {}, torch.tensor([1])) for name in "ab")
        >>> question_indices([Rollout(question, (2,), "", False) for question in (first, second, first)])
        [0, 1, 0]
    """
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(rollout.question), len(numbers)) for rollout in rollouts]


def response_text(tokenizer: Any, tokens: Sequence[int], eos_token_ids: Sequence[int]) -> str:
    """Decode a response, without the token that ended it and without special tokens."""
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
    journal: Journal | None = None,
    deadline: Deadline | None = None,
    costs: UnitCosts | None = None,
    engine: "StudentEngine | None" = None,
) -> list[Rollout]:
    """Sample responses to questions; each prompt is prefilled once.

    With a deadline, responses that have not finished by then are cut at a common length, and the last questions may
    be left out (:func:`~odp_callbacks.engine.rollout_cuts.cut_rollouts`).

    Args:
        model: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        questions: The questions.
        per_question: Number of responses to each question.
        max_new_tokens: Maximum length of a response.
        temperature: Sampling temperature.
        eos_token_ids: Tokens that end a response.
        randomness: Makes a question's responses depend on its id and not on the other questions; None draws from
            torch's global stream.
        batch_size: Maximum number of responses sampled at a time.
        journal: Stores responses as they finish; those that it holds already are not sampled again. It needs
            ``randomness``.
        deadline: When to stop; None: when all responses have finished.
        costs: Receives what sampling took; None: not measured.
        engine: Samples in place of the model; None: the model itself.

    Returns:
        ``len(questions) * per_question`` rollouts, those of one question together, without rewards; fewer where a
        deadline left questions out.
    """
    requests = [
        ContinuationRequest(question_index, len(question.prompt_ids) - 1, int(question.prompt_ids[-1]), max_new_tokens)
        for question_index, question in enumerate(questions)
        for _ in range(per_question)
    ]
    if randomness is None:
        keys = fresh_keys(len(requests))
    else:
        keys = [
            randomness.key(question.id, "rollout", number) for question in questions for number in range(per_question)
        ]

    def sample(missing: list[int], on_finished: FinishedCallback) -> list[Continuation]:
        prompts = [question.prompt_ids[:-1] for question in questions]
        prefilled = prefill_rollouts(model, prompts, max_new_tokens=max_new_tokens, engine=engine)
        clock = deadline or Deadline()
        start = clock.elapsed_seconds
        sampled = sample_continuations(
            model,
            prefilled,
            [requests[index] for index in missing],
            temperature=temperature,
            eos_token_ids=eos_token_ids,
            keys=[keys[index] for index in missing],
            batch_size=batch_size,
            on_finished=on_finished,
            deadline=deadline,
        )
        if costs is not None and (tokens := sum(len(one.tokens) for one in sampled)):
            costs.record(TOKENS, tokens, clock.elapsed_seconds - start)
        return sampled

    sampled = sample_unless_stored(journal, keys, sample, max_new_tokens=max_new_tokens)
    continuations = sampled
    if deadline is not None:
        continuations = cut_rollouts(sampled, per_question).continuations
        if journal is not None:  # for another probe with the limit at which they were cut
            journal.write(
                {key: one for key, one, whole in zip(keys, continuations, sampled, strict=False) if one is not whole}
            )
    return [
        Rollout(
            questions[request.sequence],
            continuation.tokens,
            response_text(tokenizer, continuation.tokens, eos_token_ids),
            continuation.truncated,
        )
        for request, continuation in zip(requests, continuations, strict=False)  # the last questions may be left out
    ]


def reached_limit(rollouts: Sequence[Rollout], max_new_tokens: int) -> int | None:
    """The length at which rollouts were cut for lack of time; None if they were not.

    Args:
        rollouts: Those that were cut have a common length.
        max_new_tokens: The limit that they should have had.
    """
    return next(
        (len(one.response_ids) for one in rollouts if one.truncated and len(one.response_ids) < max_new_tokens), None
    )


def score_rollouts(verifier: Verifier, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts with the verifier's rewards."""
    rewards = verifier.score(*_scored_parts(rollouts))
    return [replace(rollout, reward=reward) for rollout, reward in zip(rollouts, rewards, strict=True)]


def try_thread(verifier: Verifier, rollouts: Sequence[Rollout]) -> None:
    """Let the verifier's other thread score rollouts again, to find out whether it gives the same rewards."""
    verifier.try_thread([rollout.reward for rollout in rollouts], *_scored_parts(rollouts))


def _scored_parts(rollouts: Sequence[Rollout]) -> tuple[list[Question], list[str], list[tuple[int, ...]]]:
    """The arguments of :meth:`~odp_callbacks.engine.verifier.Verifier.score`."""
    return (
        [rollout.question for rollout in rollouts],
        [rollout.text for rollout in rollouts],
        [rollout.response_ids for rollout in rollouts],
    )


def with_given_rewards(
    verifier: Verifier, rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float | None]]
) -> list[Rollout]:
    """Return rollouts with rewards that exist already; the verifier scores only those that have none.

    Args:
        verifier: Scores responses.
        rollouts: The rollouts, those of one question together.
        rewards: For each question, the rewards of its responses: any finite number, NaN where there shall be none, None
            for the verifier's.

    Raises:
        ValueError: If there is not one reward for each response, or one is infinite.
    """
    given = [reward for question_rewards in rewards for reward in question_rewards]
    counts = [len(list(group)) for _, group in groupby(rollouts, key=lambda rollout: id(rollout.question))]
    given_counts = [len(question_rewards) for question_rewards in rewards if len(question_rewards)]
    if given_counts != counts:
        raise ValueError(
            f"`rewards` must hold one reward for each response, {counts} by question, but holds {given_counts}."
        )
    if any(reward is not None and math.isinf(reward) for reward in given):
        raise ValueError("`rewards` must be finite, NaN or None, but an infinite one is among them.")
    missing = [rollout for rollout, reward in zip(rollouts, given, strict=True) if reward is None]
    scored = iter(score_rollouts(verifier, missing) if missing else ())
    return [
        next(scored) if reward is None else replace(rollout, reward=float(reward))
        for rollout, reward in zip(rollouts, given, strict=True)
    ]


def scored_rollouts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts that have a reward.

    Raises:
        UnscoredError: If there are rollouts and none has one.
    """
    scored = [rollout for rollout in rollouts if not math.isnan(rollout.reward)]
    if rollouts and not scored:
        raise UnscoredError(
            f"`reward` gave None to all {len(rollouts)} responses, so that nothing can be measured; give rows for "
            "which it returns numbers in [0, 1]."
        )
    return scored


def with_entropy(rollout: Rollout, student: nn.Module, temperature: float) -> Rollout:
    """Return the rollout with the entropy of the student's policy at each of its ``T`` positions."""
    positions = [rollout.positions(range(len(rollout.response_ids)))]
    (logits,) = node_logits(student, [rollout.sequence], positions)  # (T, V)
    log_probabilities = torch.log_softmax(logits.float() / temperature, dim=-1)
    return replace(rollout, entropy=-(log_probabilities.exp() * log_probabilities).sum(dim=-1).cpu())


def given_rollouts(
    tokenizer: Any,
    questions: Sequence[Question],
    responses: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> list[Rollout]:
    """Make rollouts of responses that exist already; what follows an end token is dropped.

    Args:
        tokenizer: The student's tokenizer.
        questions: The questions.
        responses: For each question, its responses as token ids.
        max_new_tokens: Maximum length of a response.
        eos_token_ids: Tokens that end a response.

    Returns:
        The rollouts, those of one question together, without rewards.

    Raises:
        ValueError: If there is not one list of responses for each question, or a response is empty or too long.
    """
    if len(responses) != len(questions):
        raise ValueError(
            f"`responses` must hold one list for each of the {len(questions)} rows, but holds {len(responses)}."
        )
    rollouts = []
    for question, question_responses in zip(questions, responses, strict=True):
        for response in question_responses:
            tokens = [int(token) for token in response]
            end = next((position for position, token in enumerate(tokens) if token in eos_token_ids), None)
            tokens = tokens if end is None else tokens[: end + 1]
            if not 0 < len(tokens) <= max_new_tokens:
                raise ValueError(
                    f"`responses` must have 1 to `max_new_tokens` = {max_new_tokens} tokens each, but one of question "
                    f"{question.id} has {len(tokens)}."
                )
            text = response_text(tokenizer, tokens, eos_token_ids)
            rollouts.append(Rollout(question, tuple(tokens), text, truncated=end is None))
    return rollouts


def end_tokens(model: nn.Module, tokenizer: Any, extra_tokens: Sequence[int] = ()) -> tuple[int, ...]:
    """Collect every token that ends a response: the model's, the tokenizer's and the caller's.

    Args:
        model: A causal language model; its generation configuration and its configuration are read.
        tokenizer: Its tokenizer.
        extra_tokens: Additional end tokens.

    Raises:
        ValueError: If there is none.
    """
    tokens: set[int] = set(extra_tokens)
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        source_tokens = getattr(source, "eos_token_id", None)
        if source_tokens is not None:
            tokens.update([source_tokens] if isinstance(source_tokens, int) else source_tokens)
    if not tokens:
        raise ValueError("no end-of-sequence token is known; set `tokenizer.eos_token` or give `eos_token_ids`.")
    return tuple(sorted(tokens))
