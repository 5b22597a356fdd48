"""A whole probe against the reference: the same rollouts, nodes, branches and numbers of continuations.

Responses and continuations run to their limit (no end token is ever likely), so both do the same work whatever they
draw. The library's time is that of `Probe.run` on given responses; the reference's is the sum of its parts, run on the
nodes and branches that the library chose.

Run: python benchmarks/probe.py [--lengths 16 32 64] [--rollouts 2] [--continuations 4] [--branches 4] [--repeats 1]
     [--nodes 0 (exponential windows) or a number, evenly spread]
"""

import time
from collections.abc import Sequence
from typing import Any

import reference
import torch
from growth import evenly
from sizes import parse_sizes
from student import lora_student
from torch import Tensor

from odp_callbacks import BaseTeacher, ProbeConfig, ProbeReport, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.requests import ContinuationRequest

ROW = {"prompt": "7 - 4 = ? 7 - 4 = 3. Answer: 3\n5 + 2 = ? 5 + 2 = 7. Answer: 7\n3 + 6 = ?", "answer": "9"}
TEACHERS = {"answer": Teacher("The answer is {answer}.\n{prompt}"), "base": BaseTeacher()}
RARE_TOKEN = 5
"""<repo_name>, a reserved token of the tokenizer, which is never drawn."""
USUAL = {"lengths": [16, 32, 64], "rollouts": 2, "continuations": 4, "branches": 4, "repeats": 1, "nodes": 0}
SMOKE = {"lengths": [4], "rollouts": 1, "continuations": 1, "branches": 2, "nodes": 1}


def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [float(len(completion) % 2) for completion in completions]


def never_end_responses(model: Any, tokenizer: Any) -> None:
    """Make a token that is never drawn the only one that ends responses."""
    for config in (model.get_base_model().generation_config, model.get_base_model().config):
        config.eos_token_id = RARE_TOKEN
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(RARE_TOKEN)


@torch.no_grad()
def sample_responses(model: Any, prompt: Tensor, rollouts: int, length: int) -> list[tuple[int, ...]]:
    """Responses of ``length`` tokens."""
    prefilled = prefill_rollouts(model, [prompt[:-1]])
    request = ContinuationRequest(0, len(prompt) - 1, int(prompt[-1]), length)
    continuations = sample_continuations(
        model, prefilled, [request] * rollouts, temperature=1.0, eos_token_ids=[RARE_TOKEN], batch_size=64
    )
    return [continuation.tokens for continuation in continuations]


def reference_continuations(
    model: Any, prompt: Tensor, responses: Sequence[Sequence[int]], report: ProbeReport, continuations: int, length: int
) -> tuple[float, int]:
    """Seconds and tokens of the reference's continuations, at the nodes and branches of a report."""
    start, tokens, measured_prefixes = time.perf_counter(), 0, set()
    for record in report.nodes:
        prefix = torch.cat([prompt, torch.tensor(responses[record.rollout][: record.depth], dtype=torch.long)])
        # The library measures equal prefixes once, so the reference may do so too.
        if tuple(prefix.tolist()) in measured_prefixes:
            continue
        measured_prefixes.add(tuple(prefix.tolist()))
        for token, is_exact in zip(record.tokens, record.exact, strict=True):
            if not is_exact:
                branch = torch.cat([prefix, torch.tensor([int(token)])])
                sampled = reference.continuations(model, branch, continuations, length - record.depth - 1, [RARE_TOKEN])
                tokens += sum(map(len, sampled))
    return time.perf_counter() - start, tokens


def reference_gradients(model: Any, prompt: Tensor, responses: Sequence[Sequence[int]], report: ProbeReport) -> float:
    """Seconds of the reference's forward and backward passes, for the nodes and numbers of directions of a report."""
    start = time.perf_counter()
    for rollout_index, response in enumerate(responses):
        sequence = torch.cat([prompt, torch.tensor(response)])
        reference.logits(model, sequence)
        for teacher in TEACHERS.values():
            with teacher.policy(model) as (policy, _):
                reference.logits(policy, sequence)
        records = [record for record in report.nodes if record.rollout == rollout_index]
        directions = [torch.randn(record.gram.shape[-1], model.config.vocab_size) * 1e-3 for record in records]
        positions = [len(prompt) - 1 + record.depth for record in records]
        reference.gram_matrices(model, sequence, positions, directions)
    return time.perf_counter() - start


def compare(
    model: Any, tokenizer: Any, length: int, rollouts: int, continuations: int, branches: int, nodes: int
) -> dict[str, Any]:
    """Run both, print and return how many times as fast the library is."""
    never_end_responses(model, tokenizer)
    prompt = torch.tensor(tokenizer(ROW["prompt"])["input_ids"])
    responses = sample_responses(model, prompt, rollouts, length)
    config = ProbeConfig(
        rollouts_per_question=rollouts,
        max_new_tokens=length,
        continuations=continuations,
        max_branches=branches,
        tail_draws=1,
        step_alignment=False,
        nodes=evenly(nodes) if nodes else "exponential",
    )
    probe = Probe(model, tokenizer, reward, TEACHERS, config)
    start = time.perf_counter()
    report = probe.run([ROW], responses=[responses])
    library_seconds = time.perf_counter() - start
    sampling_seconds, tokens = reference_continuations(model, prompt, responses, report, continuations, length)
    reference_seconds = sampling_seconds + reference_gradients(model, prompt, responses, report)
    library_sampling_seconds = report.stage_seconds["continuations"]
    library_tokens = report.generated_tokens["continuations"]
    print(
        f"{length} tokens, {rollouts} rollouts, {len(report.nodes)} nodes, {continuations} continuations a branch: "
        f"reference {reference_seconds:.0f} s (continuations {sampling_seconds:.0f}, "
        f"{tokens / sampling_seconds:.0f} tokens/s), library {library_seconds:.0f} s (continuations "
        f"{library_sampling_seconds:.0f}, {library_tokens / library_sampling_seconds:.0f} tokens/s): "
        f"{reference_seconds / library_seconds:.2f} times as fast",
        flush=True,
    )
    return {
        "length": length,
        "ratio": reference_seconds / library_seconds,
        "reference_s": reference_seconds,
        "library_s": library_seconds,
        "reference_tokens": tokens,
        "library_tokens": library_tokens,
        "continuations_ratio": sampling_seconds / library_sampling_seconds,
        "nodes": len(report.nodes),
        "continuations": continuations,
    }


def main(
    lengths: list[int], rollouts: int, continuations: int, branches: int, repeats: int, nodes: int = 0
) -> list[dict[str, Any]]:
    """Compare at several response lengths."""
    _, tokenizer = load_student(None, lambda message: None)
    model = lora_student()
    return [
        compare(model, tokenizer, length, rollouts, continuations, branches, nodes)
        for _ in range(repeats)
        for length in lengths
    ]


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
