"""Requests for continuations of short prompts and responses, and what greedy decoding answers them."""

import numpy as np
import torch

from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations, sample_stream
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.tree.budget import ContinuationBudget
from odp_callbacks.engine.tree.wave_queue import WaveQueue

# Two rollouts of the first question; a response longer and one shorter than the window of 4; an empty prompt.
PROMPTS = [torch.tensor(ids, dtype=torch.long) for ids in ([1, 6, 7, 8, 9], [], [1, 5, 9, 11, 6, 7])]
RESPONSES = [torch.tensor(ids) for ids in ([10, 11, 5, 6, 9, 8], [7], [1], [10, 6])]
PROMPT_OF_RESPONSE = [0, 0, 1, 2]
SEQUENCES = [
    torch.cat([PROMPTS[prompt], response]) for prompt, response in zip(PROMPT_OF_RESPONSE, RESPONSES, strict=True)
]
# Prefixes that end in a prompt, at its end, in a response and at its end, and an empty prefix.
REQUESTS = [
    ContinuationRequest(sequence, prefix_length, first_token, max_new_tokens)
    for sequence, prefix_length, first_token, max_new_tokens in [
        (0, 11, 7, 6), (3, 3, 5, 2), (0, 0, 9, 4), (2, 1, 8, 6), (1, 5, 3, 4), (0, 8, 6, 5),
        (3, 8, 11, 1), (0, 5, 10, 6), (1, 6, 4, 5), (2, 0, 6, 3),
    ]
]  # fmt: skip
END_TOKENS = [8, 10]


def prefill_sequences(model, backend="shared prefix"):
    with torch.no_grad():
        return prefill_rollouts(model, PROMPTS, RESPONSES, PROMPT_OF_RESPONSE, backend)


def prefill_prompt(model, prompt_ids, backend):
    with torch.no_grad():
        return prefill_rollouts(model, [prompt_ids], backend=backend)


def sample(model, prefixes, requests, **changes):
    keys = [Randomness(changes.pop("seed", 0)).key(index) for index in range(len(requests))]
    options = {"temperature": 1.0, "eos_token_ids": [], "keys": keys, "batch_size": 64}
    with torch.no_grad():
        return sample_continuations(model, prefixes, requests, **{**options, **changes})


def context_of(request):
    return torch.cat([SEQUENCES[request.sequence][: request.prefix_length], torch.tensor([request.first_token])])


def greedy_tokens(model, request, **options):
    """The most probable continuation, by full forward passes."""
    input_ids, tokens = context_of(request), []
    with torch.no_grad():
        while len(tokens) < request.max_new_tokens and not (tokens and tokens[-1] in END_TOKENS):
            tokens.append(int(model(input_ids=input_ids[None], **options).logits[0, -1].argmax()))
            input_ids = torch.cat([input_ids, torch.tensor(tokens[-1:])])
    return tuple(tokens)


def sample_waves(sampler, waves, plan_next=None, deadline=None):
    """Sample waves of a sampler until the planner has no other; return the queue."""
    budget = ContinuationBudget(sampler.config, sampler.cost, np.random.default_rng(0), deadline)
    queue = WaveQueue(sampler, budget, waves, plan_next, lambda *_: None)
    with torch.no_grad():
        sample_stream(
            sampler.student,
            sampler.prefilled,
            queue,
            temperature=sampler.config.temperature,
            eos_token_ids=sampler.eos_token_ids,
            batch_size=sampler.config.batch_size,
            deadline=deadline,
            slot_use=sampler.cost.slot_use,
        )
        queue.finish()
    return queue


def sample_from(model, prefixes, source, **changes):
    """Sample what a source asks for."""
    options = {"temperature": 1.0, "eos_token_ids": [], "batch_size": 64}
    with torch.no_grad():
        sample_stream(model, prefixes, source, **{**options, **changes})
