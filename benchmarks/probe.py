"""A whole probe against the reference: the same rollouts, nodes, branches and numbers of continuations.

Responses and continuations run to their limit (no end token is ever likely), so both do the same work whatever they
draw. The library's time is that of `Probe.run` on given responses; the reference's is the sum of its parts, run on the
nodes and branches that the library chose.

Run: python benchmarks/probe.py [--lengths 16 32 64] [--rollouts 2] [--continuations 4] [--branches 4] [--repeats 1]
     [--nodes 0 (exponential windows) or a number, evenly spread]
"""

import argparse
import time

import reference
import torch
from growth import evenly
from student import lora_student

from odp_callbacks import BaseTeacher, ProbeConfig, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest

ROW = {"prompt": "7 - 4 = ? 7 - 4 = 3. Answer: 3\n5 + 2 = ? 5 + 2 = 7. Answer: 7\n3 + 6 = ?", "answer": "9"}
TEACHERS = {"answer": Teacher("The answer is {answer}.\n{prompt}"), "base": BaseTeacher()}


def reward(prompts, completions, answer):
    return [float(len(c) % 2) for c in completions]


def never_ending(model, tokenizer):
    """Let a token end responses that is never drawn."""
    rare = 5  # <repo_name>, one of the tokenizer's reserved ones
    for holder in (model.get_base_model().generation_config, model.get_base_model().config):
        holder.eos_token_id = rare
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(rare)
    return rare


def compare(model, tokenizer, length, rollouts, continuations, branches, nodes):
    prompt = torch.tensor(tokenizer(ROW["prompt"])["input_ids"])
    eos = never_ending(model, tokenizer)
    with torch.no_grad():
        prefixes = prefill_rollouts(model, [prompt[:-1]])
        start = ContinuationRequest(0, len(prompt) - 1, int(prompt[-1]), length)
        responses = [
            c.tokens
            for c in sample_continuations(
                model, prefixes, [start] * rollouts, temperature=1.0, eos_token_ids=[eos], batch_size=64
            )
        ]
    config = ProbeConfig(
        rollouts_per_question=rollouts, max_new_tokens=length, continuations=continuations, max_branches=branches,
        tail_draws=1, step_alignment=False, nodes=evenly(nodes) if nodes else "exponential",
    )  # fmt: skip
    probe = Probe(model, tokenizer, reward, TEACHERS, config)
    directions = []
    inner = NodeDifferentiator._rollout_nodes

    def keep(self, rollout, nodes, *rest):
        records = inner(self, rollout, nodes, *rest)
        directions.append((rollout, nodes, [len(r.gram[0]) for r in records]))
        return records

    NodeDifferentiator._rollout_nodes = keep
    start_time = time.perf_counter()
    report = probe.run([ROW], responses=[responses])
    library = time.perf_counter() - start_time
    NodeDifferentiator._rollout_nodes = inner

    start_time = time.perf_counter()
    tokens = 0
    seen = set()
    for record in report.nodes:
        prefix = torch.cat([prompt, torch.tensor(responses[record.rollout][: record.depth], dtype=torch.long)])
        if tuple(prefix.tolist()) in seen:  # the library measures equal prefixes once; so may the reference
            continue
        seen.add(tuple(prefix.tolist()))
        for token, exact in zip(record.tokens, record.exact, strict=True):
            if exact:
                continue
            given = torch.cat([prefix, torch.tensor([int(token)])])
            found = reference.continuations(model, given, continuations, length - record.depth - 1, [eos])
            tokens += sum(map(len, found))
    sampled = time.perf_counter() - start_time
    start_time = time.perf_counter()
    for rollout, nodes, counts in directions:
        reference.logits(model, rollout.sequence)
        for teacher in TEACHERS.values():
            with teacher.policy(model) as (other, _):
                reference.logits(other, rollout.sequence)
        noise = [torch.randn(c, model.config.vocab_size) * 1e-3 for c in counts]
        reference.grams(model, rollout.sequence, [len(prompt) - 1 + n.depth for n in nodes], noise)
    differentiated = time.perf_counter() - start_time
    plain = sampled + differentiated
    print(
        f"{length} tokens, {rollouts} rollouts, {len(report.nodes)} nodes, {continuations} continuations a branch: "
        f"reference {plain:.0f} s (continuations {sampled:.0f}, {tokens / sampled:.0f} tokens/s), library "
        f"{library:.0f} s (continuations {report.seconds['continuations']:.0f}, "
        f"{report.generated_tokens['continuations'] / report.seconds['continuations']:.0f} tokens/s): "
        f"{plain / library:.2f} times as fast",
        flush=True,
    )
    return {
        "length": length, "ratio": plain / library, "reference_s": plain, "library_s": library,
        "reference_tokens": tokens, "library_tokens": report.generated_tokens["continuations"],
        "continuations_ratio": sampled / report.seconds["continuations"],
        "nodes": len(report.nodes), "continuations": continuations,
    }  # fmt: skip


def main(lengths, rollouts, continuations, branches, repeats, nodes=0):
    _, tokenizer = load_student(None, lambda *_: None)
    model = lora_student()
    return [
        compare(model, tokenizer, length, rollouts, continuations, branches, nodes)
        for _ in range(repeats)
        for length in lengths
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64])
    for name, default in (("rollouts", 2), ("continuations", 4), ("branches", 4), ("repeats", 1), ("nodes", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
