"""What each way of being fast on a GPU is worth: the same work with and without it, taking turns in one run.

- *Sampling*: continuations with attention by blocks, with the Triton kernel launched from Python, and with captured
  steps; and how many rows of tokens the last two have in common (all, if replaying changes nothing).
- *Update*: a look at update gain as it is, with cuDNN's attention, and with sums of gradients on the CPU. Looks have
  responses of different lengths, but for the last pair, whose inner products are compared.

``python benchmarks/gpu/compare.py`` on a machine with a GPU; ``--smoke`` with a tiny student anywhere.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from validate import Validation, prefixes_and_requests

from odp_callbacks import BaseTeacher, Teacher
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling import backends, step_graph
from odp_callbacks.engine.sampling.backends import sample_continuations
from odp_callbacks.engine.update import measurement
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.measurement import UpdateMeter

WAYS = ("blocks", "kernel", "captured")


def no_capture(step: Callable[[], object]) -> Any:
    """Stands for a capture that is not possible."""
    raise RuntimeError("switched off by the benchmark")


@torch.no_grad()
def compare_sampling(validation: Validation, repeats: int) -> None:
    """Print milliseconds a step of each way."""
    prompt, length, all_slots = (6, 6, (4,)) if validation.smoke else (256, 128, (8, 64, 256))
    choose, capture = backends.choose_decoder, step_graph.RepeatedStep.__init__.__defaults__
    for slots in all_slots:
        prefixes, requests = prefixes_and_requests(validation, slots, prompt, length)
        tokens: dict[str, list[tuple[int, ...]]] = {}
        for repeat in range(repeats):
            for way in WAYS:
                if way == "blocks":
                    backends.choose_decoder = lambda *given: choose(*given)._replace(by_table=False)
                if way == "kernel":
                    step_graph.RepeatedStep.__init__.__defaults__ = (no_capture,)
                try:
                    seconds, _, continuations = validation.peak(
                        lambda requests=requests, prefixes=prefixes: sample_continuations(
                            validation.student, prefixes, requests, temperature=1.0, eos_token_ids=(),
                            keys=range(len(requests)), batch_size=len(requests),
                        )
                    )  # fmt: skip
                finally:
                    backends.choose_decoder, step_graph.RepeatedStep.__init__.__defaults__ = choose, capture
                tokens[way] = [continuation.tokens for continuation in continuations]
                print(f"{slots} slots, {way}, run {repeat + 1}: {1000 * seconds / length:.1f} ms a step", flush=True)
        common = sum(map(tuple.__eq__, tokens["kernel"], tokens["captured"]))
        print(f"{slots} slots: {common} rows are the same when replayed", flush=True)


def rollouts_of(validation: Validation, seed: int) -> list[Rollout]:
    """Random responses of different lengths, half of which succeed."""
    prompt, length, questions = (6, 8, 3) if validation.smoke else (64, 128, 8)
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(3, validation.shape["vocab_size"], (count,), generator=generator)

    rollouts = []
    for number in range(questions):
        own = ids(prompt)
        question = Question(str(number), {}, own, {"hint": torch.cat([ids(1), own]), "base": own})
        for place in range(4):
            count = int(torch.randint(length // 2, length + 1, (), generator=generator))
            rollouts.append(Rollout(question, tuple(ids(count).tolist()), "", False, float(place % 2 == 0)))
    return rollouts


def compare_updates(validation: Validation, repeats: int) -> None:
    """Print the seconds of a look at update gain in each way."""
    teachers = {"hint": Teacher("h {prompt}"), "base": BaseTeacher()}
    direction = distillation_direction("reverse_kl", None, None, 1.0)

    def look(way: str, seed: int) -> Any:
        gradients = UpdateGradients(validation.student, validation.tokenizer, teachers, direction, 1.0, features=True)
        rollouts = rollouts_of(validation, seed)
        seconds, peak, measured = validation.peak(lambda: UpdateMeter(gradients).measure(rollouts))
        print(f"update, {way}: {seconds:.2f} s, {peak:.1f} GiB", flush=True)
        return measured.record.gram

    usual, places = UpdateMeter.measure, measurement.device_of_sums
    look("the first one", 0)
    for repeat in range(repeats):
        usual_gram = look("as it is", 3 * repeat + 1)
        try:
            UpdateMeter.measure = usual.__wrapped__  # type: ignore[attr-defined]  # without the decorator
            look("with cuDNN's attention", 3 * repeat + 2)
        finally:
            UpdateMeter.measure = usual
        try:
            measurement.device_of_sums = lambda *_: torch.device("cpu")
            cpu_gram = look("with sums on the CPU", 3 * repeat + 1)
        finally:
            measurement.device_of_sums = places
        difference = np.abs(usual_gram.cross - cpu_gram.cross).max() / np.abs(cpu_gram.cross).max()
        print(f"update, inner products of both places differ by {difference:.1e}", flush=True)


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny student")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    validation = Validation(arguments.smoke, arguments.device)
    start = time.perf_counter()
    compare_sampling(validation, arguments.repeats)
    compare_updates(validation, arguments.repeats)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
