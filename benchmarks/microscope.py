"""How many times fewer seconds do the figures of single tokens take than before, for the same half-width?

Two processes take turns with the same jobs: one runs the library as it is, the other one as it was at commit fdee2e6
(one node in each exponential window, uniform thinning, rounds, a gradient at every node, `diagnose` question by
question), which `git archive` writes into a temporary folder. Printed for each world and figure:

    (old half-width / new half-width)^2 * old seconds / new seconds

as the geometric mean over seeds with its 95 % interval, and for tokens the number of significant tokens a second, new
over old. Then Kish's effective share of the nodes, the occupancy of the slots, the stages' seconds, and the seconds of
`diagnose` for the same nodes and continuations. Seconds are those of the processor, so that other work on the machine
does not count; with OMP_NUM_THREADS=1 they are the seconds of an idle machine.

Run: python benchmarks/microscope.py [--worlds chain_sum products random] [--questions 32] [--seeds 3] [--budget 8000]
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from scipy import stats
from sizes import parse_sizes

ROOT = Path(__file__).parent.parent
EARLIER = "fdee2e6"
"""The last commit before the probe of single tokens was changed."""
BY_PROCESSOR_TIME = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs a script whose clocks, and those of the library's stages, are the processor's."""
USUAL = {
    "worlds": ["chain_sum", "products", "random"],
    "questions": 32,
    "seeds": 3,
    "budget": 8000,
    "random_questions": 8,
    "random_budget": 60_000,
    "diagnose_questions": 32,
    "diagnose_seeds": 1,
}
SMOKE = {
    "worlds": ["chain_sum"],
    "questions": 2,
    "seeds": 1,
    "budget": 100,
    "diagnose_questions": 2,
}
FIGURES = ("predicted_gain", "gain_weighted_alignment", "alignment")


class Version:
    """A version of the library in a process of its own.

    Args:
        folder: Holds ``src``.
    """

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BY_PROCESSOR_TIME, str(ROOT / "benchmarks" / "microscope_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder / "src")},
        )

    def __enter__(self) -> "Version":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, **job: Any) -> dict[str, Any]:
        """Have a job done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended during {job}; its error is above.")
        result: dict[str, Any] = json.loads(answer)
        return result


def earlier_library(folder: Path) -> Path:
    """Write the library as it was into a folder."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", EARLIER, "src"], check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def interval(ratios: Sequence[float]) -> str:
    """Geometric mean of ratios with its 95 % interval over seeds."""
    logs = np.log(ratios)
    if len(logs) < 2:
        return f"{np.exp(logs.mean()):.2f}"
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return f"{np.exp(logs.mean()):.2f} ({np.exp(logs.mean() - half):.2f} to {np.exp(logs.mean() + half):.2f})"


def compare_probes(versions: dict[str, Version], world: str, sizes: dict[str, Any]) -> None:
    """Measure with both versions, alternating, and print one line for each figure."""
    is_random = world == "random"
    questions = sizes["random_questions"] if is_random else sizes["questions"]
    options = {"budget": sizes["random_budget"] if is_random else sizes["budget"], "rollouts_per_question": 2}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for seed in range(sizes["seeds"]):
        for name in list(versions)[:: 1 if seed % 2 else -1]:
            result = versions[name].run(world=world, questions=questions, seed=seed, way="probe", options=options)
            results[name].append(result)
            print(f"{world}, seed {seed}, {name}: {_described(result)}", flush=True)
    pairs = list(zip(results["before"], results["now"], strict=True))
    for figure in FIGURES:
        ratios = [
            (before["half_widths"][figure] / now["half_widths"][figure]) ** 2 * before["seconds"] / now["seconds"]
            for before, now in pairs
        ]
        ratios = [ratio for ratio in ratios if np.isfinite(ratio)]
        said = interval(ratios) if ratios else "no interval in one of the versions"
        print(f"{world}, {figure}: seconds for the same half-width, before / now: {said}", flush=True)
    tokens = [
        (now["significant_tokens"] / now["seconds"]) / (before["significant_tokens"] / before["seconds"])
        for before, now in pairs
        if before["significant_tokens"] and now["significant_tokens"]
    ]
    print(f"{world}, significant tokens a second, now / before: {interval(tokens) if tokens else 'none was found'}")
    speed = [before["seconds"] / now["seconds"] for before, now in pairs]
    print(f"{world}, seconds of the probe, before / now: {interval(speed)}", flush=True)


def compare_diagnoses(versions: dict[str, Version], world: str, sizes: dict[str, Any]) -> None:
    """Time ``diagnose`` with the same numbers of rollouts and continuations."""
    options = {"continuations": 4, "rollouts_per_question": 2}
    ratios = []
    for seed in range(sizes["diagnose_seeds"]):
        seconds = {}
        for name in list(versions)[:: 1 if seed % 2 else -1]:
            result = versions[name].run(
                world=world, questions=sizes["diagnose_questions"], seed=seed, way="diagnose", options=options
            )
            seconds[name] = result["seconds"]
            print(f"{world}, seed {seed}, diagnose {name}: {_described(result)}", flush=True)
        ratios.append(seconds["before"] / seconds["now"])
    print(f"{world}, seconds of diagnose, before / now: {interval(ratios)}", flush=True)


def _described(result: dict[str, Any]) -> str:
    widths = ", ".join(f"{name} {width:.3f}" for name, width in result["half_widths"].items())
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["stages"].items())
    occupancy = "" if result["occupancy"] is None else f", occupancy {result['occupancy']:.2f}"
    kish = "none" if result["kish"] is None else f"{result['kish']:.2f}"
    return (
        f"{result['seconds']:.0f} s ({stages}), {result['nodes']} nodes, Kish share {kish}, "
        f"{result['continuations']} continuations{occupancy}, {result['significant_tokens']} significant tokens, "
        f"half-widths {widths}"
    )


def main() -> None:
    """Run the benchmark."""
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    with (
        tempfile.TemporaryDirectory() as folder,
        Version(earlier_library(Path(folder))) as before,
        Version(ROOT) as now,
    ):
        versions = {"before": before, "now": now}
        for world in sizes["worlds"]:
            compare_probes(versions, world, sizes)
            if world != "random":
                compare_diagnoses(versions, world, sizes)


if __name__ == "__main__":
    main()
