"""Every speed of the library, as ratios against named alternatives: one command, a table and a plot in `results/`.

About two hours on two cores. `--quick` leaves out the long responses (40 minutes).

Run: python benchmarks/run.py [--quick] [--only continuations pullback probe growth projection sampling hooks]
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import continuations
import growth
import hooks
import matplotlib
import probe
import projection
import pullback
import sampling
import torch

matplotlib.use("agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PARTS = ("continuations", "pullback", "probe", "growth", "projection", "sampling", "hooks")


def measure(part: str, quick: bool) -> object:
    if part == "continuations":
        return continuations.main(256, 48, [48, 256, 500], 1 if quick else 2)
    if part == "pullback":
        return pullback.main(3, 96, 12, 3)
    if part == "probe":
        found = probe.main([16, 32, 64], 2, 4, 4, 1)
        return found if quick else [*found, *probe.main([512], 1, 4, 3, 1, nodes=4)]
    if part == "growth":
        return growth.main()
    if part == "projection":
        return projection.main(256, 7, 64)
    if part == "sampling":
        return sampling.main(256, 49152, 10)
    return hooks.main()


def table(found: dict[str, object]) -> str:
    rows = [("what", "library", "against", "ratio")]
    if speeds := found.get("continuations"):
        for prefix in speeds["speeds"]["shared prefix"]:
            of = {way: statistics.median(by[prefix]) for way, by in speeds["speeds"].items()}
            own = of.pop("shared prefix")
            rows += [
                (f"256 continuations x 48 tokens, prefix {prefix}", f"{own:.0f} tokens/s", way, f"{own / other:.2f}")
                for way, other in of.items()
            ]
        rows.append(("their peak memory", f"{speeds['memory']['peak_mb']:.0f} MB",
                     "one prefix cache and 256 suffix caches", f"{speeds['memory']['ratio']:.2f}"))  # fmt: skip
    for name, ratios in (found.get("pullback") or {}).items():
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((f"12 nodes x 3 pull-backs, {name}", "", "reference", spread))
    for row in found.get("probe") or []:
        what = f"whole probe, {row['length']} tokens, {row['continuations']} continuations a branch"
        rows.append((what, f"{row['library_s']:.0f} s", "reference", f"{row['ratio']:.2f}"))
    for name, curve in (found.get("growth") or {}).items():
        rows.append((f"time over {name}, {curve['values'][0]} to {curve['values'][-1]}",
                     f"{curve['seconds'][0]:.2f} to {curve['seconds'][-1]:.2f} s", "power law",
                     f"exponent {curve['exponent']:.2f}, last step {curve['last']:.2f}"))  # fmt: skip
    if fast := found.get("projection"):
        rows.append(("every token of 256 as a node, 64 projections", "", "exact pull-backs", f"{fast['ratio']:.2f}"))
    if ratios := found.get("sampling"):
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        rows.append(("one token for each of 256 rows", "", "torch.multinomial", spread))
    if "hooks" in found:
        rows.append(("a step without a probe", f"{found['hooks'] * 1e6:.1f} us", "", ""))
    return "\n".join(
        "| " + " | ".join(row) + " |" + ("\n|---|---|---|---|" if i == 0 else "") for i, row in enumerate(rows)
    )


def plot(found: dict[str, object]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    if speeds := found.get("continuations"):
        for way, by in speeds["speeds"].items():
            prefixes = [int(p) for p in by]
            axes[0].plot(prefixes, [statistics.median(s) for s in by.values()], "o-", label=way)
        axes[0].set(
            xlabel="prefix (tokens)", ylabel="tokens per second", title="256 continuations of 48 tokens", ylim=(0, None)
        )
        axes[0].legend()
    if rows := found.get("probe"):
        # Bars, not a line: the long response has fewer rollouts and nodes than the others.
        bars = axes[1].bar([str(r["length"]) for r in rows], [r["ratio"] for r in rows])
        axes[1].bar_label(bars, [f"{r['ratio']:.1f}\n{r['nodes']} nodes" for r in rows])
        axes[1].set(xlabel="response (tokens)", ylabel="times as fast", title="Whole probe against the reference")
        axes[1].margins(y=0.2)
    for name, curve in (found.get("growth") or {}).items():
        relative = [v / curve["values"][0] for v in curve["values"]]
        axes[2].plot(
            relative,
            [s / curve["seconds"][0] for s in curve["seconds"]],
            "o-",
            label=f"{name} ({curve['exponent']:.2f})",
        )
    axes[2].plot([1, 64], [1, 64], ":", color="grey", label="proportional")
    axes[2].set(xlabel="times as much", ylabel="times as long", title="Growth (exponent)", xscale="log", yscale="log")
    axes[2].legend(fontsize=8)
    figure.savefig(RESULTS / "speed.png", dpi=110)


def main(quick: bool, only: list[str]) -> None:
    kept = RESULTS / "speed.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in only:
        print(f"== {part}", flush=True)
        found[part] = measure(part, quick)
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{platform.processor()} CPU, {torch.get_num_threads()} threads"
        )
        found["machine"] = f"{device}, torch {torch.__version__}"
        kept.write_text(json.dumps(found, indent=1))
        (RESULTS / "speed.md").write_text(f"{found['machine']}\n\n{table(json.loads(kept.read_text()))}\n")
        plot(json.loads(kept.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    main(given.quick, given.only)
