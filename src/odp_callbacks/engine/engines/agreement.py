"""Does an engine sample from the student? A few of its tokens tell, by their log-probabilities."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odp_callbacks.engine.engines.interface import EngineError, SamplingEngine, check_samples
from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.functional.policies import token_log_probs

LOGGER = logging.getLogger(__name__)

CHECKED_PROMPTS = 4
"""Prompts whose responses are compared."""
CHECKED_TOKENS = 16
"""Tokens of each of these responses, at most."""


def check_agreement(
    engine: SamplingEngine,
    student: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    randomness: Randomness,
) -> float:
    """Let an engine sample a few tokens, and compare their log-probabilities with the student's.

    It samples at a temperature of 1, where all engines mean the same by a log-probability.

    Args:
        engine: The engine, after its :meth:`~odp_callbacks.engine.engines.SamplingEngine.sync`.
        student: The student, in evaluation mode.
        prompts: ``(P,)`` int64 each; the first :data:`CHECKED_PROMPTS` of them are used.
        max_new_tokens: The largest number of tokens that a response may have.
        stop_token_ids: Tokens that end a response.
        randomness: Gives the seeds.

    Returns:
        The mean absolute difference in nats. As the engine's own samples are compared, it is about the divergence of
        the two policies where they differ much.

    Raises:
        EngineError: If it exceeds the engine's tolerance, or the engine does not answer.
    """
    chosen = [prompt.tolist() for prompt in prompts[:CHECKED_PROMPTS]]
    limits = [min(max_new_tokens, CHECKED_TOKENS)] * len(chosen)
    samples = engine.sample(
        chosen,
        max_tokens=limits,
        seeds=[randomness.key("engine", number) for number in range(len(chosen))],
        temperature=1.0,
        stop_token_ids=stop_token_ids,
    )
    check_samples(engine.name, samples, limits, stop_token_ids, vocabulary_size(student))
    stated = torch.tensor([value for sample in samples for value in sample.log_probabilities], dtype=torch.float64)
    sequences = [
        torch.tensor([*prompt, *sample.token_ids[:-1]]) for prompt, sample in zip(chosen, samples, strict=True)
    ]
    positions = [range(len(prompt) - 1, len(sequence)) for prompt, sequence in zip(chosen, sequences, strict=True)]
    with torch.no_grad():
        logits = torch.cat(node_logits(student, sequences, positions))  # (N, V)
    tokens = torch.tensor([token for sample in samples for token in sample.token_ids], device=logits.device)
    of_student = token_log_probs(logits, tokens, 1.0).double().cpu()
    difference = float((stated - of_student).abs().mean())
    LOGGER.info(
        "odp-callbacks: %s",
        f"`engine` ({engine.name}) gives log-probabilities that differ from the student's by {difference:.2g} nats on "
        f"average, {len(of_student)} tokens.",
    )
    if not difference <= engine.tolerance:
        # Without the figure, so that the same is said at every probe.
        raise EngineError(
            f"`engine` ({engine.name}) does not sample from the student: the log-probabilities of a few tokens differ "
            f"by more than {engine.tolerance:g} nats on average; serve the student's own base in its own precision, or "
            "give the engine a larger `tolerance`."
        )
    return difference
