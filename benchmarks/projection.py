"""Forward-mode projection against exact vector-Jacobian products, with every token of a response as a node.

Run: python benchmarks/projection.py [--length 256] [--directions 7] [--projections 64]
"""

import time

import torch
from sizes import parse_sizes
from student import lora_student

from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.vjp import node_gram_matrices

USUAL = {"length": 256, "directions": 7, "projections": 64}
SMOKE = {"length": 16, "directions": 2, "projections": 2}
EXACT_NODES = 16
"""Nodes whose gradients are also computed exactly; the time of the others is in proportion."""


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """``(C, C)`` cosines of the directions of a Gram matrix."""
    return gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt()


def main(length: int, directions: int, projections: int) -> dict[str, float]:
    """Print and return how many times as fast it is, and what a tangent costs."""
    student = lora_student()
    token_ids = torch.randint(0, 40_000, (length,))
    positions = list(range(length // 8, length))
    stride = max(1, len(positions) // EXACT_NODES)
    exact_positions = positions[::stride]
    cotangents = [torch.randn(directions, student.config.vocab_size) * 1e-3 for _ in exact_positions]
    node_gram_matrices(student, token_ids[:16], [min(15, length - 1)], cotangents[:1])  # finds out what is supported
    start = time.perf_counter()
    exact = node_gram_matrices(student, token_ids, exact_positions, cotangents).grams
    exact_seconds = (time.perf_counter() - start) / len(exact_positions) * len(positions)
    all_cotangents = [cotangents[min(position // stride, len(exact_positions) - 1)] for position in positions]
    start = time.perf_counter()
    projected = projected_gram_matrices(
        student, token_ids, positions, all_cotangents, projections, torch.Generator().manual_seed(0)
    )
    projected_seconds = time.perf_counter() - start
    index_of = {position: index for index, position in enumerate(positions)}
    gaps = [
        cosines(by_module.sum(0)) - cosines(projected[index_of[position]][0])
        for position, by_module, cotangent in zip(exact_positions, exact, cotangents, strict=True)
        if all_cotangents[index_of[position]] is cotangent
    ]
    spread = float(torch.cat([gap.flatten() for gap in gaps]).std()) if gaps else float("nan")
    exact_tokens = sum(position + 1 for position in positions) * directions
    tangent_cost = (projected_seconds / (projections * length)) / (exact_seconds / exact_tokens)
    print(
        f"{length} tokens, {len(positions)} nodes x {directions} directions: exact {exact_seconds:.0f} s (from "
        f"{len(exact_positions)} nodes), {projections} projections {projected_seconds:.0f} s: "
        f"{exact_seconds / projected_seconds:.1f} times as fast; cosines differ by {spread:.3f} (1 / sqrt(K) = "
        f"{projections**-0.5:.3f}); a tangent costs as much as {tangent_cost:.2f} directions over as many tokens"
    )
    return {"ratio": exact_seconds / projected_seconds, "factor": tangent_cost}


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
