"""Peak memory of every stage that computes gradients, against the length of the sequence.

Run: python benchmarks/gradient_memory.py

A student of the widths of Qwen3-1.7B in float32, LoRA of rank 16 on all linear layers, and few layers. Each measurement
is a process of its own; its peak is the largest resident memory less that at the start, so the weights are not in it.
Only memory counts, so matrix products and attention kernels allocate what they return and compute nothing; the shortest
length is also measured with them. The exponent is that of the peak in the length, from the two longest sequences. The
memory of all layers is extrapolated from one and two, and the output head over the real vocabulary is added. Each stage
is compared with the plain way, which keeps the graph of all layers and every pair of tokens; that comparison computes
everything. One thread, 15 minutes of processor time.
"""

import ctypes
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sizes import parse_sizes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from odp_callbacks import Teacher
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, SELECTION
from odp_callbacks.engine.sampling.length_verdicts import LengthVerdict
from odp_callbacks.engine.update.batch_directions import BatchDirections
from odp_callbacks.engine.update.forward_mode import tangents_of_states
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.token_layout import layout_of_sequences
from odp_callbacks.functional.gradients import lora_parameters

USUAL = {
    "lengths": [512, 1024, 2048, 4096, 8192], "long": 4096, "plain": 1024, "exact": 256, "hidden": 2048, "heads": 16,
    "intermediate": 6144, "vocabulary": 1024, "real_vocabulary": 151936, "layers": 28, "nodes": 3,
}  # fmt: skip
SMOKE = {
    "lengths": [32, 64], "long": 64, "plain": 64, "exact": 32, "hidden": 64, "heads": 4, "intermediate": 96,
    "vocabulary": 64, "real_vocabulary": 128, "layers": 3, "nodes": 2,
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TANGENTS = 3
LEAST = 1.0
"""As ``max_memory_bytes``: every stage takes as little as it can."""

Stage = Callable[[Any, int, float | None], Any]
aten = torch.ops.aten


class WithoutProducts(TorchDispatchMode):
    """Matrix products and the attention kernel return constants of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.mm.default:
            return args[0].new_full((args[0].shape[0], args[1].shape[1]), 0.01)
        if func is aten.addmm.default:
            return args[1].new_full((args[1].shape[0], args[2].shape[1]), 0.01)
        if func is aten.bmm.default:
            return args[0].new_full((*args[0].shape[:2], args[1].shape[2]), 0.01)
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return torch.full_like(args[0], 0.01), args[0].new_full(args[0].shape[:3], 1.0)
        if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return tuple(torch.full_like(tensor, 0.01) for tensor in args[1:4])
        return func(*args, **(kwargs or {}))


def make_student(layers: int, sizes: dict[str, Any], vocabulary: int) -> Any:
    """A student with repeated random numbers as weights; drawing all of them would take minutes."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=vocabulary, hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
        num_hidden_layers=layers, num_attention_heads=sizes["heads"], num_key_value_heads=sizes["heads"] // 2,
        head_dim=sizes["hidden"] // sizes["heads"], max_position_embeddings=40960, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        student: Any = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS)
        )
    student = student.to_empty(device="cpu")
    block = 0.02 * torch.randn(2**20 - 1, generator=torch.Generator().manual_seed(0))
    for parameter in student.parameters():
        repeats = -(-parameter.numel() // len(block))
        content = block.repeat(repeats)[: parameter.numel()].view(parameter.shape)
        parameter.data.copy_(content if parameter.dim() > 1 else torch.ones_like(parameter))
    student.get_base_model().tie_weights()
    student.get_base_model().model.rotary_emb.__init__(config)  # its buffers are empty, too
    gradients_of(student.eval(), LEAST)  # what is found out about a student once is no part of a stage
    return student


def peak_bytes(work: Callable[[], Any], *, computes: bool = False) -> float:
    """Largest resident memory of a process that only does this, less that at its start."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with nullcontext() if computes else WithoutProducts():
                work()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writing, json.dumps(1024 * (after - before)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return float(json.loads(answer or b"NaN"))


def ids_of(length: int, vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (length,), generator=torch.Generator().manual_seed(length))


def rollout_of(length: int, vocabulary: int) -> Rollout:
    """A response that fills three quarters of the sequence; the teacher's prompt is longer than the student's."""
    ids, prompt = ids_of(length, vocabulary), length // 4
    hint = torch.cat([ids[: prompt // 2], ids[:prompt]])
    question = Question("question", {"prompt": ""}, ids[:prompt], {"teacher": hint})
    return Rollout(question, tuple(ids[prompt:].tolist()), "", False, 1.0)


def gradients_of(student: Any, memory: float | None) -> UpdateGradients:
    direction = distillation_direction("reverse_kl", None, None, 1.0)
    teachers = {"teacher": Teacher("{prompt}")}
    return UpdateGradients(student, None, teachers, direction, 1.0, max_memory_bytes=memory)


def random_tangents(student: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(TANGENTS, *p.shape, generator=generator) for name, p in lora_parameters(student).items()}


class Stages:
    """What is measured, each as a function of student, length and memory that returns what it computes."""

    def __init__(self, vocabulary: int, nodes: int) -> None:
        self.vocabulary, self.nodes = vocabulary, nodes

    def all(self) -> dict[str, Stage]:
        return {
            "update, backward": self.update,
            "update, forward mode": self.influences,
            "node gradients": self.node_gradients,
            "step sums": self.step_sums,
            "projection": self.projection,
        }

    def update(self, student: Any, length: int, memory: float | None) -> Tensor:
        return gradients_of(student, memory).segment_rows([rollout_of(length, self.vocabulary)], [1.0], [0])[0]

    def influences(self, student: Any, length: int, memory: float | None) -> Tensor:
        """With given directions, so that no other stage is in the peak."""
        tokens = length - length // 4
        hidden = student.get_base_model().config.hidden_size
        generator = torch.Generator().manual_seed(2)
        directions = BatchDirections(torch.randn(2, tokens, hidden, generator=generator), torch.zeros(1, tokens))
        rollouts = [rollout_of(length, self.vocabulary)]
        return gradients_of(student, memory).influences(rollouts, random_tangents(student), directions)

    def positions(self, length: int, count: int) -> list[int]:
        return [length * (count + place) // (2 * count) - 1 for place in range(1, count + 1)]

    def directions(self, count: int) -> Tensor:
        """Three directions at each node."""
        return torch.randn(count, 3, self.vocabulary, generator=torch.Generator().manual_seed(3))

    def node_gradients(self, student: Any, length: int, memory: float | None) -> Tensor:
        positions, directions = self.positions(length, self.nodes), list(self.directions(self.nodes))
        ids = ids_of(length, self.vocabulary)
        return torch.stack(node_gram_matrices(student, ids, positions, directions, max_memory_bytes=memory).grams)

    def step_sums(self, student: Any, length: int, memory: float | None) -> Tensor:
        positions = self.positions(length, 16)
        directions = self.directions(16).transpose(0, 1)
        return summed_vjps(student, ids_of(length, self.vocabulary), positions, directions, memory)

    def projection(self, student: Any, length: int, memory: float | None) -> Tensor:
        positions, directions = self.positions(length, 16), list(self.directions(16))
        generator = torch.Generator().manual_seed(4)
        ids = ids_of(length, self.vocabulary)
        return torch.stack(
            projected_gram_matrices(student, ids, positions, directions, 2, generator, max_memory_bytes=memory)
        )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def print_peaks(stages: dict[str, Stage], student: Any, sizes: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Peaks by stage and length with one layer, the exponent, and the peak at the shortest length with all products."""
    lengths = sizes["lengths"]
    columns = "".join(f"{length:>8}" for length in lengths)
    print(f"{'peak in MB, 1 layer':22}{columns} exponent  with products at {lengths[0]}", flush=True)
    found = {}
    for name, stage in stages.items():
        peaks = {length: peak_bytes(partial(stage, student, length, LEAST)) for length in lengths}
        exponent = math.log(peaks[lengths[-1]] / peaks[lengths[-2]]) / math.log(lengths[-1] / lengths[-2])
        computed = peak_bytes(partial(stage, student, lengths[0], LEAST), computes=True)
        row = "".join(f"{peak / 1e6:8.0f}" for peak in peaks.values())
        print(f"{name:22}{row}{exponent:9.2f}{computed / 1e6:10.0f}", flush=True)
        found[name] = peaks
    return found


def print_layers(
    stages: dict[str, Stage], student: Any, first: dict[str, dict[int, float]], sizes: dict[str, Any]
) -> None:
    """Peaks with one and two layers at the length that counts, and what they come to with all layers."""
    length, layers = sizes["long"], sizes["layers"]
    print(f"\n{f'peak in MB, {length} tokens':22} 1 layer 2 layers  to {layers} layers", flush=True)
    largest = 0.0
    for name, stage in stages.items():
        one, two = first[name][length], peak_bytes(partial(stage, student, length, LEAST))
        expected = two + (layers - 2) * max(0.0, two - one)
        largest = max(largest, expected)
        print(f"{name:22}{one / 1e6:8.0f}{two / 1e6:9.0f}{expected / 1e6:14.0f}", flush=True)
    head = head_bytes(sizes)
    print(f"\nhead over {sizes['real_vocabulary']} tokens: {head / 1e6:.0f} MB, whatever the length")
    print(
        f"the largest stage and the head, {layers} layers, {length} tokens: {(largest + head) / 1e9:.2f} GB", flush=True
    )


def print_plain(stages: dict[str, Stage], students: dict[int, Any], sizes: dict[str, Any]) -> None:
    """Peaks of the plain way, where there is one."""
    short, long = sizes["lengths"][0], sizes["plain"]
    layers = sizes["layers"]
    print(f"\n{'whole graph, MB':22} 1 layer 2 layers at {long} tokens  to {layers} layers  exponent", flush=True)
    for name in ("update, backward", "node gradients", "step sums"):
        one, two = (peak_bytes(partial(stages[name], students[count], long, None)) for count in (1, 2))
        before = peak_bytes(partial(stages[name], students[2], short, None))
        exponent = math.log(two / before) / math.log(long / short)
        extrapolated = (two + (layers - 2) * (two - one)) / 1e6
        print(f"{name:22}{one / 1e6:8.0f}{two / 1e6:9.0f}{extrapolated:29.0f}{exponent:10.2f}", flush=True)


def head_bytes(sizes: dict[str, Any]) -> float:
    """Peak of the directions on hidden states over the real vocabulary, which do not depend on the layers."""
    student = make_student(1, sizes, sizes["real_vocabulary"])
    gradients = gradients_of(student, LEAST)
    rollout = rollout_of(sizes["lengths"][0], sizes["real_vocabulary"])
    hidden = torch.randn(len(rollout.response_ids), sizes["hidden"], generator=torch.Generator().manual_seed(5))
    return peak_bytes(lambda: gradients._directions.on_hidden_states(hidden, [rollout], [1.0], [hidden]))


def plain_products(student: Any, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tangents of hidden states with attention in chunks, and with all pairs of tokens at once."""
    split = gradients_of(student, LEAST).model
    layout = layout_of_sequences([ids_of(length, vocabulary)], [range(length)])
    parameters = {name: p.detach() for name, p in lora_parameters(student).items()}
    tangents = random_tangents(student)
    with torch.no_grad():
        found = tangents_of_states(lambda values: split.run(layout, values), student, parameters, tangents)
        with sdpa_kernel(SDPBackend.MATH):
            first = {name: tangent[0] for name, tangent in tangents.items()}
            plain = torch.func.jvp(lambda values: split.run(layout, values), (parameters,), (first,))[1]
    return found[0], plain


def print_differences(stages: dict[str, Stage], student: nn.Module, length: int, vocabulary: int) -> None:
    """Each stage against the plain way; influences also against the gradients, whose inner product they sum to."""
    print(
        f"\nlargest difference to the whole graph, relative to the largest number, 2 layers, {length} tokens",
        flush=True,
    )
    for name in ("update, backward", "node gradients", "step sums"):
        print(
            f"{name:24} {relative(stages[name](student, length, LEAST), stages[name](student, length, None)):.1e}",
            flush=True,
        )
    print(f"{'forward mode, chunks':22} {relative(*plain_products(student, length, vocabulary)):.1e}", flush=True)


def give_back_at_once() -> None:
    """Let glibc give memory back as soon as it is freed, so that no fragments of the heap are counted."""
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1
        for option in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(option, 2**16)


def main(**sizes: Any) -> None:
    """Print all tables."""
    torch.set_num_threads(1)  # forked processes cannot share a pool of threads
    give_back_at_once()
    # Qwen3's logits do not depend on how many tokens follow; finding that out is no part of a stage.
    verdict = LengthVerdict(1, max(sizes["lengths"]), True, BACKENDS[0], True, "")
    selection: Any = SELECTION
    selection.verdict = lambda *_: verdict
    stages = Stages(sizes["vocabulary"], sizes["nodes"]).all()
    students = {layers: make_student(layers, sizes, sizes["vocabulary"]) for layers in (1, 2)}
    first = print_peaks(stages, students[1], sizes)
    print_layers(stages, students[2], first, sizes)
    print_plain(stages, students, sizes)
    print_differences(stages, students[2], sizes["exact"], sizes["vocabulary"])


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
