"""How a probe's time grows: with response length, nodes, branches, continuations, teachers and vocabulary.

On a small random model, so that all curves take minutes. Beside each curve the exponent of the best power law: 1 where
the time is proportional, less where something is shared.

Run: python benchmarks/growth.py
"""

import math
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
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


def evenly(count):
    """As many nodes, evenly spread over the response."""

    def select(rollout, generator):
        last = len(rollout.response_ids) - 1
        return [(round(i * last / count), 1.0) for i in range(count)]

    return select


def student(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=2048, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():  # a feature that is always there, by which the token that ends responses is never drawn
        base = model.get_base_model()
        base.model.embed_tokens.weight[:, 0] = 5
        base.lm_head.weight[:, 0] = 0
        base.lm_head.weight[1, 0] = -100
    words = {str(i): i for i in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="1")
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return model, tokenizer


def seconds(length, nodes, branches, continuations, teachers, vocabulary):
    model, tokenizer = student(vocabulary)
    config = ProbeConfig(
        rollouts_per_question=1, max_new_tokens=length, continuations=continuations, max_branches=branches,
        branch_mass=1.0, tail_draws=1, nodes=evenly(nodes), step_alignment=False,
    )  # fmt: skip
    contexts = {str(i): Teacher(f"{i + 2} 7 7 {{prompt}}") for i in range(teachers)}
    probe = Probe(model, tokenizer, lambda completions, **_: [float(len(c) % 2) for c in completions], contexts, config)
    responses = [[torch.randint(2, vocabulary, (length,)).tolist()]]
    rows = [{"prompt": " ".join(str(i % 90 + 2) for i in range(32))}]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        probe.run(rows, responses=responses)
        taken.append(time.perf_counter() - start)
    return min(taken)


def slope(xs, ys):
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def main():
    found = {}
    for name, values in CURVES.items():
        times = [seconds(**{**USUAL, name: value}) for value in values]
        # The last doublings: where the curve is what it will be.
        found[name] = {"values": values, "seconds": times, "exponent": slope(values, times),
                       "last": slope(values[-2:], times[-2:])}  # fmt: skip
        row = ", ".join(f"{v}: {t:.2f} s" for v, t in zip(values, times))
        print(
            f"{name}: {row}; exponent {found[name]['exponent']:.2f} (last step {found[name]['last']:.2f})", flush=True
        )
    return found


if __name__ == "__main__":
    main()
