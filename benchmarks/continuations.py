"""Continuations per second: the shared prefix against `generate`, a repeated cache, and the full forward's roofline.

All in one run, turn by turn, so that a machine that wanders slows all alike. No continuation ends early: each way
samples the same number of tokens.

Run: python benchmarks/continuations.py [--branches 256] [--tokens 48] [--prefixes 48 256 500] [--repeats 2]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import reference
import torch
from student import lora_student
from transformers import GenerationConfig

from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest


def ours(model, prefix, branches, tokens, way):
    prefixes = prefill_rollouts(model, [prefix[:-1]], way=way)
    starts = [ContinuationRequest(0, len(prefix) - 1, int(prefix[-1]), tokens)] * branches
    sample_continuations(model, prefixes, starts, temperature=1.0, eos_token_ids=[], batch_size=branches)


def roofline(model, prefix, branches, tokens, way=None):
    """A full forward over as many tokens as one step has rows, eight times: logits at every position."""
    ids = torch.randint(1000, (max(1, branches // 64), 64), device=prefix.device)
    for _ in range(8):
        model(input_ids=ids, use_cache=False)


def paged(model, prefix, branches, tokens, way=None):
    """Transformers' continuous batching, which shares blocks of equal prefixes."""
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0)
    model.get_base_model().generate_batch([prefix.tolist()] * branches, generation_config=config)


def timed(function: Callable[..., object], *arguments: object) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(branches: int, tokens: int, prefix: int) -> None:
    """Peak of a fresh process over what it held before, against the caches it cannot do without."""
    model = lora_student()
    ids = torch.randint(1000, (prefix,), device=next(model.parameters()).device)
    config = model.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    needed = row * (prefix + branches * tokens)
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
        ours(model, ids, 4, 3, "shared prefix")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ours(model, ids, branches, tokens, "shared prefix")
            peak = torch.cuda.max_memory_allocated() - before
        else:
            before = _resident()
            ours(model, ids, branches, tokens, "shared prefix")
            peak = _peak() - before
    print(json.dumps({"prefix": prefix, "needed_mb": needed / 1e6, "peak_mb": peak / 1e6, "ratio": peak / needed}))


def _peak() -> int:
    # Not getrusage: its peak counts that of the process which started this one.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _resident() -> int:
    """Memory of the process now; its peak is set back to that."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(branches: int, tokens: int, prefixes: list[int], repeats: int) -> dict[str, object]:
    model = lora_student()
    device = next(model.parameters()).device
    ways = {
        "shared prefix": ours,
        "repeated cache": ours,
        "roofline": roofline,
        "generate": lambda m, p, b, t, w: reference.continuations(m, p, b, t, []),
    }
    speeds: dict[str, dict[int, list[float]]] = {way: {p: [] for p in prefixes} for way in ways}
    for turn in range(repeats):
        for length in prefixes:
            prefix = torch.randint(1000, (length,), device=device)
            for way, function in ways.items():
                seconds = timed(function, model, prefix, branches, tokens, way)
                count = max(1, branches // 64) * 64 * 8 if way == "roofline" else branches * tokens
                speeds[way][length].append(count / seconds)
                print(f"turn {turn}, prefix {length}: {way} {count / seconds:.0f} tokens/s", flush=True)
    try:
        prefix = torch.randint(1000, (prefixes[0],), device=device)
        paged_speed: object = branches * tokens / timed(paged, model, prefix, branches, tokens)
    except Exception as error:
        paged_speed = f"does not run here: {type(error).__name__}: {str(error)[:80]}"
    print(f"generate_batch at prefix {prefixes[0]}: {paged_speed}")
    middle = {way: {p: statistics.median(s) for p, s in by.items()} for way, by in speeds.items()}
    for length in prefixes:
        own = middle["shared prefix"][length]
        row = ", ".join(f"{own / middle[w][length]:.2f} x {w}" for w in ways if w != "shared prefix")
        print(f"prefix {length}: {own:.0f} tokens/s = {row}")
    print(f"speed at {prefixes[-1]} over speed at {prefixes[0]}: "
          f"{middle['shared prefix'][prefixes[-1]] / middle['shared prefix'][prefixes[0]]:.2f}")  # fmt: skip
    used = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--memory", "--branches", str(branches), "--tokens", str(tokens),
             "--prefixes", str(prefixes[-1])], check=True, capture_output=True, text=True,
        ).stdout.splitlines()[-1]
    )  # fmt: skip
    print(f"peak memory over one prefix cache and {branches} suffix caches: {used['ratio']:.2f}")
    return {"speeds": speeds, "memory": used, "paged": paged_speed, "device": str(device)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--branches", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[48, 256, 500])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.memory:
        memory(given.branches, given.tokens, given.prefixes[-1])
    else:
        main(given.branches, given.tokens, given.prefixes, given.repeats)
