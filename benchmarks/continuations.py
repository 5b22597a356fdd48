"""Continuations per second: the shared prefix against `generate`, a repeated cache, and full forward passes.

All methods take turns in one run, so that changes in the machine's speed affect all alike. No continuation ends early:
each method samples the same number of tokens.

Run: python benchmarks/continuations.py [--branches 256] [--tokens 48] [--prefixes 48 256 500] [--repeats 2]
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import torch
from sizes import size_parser
from student import lora_student
from torch import Tensor
from transformers import GenerationConfig

from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.requests import ContinuationRequest

USUAL = {"branches": 256, "tokens": 48, "prefixes": [48, 256, 500], "repeats": 2}
SMOKE = {"branches": 4, "tokens": 2, "prefixes": [8, 16], "repeats": 1}
OURS = "shared prefix"
FORWARD_PASSES, FORWARD_LENGTH = 8, 64
Method = Callable[[Any, Tensor, int, int], object]
"""Samples: a model, a prefix ``(T,)``, a number of branches, and of tokens of each."""


def library_with(backend: str) -> Method:
    """The library's sampling with one of its backends."""

    def sample(model: Any, prefix: Tensor, branches: int, tokens: int) -> None:
        prefilled = prefill_rollouts(model, [prefix[:-1]], backend=backend)
        requests = [ContinuationRequest(0, len(prefix) - 1, int(prefix[-1]), tokens)] * branches
        sample_continuations(model, prefilled, requests, temperature=1.0, eos_token_ids=[], batch_size=branches)

    return sample


def forward_passes(model: Any, prefix: Tensor, branches: int, tokens: int) -> None:
    """Full forward passes over as many tokens as one step has rows, with logits at every position: the roofline."""
    rows = max(1, branches // FORWARD_LENGTH)
    token_ids = torch.randint(1000, (rows, FORWARD_LENGTH), device=prefix.device)
    for _ in range(FORWARD_PASSES):
        model(input_ids=token_ids, use_cache=False)


def generate_batch(model: Any, prefix: Tensor, branches: int, tokens: int) -> None:
    """Transformers' continuous batching, which shares blocks of equal prefixes."""
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0)
    model.get_base_model().generate_batch([prefix.tolist()] * branches, generation_config=config)


METHODS: dict[str, Method] = {
    OURS: library_with("shared prefix"),
    "repeated cache": library_with("repeated cache"),
    "roofline": forward_passes,
    "generate": lambda model, prefix, branches, tokens: reference.continuations(model, prefix, branches, tokens, []),
}


def time_method(method: Method, *arguments: Any) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        method(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def print_memory(branches: int, tokens: int, prefix_length: int) -> None:
    """Print the peak memory of a new process above what it held before, against the caches that are necessary."""
    model = lora_student()
    prefix = torch.randint(1000, (prefix_length,), device=next(model.parameters()).device)
    config = model.config
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    needed = bytes_per_token * (prefix_length + branches * tokens)
    with torch.no_grad():
        model(input_ids=prefix[None], use_cache=False)
        METHODS[OURS](model, prefix, 4, 3)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            METHODS[OURS](model, prefix, branches, tokens)
            peak = torch.cuda.max_memory_allocated() - before
        else:
            before = _reset_peak()
            METHODS[OURS](model, prefix, branches, tokens)
            peak = _peak_bytes() - before
    result = {"prefix": prefix_length, "needed_mb": needed / 1e6, "peak_mb": peak / 1e6, "ratio": peak / needed}
    print(json.dumps(result))


def _peak_bytes() -> int:
    # Not getrusage: its peak includes that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_line = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak_line.split()[1]) * 1024


def _reset_peak() -> int:
    """Set the process's peak memory back to what it holds now, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_memory(branches: int, tokens: int, prefix_length: int) -> dict[str, float]:
    """Run :func:`print_memory` in a new process."""
    command = [sys.executable, __file__, "--memory", "--branches", str(branches), "--tokens", str(tokens)]
    finished = subprocess.run([*command, "--prefixes", str(prefix_length)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def measure_speeds(
    model: Any, branches: int, tokens: int, prefixes: list[int], repeats: int
) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each method, by the prefix's length, for every repeat."""
    speeds: dict[str, dict[int, list[float]]] = {name: {length: [] for length in prefixes} for name in METHODS}
    device = next(model.parameters()).device
    for repeat in range(repeats):
        for length in prefixes:
            prefix = torch.randint(1000, (length,), device=device)
            for name, method in METHODS.items():
                seconds = time_method(method, model, prefix, branches, tokens)
                forward_tokens = max(1, branches // FORWARD_LENGTH) * FORWARD_LENGTH * FORWARD_PASSES
                speed = (forward_tokens if name == "roofline" else branches * tokens) / seconds
                speeds[name][length].append(speed)
                print(f"repeat {repeat}, prefix {length}: {name} {speed:.0f} tokens/s", flush=True)
    return speeds


def measure_paged(model: Any, branches: int, tokens: int, prefix_length: int) -> float | str:
    """Tokens per second of `generate_batch`, or why it does not run here."""
    prefix = torch.randint(1000, (prefix_length,), device=next(model.parameters()).device)
    try:
        return branches * tokens / time_method(generate_batch, model, prefix, branches, tokens)
    except Exception as error:
        return f"does not run here: {type(error).__name__}: {str(error)[:80]}"


def main(branches: int, tokens: int, prefixes: list[int], repeats: int) -> dict[str, object]:
    """Print and return speeds and memory."""
    model = lora_student()
    speeds = measure_speeds(model, branches, tokens, prefixes, repeats)
    paged_speed = measure_paged(model, branches, tokens, prefixes[0])
    print(f"generate_batch at prefix {prefixes[0]}: {paged_speed}")
    median = {
        name: {length: statistics.median(values) for length, values in by_length.items()}
        for name, by_length in speeds.items()
    }
    for length in prefixes:
        speed = median[OURS][length]
        ratios = ", ".join(f"{speed / median[name][length]:.2f} x {name}" for name in METHODS if name != OURS)
        print(f"prefix {length}: {speed:.0f} tokens/s = {ratios}")
    print(
        f"speed at {prefixes[-1]} over speed at {prefixes[0]}: "
        f"{median[OURS][prefixes[-1]] / median[OURS][prefixes[0]]:.2f}"
    )
    memory = measure_memory(branches, tokens, prefixes[-1])
    print(f"peak memory over one prefix cache and {branches} suffix caches: {memory['ratio']:.2f}")
    return {"speeds": speeds, "memory": memory, "paged": paged_speed, "device": str(next(model.parameters()).device)}


if __name__ == "__main__":
    parser = size_parser(__doc__, USUAL, SMOKE)
    parser.add_argument("--memory", action="store_true", help="print only the peak memory of this process")
    sizes = vars(parser.parse_args())
    del sizes["smoke"]
    if sizes.pop("memory"):
        print_memory(sizes["branches"], sizes["tokens"], sizes["prefixes"][-1])
    else:
        main(**sizes)
