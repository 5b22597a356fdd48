"""Drawing tokens in two levels against `torch.multinomial`, for one step of 256 continuations.

Run: python benchmarks/sampling.py [--rows 256] [--vocabulary 49152] [--repeats 10]
"""

import statistics
import time

import torch
from sizes import parse_sizes

from odp_callbacks.engine.sampling.categorical import sample_tokens

USUAL = {"rows": 256, "vocabulary": 49152, "repeats": 10}
SMOKE = {"rows": 8, "vocabulary": 1000, "repeats": 2}


def main(rows: int, vocabulary: int, repeats: int) -> list[float]:
    """Print how many times as fast it is, and return it for every repeat."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(rows, vocabulary, device=device)
    ratios, library_seconds = [], []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        torch.multinomial(torch.softmax(logits, dim=-1), 1).sum().item()
        middle = time.perf_counter()
        sample_tokens(logits, 1.0)[0].sum().item()
        end = time.perf_counter()
        if repeat:  # the first warms both up
            ratios.append((middle - start) / (end - middle))
            library_seconds.append(end - middle)
    print(
        f"{rows} x {vocabulary}: {statistics.median(library_seconds) * 1000:.0f} ms, {statistics.median(ratios):.1f} "
        f"times as fast as torch.multinomial ({min(ratios):.1f} to {max(ratios):.1f}, {repeats} repeats)"
    )
    return ratios


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
