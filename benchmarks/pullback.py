"""Speed of the engine's batched pull-back against one backward for each direction, as a ratio within one run.

Run: python benchmarks/pullback.py [--repeats 3]
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from odp_callbacks.demo.student import load_student
from odp_callbacks.engine.pullback import pull_back
from odp_callbacks.functional import lora_gradients


def main(repeats: int, length: int, nodes: int, directions: int) -> None:
    model, _ = load_student(None, print)
    student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).eval()
    ids = torch.randint(0, 40_000, (length,))
    positions = torch.arange(length - nodes, length)
    cotangents = torch.randn(nodes, directions, model.config.vocab_size) * 1e-3
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        plain = lora_gradients(student, ids, positions, cotangents)
        middle = time.perf_counter()
        grams = pull_back(student, ids, positions.tolist(), list(cotangents))
        end = time.perf_counter()
        ratios.append((middle - start) / (end - middle))
        expected = plain.double() @ plain.double().mT
        error = max(float((g.sum(0) - e).abs().max() / e.abs().max()) for g, e in zip(grams, expected, strict=True))
        print(f"one backward each {middle - start:.2f} s, batched {end - middle:.2f} s, Gram differs by {error:.1e}")
    print(
        f"{nodes} nodes x {directions} directions, {length} tokens: batched is {statistics.median(ratios):.2f} times "
        f"as fast (median of {repeats}; {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("repeats", 3), ("length", 96), ("nodes", 12), ("directions", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
