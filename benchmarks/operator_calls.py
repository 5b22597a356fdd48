"""Operator calls of a token step of the continuations and of a look at the update, before and after, on the CPU.

Two processes take turns: one runs the library as it is, the other one as it was at commit ce1ac46 (the look: ab399f2),
which `git archive` writes into a temporary folder. Both sample the same continuations of the same random student, for a
few steps and for some more; printed is the difference divided by the number of steps, so that what happens once per
stream is left out. A look measures update gain and token influence of two teachers, after a first look. Printed are:

- calls from Python: what torch's profiler lists below no other operator;
- all operators: with those that operators call themselves;
- kernels: what reaches the dispatcher and is neither a view nor an allocation, about what an accelerator launches;
- functions in Python, of a look: calls of this library's, torch's and all others;
- seconds: the best of some repeats, in turns. Here arithmetic counts as well.

Run: python benchmarks/operator_calls.py [--slots 64] [--layers 28] [--vocabulary 151936]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sizes import parse_sizes

ROOT = Path(__file__).parent.parent
EARLIER = "ce1ac46"
"""The last commit before the step was made of fewer calls."""
EARLIER_LOOK = "ab399f2"
"""The last commit before the look was."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
USUAL = {"slots": 64, "layers": 28, "width": 64, "vocabulary": 151936, "few": 2, "more": 6, "repeats": 5}
SMOKE = {"slots": 4, "layers": 2, "width": 16, "vocabulary": 50, "few": 1, "more": 2, "repeats": 1}
LOOK = {"layers": 28, "width": 32, "vocabulary": 64, "questions": 2, "rollouts": 16, "tokens": 24, "repeats": 5}
SMOKE_LOOK = {**LOOK, "layers": 2, "rollouts": 2, "tokens": 3, "repeats": 1}
FIGURES = ("calls from Python", "all operators", "kernels", "milliseconds")
LOOK_FIGURES = ("calls from Python", "all operators", "functions in Python", "milliseconds")
WORKER = "--worker"


