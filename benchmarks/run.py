"""Every speed of the library, as ratios against named alternatives: one command, a table and a plot in `results/`.

About two hours on two cores. `--quick` leaves out the long responses (40 minutes).

Run: python benchmarks/run.py [--quick] [--only continuations pullback probe growth projection sampling hooks]
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

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

from odp_callbacks.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PARTS = ("continuations", "pullback", "probe", "growth", "projection", "sampling", "hooks")
LONG_PROBE = {"lengths": [512], "rollouts": 1, "continuations": 4, "branches": 3, "repeats": 1, "nodes": 4}


def measure(part: str, quick: bool) -> Any:
    """Run one of the parts at its usual size."""
    if part == "continuations":
        return continuations.main(**{**continuations.USUAL, "repeats": 1 if quick else 2})
    if part == "probe":
        results = probe.main(**probe.USUAL)
        return results if quick else [*results, *probe.main(**LONG_PROBE)]
    if part == "growth":
        return growth.main()
    module = {"pullback": pullback, "projection": projection, "sampling": sampling, "hooks": hooks}[part]
    return module.main(**module.USUAL)


def spread(ratios: list[float], digits: int = 2) -> str:
    """Median with the smallest and the largest."""
    return f"{statistics.median(ratios):.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


def table(results: dict[str, Any]) -> str:
    """A Markdown table of all that has been measured."""
    rows = [("what", "library", "against", "ratio"), *continuation_rows(results), *other_rows(results)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|", *lines[1:]])


def continuation_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows on the speed and the memory of continuations."""
    if not (measured := results.get("continuations")):
        return []
    rows = []
    for prefix in measured["speeds"]["shared prefix"]:
        speeds = {name: statistics.median(by_length[prefix]) for name, by_length in measured["speeds"].items()}
        library = speeds.pop("shared prefix")
        what = f"256 continuations x 48 tokens, prefix {prefix}"
        rows += [(what, f"{library:.0f} tokens/s", name, f"{library / speed:.2f}") for name, speed in speeds.items()]
    memory = measured["memory"]
    caches = "one prefix cache and 256 suffix caches"
    return [*rows, ("their peak memory", f"{memory['peak_mb']:.0f} MB", caches, f"{memory['ratio']:.2f}")]


def other_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows on gradients, whole probes, growth and the rest."""
    rows = [
        (f"12 nodes x 3 vector-Jacobian products, {name}", "", "reference", spread(ratios))
        for name, ratios in (results.get("pullback") or {}).items()
    ]
    rows += [
        (
            f"whole probe, {row['length']} tokens, {row['continuations']} continuations a branch",
            f"{row['library_s']:.0f} s",
            "reference",
            f"{row['ratio']:.2f}",
        )
        for row in results.get("probe") or []
    ]
    rows += [
        (
            f"time over {name}, {curve['values'][0]} to {curve['values'][-1]}",
            f"{curve['seconds'][0]:.2f} to {curve['seconds'][-1]:.2f} s",
            "power law",
            f"exponent {curve['exponent']:.2f}, last step {curve['last']:.2f}",
        )
        for name, curve in (results.get("growth") or {}).items()
    ]
    if projected := results.get("projection"):
        what = "every token of 256 as a node, 64 projections"
        rows.append((what, "", "exact vector-Jacobian products", f"{projected['ratio']:.2f}"))
    if ratios := results.get("sampling"):
        rows.append(("one token for each of 256 rows", "", "torch.multinomial", spread(ratios, 1)))
    if "hooks" in results:
        rows.append(("a step without a probe", f"{results['hooks'] * 1e6:.1f} us", "", ""))
    return rows


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the speed of continuations, the speed of whole probes, and growth."""
    plot, (speed_axes, probe_axes, growth_axes) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    if measured := results.get("continuations"):
        for name, by_length in measured["speeds"].items():
            prefixes = [int(prefix) for prefix in by_length]
            speed_axes.plot(prefixes, [statistics.median(values) for values in by_length.values()], "o-", label=name)
        speed_axes.set(
            xlabel="prefix (tokens)", ylabel="tokens per second", title="256 continuations of 48 tokens", ylim=(0, None)
        )
        speed_axes.legend()
    if rows := results.get("probe"):
        # Bars, not a line: the long response has fewer rollouts and nodes than the others.
        bars = probe_axes.bar([str(row["length"]) for row in rows], [row["ratio"] for row in rows])
        probe_axes.bar_label(bars, [f"{row['ratio']:.1f}\n{row['nodes']} nodes" for row in rows])
        probe_axes.set(xlabel="response (tokens)", ylabel="times as fast", title="Whole probe against the reference")
        probe_axes.margins(y=0.2)
    for name, curve in (results.get("growth") or {}).items():
        relative_sizes = [value / curve["values"][0] for value in curve["values"]]
        relative_seconds = [seconds / curve["seconds"][0] for seconds in curve["seconds"]]
        growth_axes.plot(relative_sizes, relative_seconds, "o-", label=f"{name} ({curve['exponent']:.2f})")
    growth_axes.plot([1, 64], [1, 64], ":", color="grey", label="proportional")
    growth_axes.set(
        xlabel="times as much", ylabel="times as long", title="Growth (exponent)", xscale="log", yscale="log"
    )
    growth_axes.legend(fontsize=8)
    plot.savefig(path, dpi=110)


def keep(part: str, result: Any, folder: Path) -> None:
    """Add the result of a part to those in the folder, and write table and plot anew."""
    path = folder / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor()} CPU, {torch.get_num_threads()} threads"
    )
    machine = f"{device}, torch {torch.__version__}"
    write_atomically(path, json.dumps({**results, part: result, "machine": machine}, indent=1))
    results = json.loads(path.read_text())  # as a later run reads it: keys are text
    (folder / "speed.md").write_text(f"{results['machine']}\n\n{table(results)}\n")
    draw(results, folder / "speed.png")


def smoke() -> None:
    """Add the fastest part to a copy of what is kept; the others have a smoke size of their own."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(RESULTS / "speed.json", folder)
        keep("sampling", sampling.main(**sampling.SMOKE), Path(folder))
        print((Path(folder) / "speed.md").read_text())


def main(quick: bool, only: list[str]) -> None:
    """Measure parts, and keep each when it is done."""
    for part in only:
        print(f"== {part}", flush=True)
        keep(part, measure(part, quick), RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the long responses")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: show only that it runs")
    given = parser.parse_args()
    if given.smoke:
        smoke()
    else:
        main(given.quick, given.only)
