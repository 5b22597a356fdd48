"""Forward-mode projection against exact pull-backs, with every token of a response as a node.

Run: python benchmarks/projection.py [--length 256] [--directions 7] [--projections 64]
"""

import argparse
import time

import torch
from student import lora_student

from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.vjp import node_gram_matrices


def main(length: int, directions: int, projections: int) -> dict[str, float]:
    student = lora_student()
    ids = torch.randint(0, 40_000, (length,))
    positions = list(range(length // 8, length))
    # The exact way on some of the nodes, spread evenly: its time is proportional to their number.
    some = positions[:: max(1, len(positions) // 16)]
    cotangents = [torch.randn(directions, student.config.vocab_size) * 1e-3 for _ in some]
    node_gram_matrices(student, ids[:16], [15], cotangents[:1])
    start = time.perf_counter()
    exact = node_gram_matrices(student, ids, some, cotangents).grams
    pulled = (time.perf_counter() - start) / len(some) * len(positions)
    every = [cotangents[min(p // max(1, len(positions) // 16), len(some) - 1)] for p in range(len(positions))]
    start = time.perf_counter()
    found = projected_gram_matrices(student, ids, positions, every, projections, torch.Generator().manual_seed(0))
    pushed = time.perf_counter() - start
    place = {p: i for i, p in enumerate(positions)}
    errors = []
    for p, gram, v in zip(some, exact, cotangents):
        if every[place[p]] is v:
            a, b = gram.sum(0), found[place[p]][0]
            errors += [(x / (x.diagonal()[:, None] * x.diagonal()).sqrt()) for x in (a, b)]
    gaps = torch.cat([(a - b).flatten() for a, b in zip(errors[::2], errors[1::2])])
    tokens = sum(p + 1 for p in positions) * directions
    factor = (pushed / (projections * length)) / (pulled / tokens)
    print(f"{length} tokens, {len(positions)} nodes x {directions} directions: exact {pulled:.0f} s (from {len(some)} "
          f"nodes), {projections} projections {pushed:.0f} s: {pulled / pushed:.1f} times as fast; cosines differ by "
          f"{float(gaps.std()):.3f} (1 / sqrt(K) = {projections ** -0.5:.3f}); one tangent costs {factor:.2f} "
          "directions over as many tokens")  # fmt: skip
    return {"ratio": pulled / pushed, "factor": factor}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("length", 256), ("directions", 7), ("projections", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
