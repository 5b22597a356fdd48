"""Batched vector-Jacobian products against one forward and one backward pass for each node and direction.

Run: python benchmarks/pullback.py [--repeats 3] [--length 96] [--nodes 12] [--directions 3]
"""

import statistics
import time

import reference
import torch
from sizes import parse_sizes
from student import lora_student

from odp_callbacks.engine.gradients.vjp import node_gram_matrices

USUAL = {"repeats": 3, "length": 96, "nodes": 12, "directions": 3}
SMOKE = {"repeats": 1, "length": 8, "nodes": 2, "directions": 2}


def main(repeats: int, length: int, nodes: int, directions: int) -> dict[str, list[float]]:
    """Print how many times as fast it is, for nodes at two kinds of places, and return it for every repeat."""
    student = lora_student()
    device = next(student.parameters()).device
    token_ids = torch.randint(0, 40_000, (length,), device=device)
    cotangents = torch.randn(nodes, directions, student.config.vocab_size, device=device) * 1e-3
    spacing = length / nodes
    places = {
        "nodes spread evenly": [round((node + 1) * spacing) - 1 for node in range(nodes)],
        "nodes at the end": list(range(length - nodes, length)),
    }
    ratios: dict[str, list[float]] = {name: [] for name in places}
    # The first call also finds out what the model supports.
    node_gram_matrices(student, token_ids, places["nodes at the end"], list(cotangents))
    for repeat in range(repeats):
        for name, positions in places.items():
            start = time.perf_counter()
            expected = reference.gram_matrices(student, token_ids, positions, list(cotangents))
            middle = time.perf_counter()
            grams = node_gram_matrices(student, token_ids, positions, list(cotangents)).grams
            end = time.perf_counter()
            ratios[name].append((middle - start) / (end - middle))
            error = max(
                float((by_module.sum(0) - exact.cpu()).abs().max() / exact.abs().max())
                for by_module, exact in zip(grams, expected, strict=True)
            )
            print(
                f"repeat {repeat}, {name}: reference {middle - start:.2f} s, library {end - middle:.2f} s, "
                f"Gram matrices differ by {error:.0e}",
                flush=True,
            )
    for name, values in ratios.items():
        print(
            f"{nodes} nodes x {directions} directions, {length} tokens, {name}: {statistics.median(values):.2f} times "
            f"as fast as the reference (median of {repeats}; {min(values):.2f} to {max(values):.2f})"
        )
    return ratios


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
