"""How a probe's time grows: with response length, nodes, branches, continuations, teachers and vocabulary.

On a small random model, so that all curves take minutes. Beside each curve stands the exponent of the best power law:
1 where the time is proportional, less where something is shared.

Run: python benchmarks/growth.py
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sizes import size_parser
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from odp_callbacks import ProbeConfig, Teacher
from odp_callbacks.engine.probe import Probe

CURVES = {
    "length": [64, 128, 256, 512, 1024],
    "nodes": [4, 8, 16, 32],
    "branches": [2, 4, 8, 16],
    "continuations": [2, 4, 8, 16, 32],
    "teachers": [1, 2, 4, 8],
    "vocabulary": [1000, 4000, 16000, 64000],
}
USUAL = {"length": 64, "nodes": 6, "branches": 3, "continuations": 4, "teachers": 2, "vocabulary": 2000}
"""The size of a probe where a curve varies something else."""
BUDGET, LENGTHS_AT_BUDGET = 20_000, CURVES["length"]
"""The curve over length where the probe chooses nodes and continuations itself, from a fixed number of tokens."""
SMOKE_CURVES = {"nodes": [1, 2], "teachers": [1, 2]}
SMOKE = {"length": 8, "nodes": 2, "branches": 2, "continuations": 1, "teachers": 1, "vocabulary": 100}


def evenly(count: int) -> Callable[[Any, Any], list[tuple[int, float]]]:
    """A node selector: ``count`` nodes, evenly spread over the response."""

    def select(rollout: Any, generator: Any) -> list[tuple[int, float]]:
        last = len(rollout.response_ids) - 1
        return [(round(node * last / count), 1.0) for node in range(count)]

    return select


def random_student(vocabulary: int) -> tuple[Any, Any]:
    """A small model whose responses never end by themselves, and a tokenizer whose tokens are numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():  # a constant feature, which makes the end token too unlikely to be drawn
        base = model.get_base_model()
        base.model.embed_tokens.weight[:, 0] = 5
        base.lm_head.weight[:, 0] = 0
        base.lm_head.weight[1, 0] = -100
    words = {str(token): token for token in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="1")
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return model, tokenizer


def probe_seconds(
    length: int,
    nodes: int,
    branches: int,
    continuations: int,
    teachers: int,
    vocabulary: int,
    repeats: int = 3,
    budget: int | None = None,
) -> float:
    """Seconds of a probe of this size, the best of some repeats; with a budget, nodes and continuations follow."""
    model, tokenizer = random_student(vocabulary)
    config = ProbeConfig(
        rollouts_per_question=1,
        max_new_tokens=length,
        continuations=continuations,
        max_branches=branches,
        branch_mass=1.0,
        tail_draws=1,
        nodes=evenly(nodes) if budget is None else "balanced",
        budget=budget,
        update=budget is None,
        step_alignment=False,
    )
    contexts = {str(teacher): Teacher(f"{teacher + 2} 7 7 {{prompt}}") for teacher in range(teachers)}

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion) % 2) for completion in completions]

    probe = Probe(model, tokenizer, reward, contexts, config)
    questions = 1 if budget is None else 4  # so that every probe has enough nodes for its budget
    responses = [[torch.randint(2, vocabulary, (length,)).tolist()] for _ in range(questions)]
    rows = [{"prompt": " ".join(str((word + number) % 90 + 2) for word in range(32))} for number in range(questions)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        probe.run(rows, responses=responses)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of the best power law."""
    log_sizes, log_seconds = [math.log(size) for size in sizes], [math.log(time_) for time_ in seconds]
    mean_size, mean_seconds = statistics.mean(log_sizes), statistics.mean(log_seconds)
    covariance = sum(
        (size - mean_size) * (time_ - mean_seconds) for size, time_ in zip(log_sizes, log_seconds, strict=True)
    )
    return covariance / sum((size - mean_size) ** 2 for size in log_sizes)


def main(
    curves: dict[str, list[int]] = CURVES,
    usual: dict[str, int] = USUAL,
    repeats: int = 3,
    budget: int = BUDGET,
    lengths: Sequence[int] = LENGTHS_AT_BUDGET,
) -> dict[str, Any]:
    """Print and return a curve for each size."""
    results = {}
    at_budget = f"length at {budget} tokens"
    for name, values in {**curves, at_budget: lengths}.items():
        if name == at_budget:
            seconds = [probe_seconds(**{**usual, "length": value}, repeats=repeats, budget=budget) for value in values]
        else:
            seconds = [probe_seconds(**{**usual, name: value}, repeats=repeats) for value in values]
        results[name] = {
            "values": values,
            "seconds": seconds,
            "exponent": exponent(values, seconds),
            # Of the last doubling, where the curve comes closest to its limit.
            "last": exponent(values[-2:], seconds[-2:]),
        }
        points = ", ".join(f"{value}: {time_:.2f} s" for value, time_ in zip(values, seconds, strict=True))
        print(
            f"{name}: {points}; exponent {results[name]['exponent']:.2f} (last step {results[name]['last']:.2f})",
            flush=True,
        )
    return results


if __name__ == "__main__":
    if size_parser(__doc__, {}, {}).parse_args().smoke:
        main(SMOKE_CURVES, SMOKE, repeats=1, budget=100, lengths=[8, 16])
    else:
        main()
