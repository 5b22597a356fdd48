"""Targeted rollouts: how often the student succeeds from each branch, measured by its own continuations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from odp_callbacks.engine.branches import Branch
from odp_callbacks.engine.decoding import PrefixCache, Start, sample_continuations
from odp_callbacks.engine.nodes import Node
from odp_callbacks.engine.rewards import RewardFunction, score
from odp_callbacks.engine.rollouts import Rollout, response_text


@dataclass
class Outcomes:
    """What the continuations of one branch gave.

    Attributes:
        rewards: One number in [0, 1] for each continuation.
        exact: The branch ends the response, so its one reward is its success.
    """

    rewards: list[float] = field(default_factory=list)
    exact: bool = False


@dataclass
class Spent:
    """What continuations cost: tokens that were generated, how many there were, how many the limit cut."""

    tokens: int = 0
    continuations: int = 0
    truncated: int = 0


def measure_success(
    model: nn.Module,
    tokenizer: Any,
    reward: RewardFunction,
    rollouts: Sequence[Rollout],
    cache: PrefixCache,
    nodes: Sequence[Node],
    branches: Sequence[Sequence[Branch]],
    *,
    allocation: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    generator: torch.Generator | None,
    batch_size: int,
    outcomes: Sequence[Sequence[Outcomes]],
    spent: Spent,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Sample continuations from branches, score them, and add their rewards to ``outcomes``.

    A branch that ends the response (an end token, or the last one the limit allows) is scored once and known exactly.

    Args:
        model: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        reward: The verifier.
        rollouts: The probe's rollouts.
        cache: Their prefilled sequences, in the same order.
        nodes: Where to branch.
        branches: For each node, its branches.
        allocation: For each node and branch, how many continuations to add.
        max_new_tokens: Limit of the whole response.
        temperature: Sampling temperature.
        eos_token_ids: Tokens that end a response.
        generator: Random stream on the model's device.
        batch_size: The most continuations at a time.
        outcomes: For each node and branch; added to.
        spent: Added to.
        progress: Called with the number of finished continuations.
    """
    starts: list[Start] = []
    owners: list[tuple[int, int]] = []
    finished: list[tuple[int, int]] = []
    for n, node in enumerate(nodes):
        prompt = len(rollouts[node.rollout].question.prompt_ids)
        for b, branch in enumerate(branches[n]):
            left = max_new_tokens - node.depth - 1
            if branch.token in eos_token_ids or left == 0:
                if not outcomes[n][b].rewards:
                    finished.append((n, b))
                continue
            starts += [Start(node.rollout, prompt + node.depth, branch.token, left)] * allocation[n][b]
            owners += [(n, b)] * allocation[n][b]
    sampled = sample_continuations(
        model,
        cache,
        starts,
        temperature=temperature,
        eos_token_ids=eos_token_ids,
        generator=generator,
        batch_size=batch_size,
        progress=progress,
    )
    responses = [
        (*rollouts[nodes[n].rollout].response_ids[: nodes[n].depth], branches[n][b].token, *tail)
        for (n, b), tail in [*((o, ()) for o in finished), *zip(owners, (c.tokens for c in sampled), strict=True)]
    ]
    owners = finished + owners
    rewards = score(
        reward,
        [rollouts[nodes[n].rollout].question for n, _ in owners],
        [response_text(tokenizer, response, eos_token_ids) for response in responses],
        responses,
    )
    for (n, b), value in zip(owners, rewards, strict=True):
        outcomes[n][b].rewards.append(value)
    for n, b in finished:
        outcomes[n][b].exact = True
    spent.tokens += sum(len(c.tokens) for c in sampled)
    spent.continuations += len(sampled)
    spent.truncated += sum(c.truncated for c in sampled)
