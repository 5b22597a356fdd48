"""Pull-backs against the reference, which runs one forward and one backward for each node and direction.

Run: python benchmarks/pullback.py [--repeats 3] [--length 96] [--nodes 12] [--directions 3]
"""

import argparse
import statistics
import time

import reference
import torch
from student import lora_student

from odp_callbacks.engine.gradients.vjp import node_gram_matrices


def main(repeats: int, length: int, nodes: int, directions: int) -> dict[str, list[float]]:
    student = lora_student()
    device = next(student.parameters()).device
    ids = torch.randint(0, 40_000, (length,), device=device)
    cotangents = torch.randn(nodes, directions, student.config.vocab_size, device=device) * 1e-3
    step = length / nodes
    places = {
        "nodes spread evenly": [round((n + 1) * step) - 1 for n in range(nodes)],
        "nodes at the end": list(range(length - nodes, length)),
    }
    ratios: dict[str, list[float]] = {name: [] for name in places}
    node_gram_matrices(student, ids, places["nodes at the end"], list(cotangents))  # the trial of the model, once
    for turn in range(repeats):
        for name, positions in places.items():
            start = time.perf_counter()
            expected = reference.grams(student, ids, positions, list(cotangents))
            middle = time.perf_counter()
            grams = node_gram_matrices(student, ids, positions, list(cotangents)).grams
            end = time.perf_counter()
            ratios[name].append((middle - start) / (end - middle))
            error = max(float((g.sum(0) - e.cpu()).abs().max() / e.abs().max()) for g, e in zip(grams, expected))
            print(f"turn {turn}, {name}: reference {middle - start:.2f} s, library {end - middle:.2f} s, "
                  f"Gram differs by {error:.0e}", flush=True)  # fmt: skip
    for name, found in ratios.items():
        print(f"{nodes} nodes x {directions} directions, {length} tokens, {name}: {statistics.median(found):.2f} times "
              f"as fast as the reference (median of {repeats}; {min(found):.2f} to {max(found):.2f})")  # fmt: skip
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("repeats", 3), ("length", 96), ("nodes", 12), ("directions", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