def earlier_library(folder: Path, commit: str) -> bool:
    """Write the library as it was into a folder; whether its commit is here."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], stdout=subprocess.PIPE)
    if archive.returncode == 0:
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return archive.returncode == 0


class Version:
    """A version of the library in a process of its own.

    Args:
        folder: Holds ``src``.
        sizes: Of the student and its continuations.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, WORKER, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        )

    def measure(self, what: str) -> dict[str, float]:
        """Have the worker count or time a step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def random_student(sizes: dict[str, int]) -> Any:
    """A random student of Qwen3's shape, with LoRA on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    width = sizes["width"]
    config = AutoConfig.for_model(
        "qwen3", vocab_size=sizes["vocabulary"], hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=sizes["layers"], num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
        max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return get_peft_model(student, LoraConfig(r=16, target_modules=LINEARS)).eval()


def profiled(work: Callable[[], Any]) -> list[float]:
    """Calls from Python, and all operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    operators = [event for event in profiler.events() if event.name.startswith("aten::")]
    parents = [event.cpu_parent for event in operators]
    outer = sum(parent is None or not parent.name.startswith("aten::") for parent in parents)
    return [outer, len(operators)]


class Look:
    """Looks at the update of random rollouts of a random student."""

    def __init__(self, sizes: dict[str, int]) -> None:
        import torch

        from odp_callbacks import BaseTeacher, Teacher
        from odp_callbacks.engine.prompts import Question
        from odp_callbacks.engine.rollouts import Rollout

        self.student = random_student(sizes)
        generator = torch.Generator().manual_seed(0)

        def ids(length: int) -> torch.Tensor:
            return torch.randint(3, sizes["vocabulary"], (length,), generator=generator)

        self.teachers = {"hint": Teacher("hint {prompt}"), "base": BaseTeacher()}
        self.rollouts = []
        for number in range(sizes["questions"]):
            prompt = ids(8)
            question = Question(str(number), {}, prompt, {"hint": torch.cat([ids(4), prompt]), "base": prompt})
            for place in range(sizes["rollouts"]):
                response = tuple(ids(sizes["tokens"] - place).tolist())
                self.rollouts.append(Rollout(question, response, "", False, float(place == 0)))

    def look(self) -> None:
        """Measure update gain and token influence."""
        from odp_callbacks.engine.gradients.loss_directions import distillation_direction
        from odp_callbacks.engine.update.gradient_rows import UpdateGradients
        from odp_callbacks.engine.update.measurement import UpdateMeter

        direction = distillation_direction("reverse_kl", None, None, 1.0)
        UpdateMeter(UpdateGradients(self.student, None, self.teachers, direction, 1.0)).measure(self.rollouts)

    def functions(self) -> list[float]:
        """Calls of functions that are written in Python."""
        counted = [0.0]

        def count(frame: object, event: str, argument: object) -> None:
            counted[0] += event == "call"

        sys.setprofile(count)
        self.look()
        sys.setprofile(None)
        return counted

    def answer(self, what: str) -> dict[str, float]:
        """Count or time."""
        if what == "time":
            start = time.perf_counter()
            self.look()
            return {LOOK_FIGURES[3]: 1000 * (time.perf_counter() - start)}
        self.look()
        return dict(zip(LOOK_FIGURES, [*profiled(self.look), *self.functions()], strict=False))


class Worker:
    """Samples continuations of a random student."""

    def __init__(self, sizes: dict[str, int]) -> None:
        import torch

        from odp_callbacks.engine.sampling.backends import prefill_rollouts

        self.student = random_student(sizes)
        prompts = [torch.randint(3, 50, (length,)) for length in (40, 30, 50, 35)]
        responses = [torch.randint(3, 50, (length,)) for length in (60, 50, 64, 40, 55, 64, 30, 48)]
        with torch.no_grad():
            prompt_of_response = [0, 0, 1, 1, 2, 2, 3, 3]
            self.prefixes = prefill_rollouts(self.student, prompts, responses, prompt_of_response, "shared prefix")
        lengths = [len(sequence) for sequence in self.prefixes.sequences]
        # Half of the continuations of a rollout start at its end, the others before.
        self.starts = [(slot % 8, lengths[slot % 8] - 10 * (slot // 8 % 2)) for slot in range(sizes["slots"])]
        self.sizes = sizes

    def sample(self, steps: int) -> None:
        """Sample so many tokens in every slot."""
        import torch

        from odp_callbacks.engine.sampling.backends import sample_continuations
        from odp_callbacks.engine.sampling.requests import ContinuationRequest

        requests = [ContinuationRequest(sequence, start, 3, steps) for sequence, start in self.starts]
        with torch.no_grad():
            sample_continuations(
                self.student, self.prefixes, requests, temperature=1.0, eos_token_ids=(),
                keys=range(len(requests)), batch_size=len(requests),
            )  # fmt: skip

    def kernels(self, steps: int) -> list[float]:
        """Operators below autograd that are neither views nor allocations."""
        from torch.utils._python_dispatch import TorchDispatchMode

        counted = [0.0]

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                aliases = [result.alias_info for result in function._schema.returns]
                is_view = any(alias is not None and not alias.is_write for alias in aliases)
                counted[0] += not is_view and "empty" not in function._schema.name
                return function(*args, **(kwargs or {}))

        with Counting():
            self.sample(steps)
        return counted

    def seconds(self, steps: int) -> list[float]:
        """Milliseconds."""
        start = time.perf_counter()
        self.sample(steps)
        return [1000 * (time.perf_counter() - start)]

    def per_step(self, measure: Any) -> list[float]:
        """A measure of one step, without what happens once."""
        few, more = self.sizes["few"], self.sizes["more"]
        differences = zip(measure(few), measure(more), strict=True)
        return [(larger - smaller) / (more - few) for smaller, larger in differences]

    def answer(self, what: str) -> dict[str, float]:
        """Count or time."""
        if what == "time":
            return {FIGURES[3]: self.per_step(self.seconds)[0]}
        self.sample(1)
        return dict(
            zip(
                FIGURES,
                [*self.per_step(lambda steps: profiled(lambda: self.sample(steps))), *self.per_step(self.kernels)],
                strict=False,
            )
        )


def compare(commit: str, figures: tuple[str, ...], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Print and return the figures of the library as it was at a commit, and as it is."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {"now": ROOT}
        if earlier_library(Path(folder), commit):
            folders = {"before": Path(folder), **folders}
        else:
            print(f"commit {commit} is not in this clone, so only the present is measured")
        versions = {name: Version(path, sizes) for name, path in folders.items()}
        found = {name: version.measure("count") for name, version in versions.items()}
        for _ in range(sizes["repeats"]):
            for name, version in versions.items():
                timed = version.measure("time")["milliseconds"]
                found[name]["milliseconds"] = min(timed, found[name].get("milliseconds", timed))
        for version in versions.values():
            version.end()
    for figure in figures:
        values = {name: of_version[figure] for name, of_version in found.items()}
        ratio = f", {values['before'] / values['now']:.1f} times fewer" if "before" in values else ""
        print(f"{figure}: " + ", ".join(f"{name} {value:,.0f}" for name, value in values.items()) + ratio)
    return found


def main(**sizes: int) -> dict[str, dict[str, float]]:
    """Print and return the figures of both versions: of a step, and of a look with the prefix ``look``."""
    print(
        f"one step of {sizes['slots']} slots, {sizes['layers']} layers of width {sizes['width']}, vocabulary "
        f"{sizes['vocabulary']}, LoRA on all linear layers, 8 rollouts of 4 questions"
    )
    of_step = compare(EARLIER, FIGURES, sizes)
    look = SMOKE_LOOK if sizes["layers"] == SMOKE["layers"] else LOOK
    print(f"one look at {look['questions']} questions, {look['layers']} layers of width {look['width']}, two teachers")
    of_look = compare(EARLIER_LOOK, LOOK_FIGURES, look)
    return {**of_step, **{f"look {name}": figures for name, figures in of_look.items()}}


if __name__ == "__main__":
    if WORKER in sys.argv:
        asked = json.loads(sys.argv[-1])
        worker = Look(asked) if "questions" in asked else Worker(asked)
        for line in sys.stdin:
            print(json.dumps(worker.answer(line.strip())), flush=True)
    else:
        main(**parse_sizes(__doc__, USUAL, SMOKE))
