"""Drawing tokens in two levels against `torch.multinomial`, for one step of 256 continuations.

Run: python benchmarks/sampling.py [--rows 256] [--vocabulary 49152] [--repeats 10]
"""

import argparse
import statistics
import time

import torch

from odp_callbacks.engine.sampling.categorical import sample_tokens


def main(rows: int, vocabulary: int, repeats: int) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(rows, vocabulary, device=device)
    ratios, own = [], []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        torch.multinomial(torch.softmax(logits, dim=-1), 1).sum().item()
        middle = time.perf_counter()
        sample_tokens(logits, 1.0)[0].sum().item()
        end = time.perf_counter()
        if turn:  # the first warms both up
            ratios.append((middle - start) / (end - middle))
            own.append(end - middle)
    print(f"{rows} x {vocabulary}: {statistics.median(own) * 1000:.0f} ms, {statistics.median(ratios):.1f} times as "
          f"fast as torch.multinomial ({min(ratios):.1f} to {max(ratios):.1f}, {repeats} turns)")  # fmt: skip
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 256), ("vocabulary", 49152), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
