"""Sharded students: is training the same with the callback, and are the figures those of DDP?

``python benchmarks/gpu/sharded.py`` trains a student of a real shape by transformers' ``Trainer`` in two processes, one
GPU each, by DDP, FSDP2, ZeRO-2 and ZeRO-3, with and without the callback, and prints a line for each strategy.
``--smoke`` does it with a tiny student, on CPUs over gloo where there are no GPUs. ZeRO needs DeepSpeed.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from validate import Validation, even_reward

from odp_callbacks import BaseTeacher, GradientAlignmentTrainerCallback, Teacher
from odp_callbacks.engine.sharded_parameters import copy_whole_values, whole_shape

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
STEPS = 4


def training_options(strategy: str) -> dict[str, Any]:
    """The arguments that choose a strategy."""
    on_cpu = not torch.cuda.is_available()
    if strategy == "ddp":
        return {"use_cpu": on_cpu, "ddp_backend": "gloo" if on_cpu else "nccl"}
    if strategy == "fsdp2":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        return {
            "use_cpu": on_cpu,
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
        }
    if on_cpu:
        import deepspeed

        # Its own communication on CPUs would first be compiled, which takes minutes; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero = {"stage": int(strategy.removeprefix("zero")), "stage3_param_persistence_threshold": 0}
    options = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    # Without GPUs, accelerate uses DeepSpeed only if it is not told to stay on the CPU.
    return {"deepspeed": {**options, "zero_optimization": zero, "zero_allow_untested_optimizer": True}}


def use_fsdp_on_cpu() -> None:
    """Let accelerate shard on CPUs too, where it leaves FSDP switched off."""
    import accelerate
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    initialise = accelerate.Accelerator.__init__

    def with_fsdp(self: Any, *given: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        initialise(self, *given, fsdp_plugin=fsdp_plugin, **options)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin

    accelerate.Accelerator.__init__ = with_fsdp


def work(strategy: str, watched: bool, smoke: bool, folder: Path) -> None:
    """Train in one of the processes, and save what came of it."""
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    # The student comes first: while arguments with ZeRO-3 exist, transformers makes no whole model.
    validation = Validation(smoke, "cpu")
    rows = validation.rows(4, 6)
    student = validation.student.train()
    if strategy == "fsdp2" and not torch.cuda.is_available():
        use_fsdp_on_cpu()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-3, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_steps=1, bf16=not smoke, **training_options(strategy),
    )  # fmt: skip
    texts = [validation.tokenizer(row["prompt"])["input_ids"] for row in rows]
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    trainer = Trainer(student, arguments, train_dataset=dataset, processing_class=validation.tokenizer)
    callback = None
    if watched:
        teachers = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}
        callback = GradientAlignmentTrainerCallback(
            trainer, teachers, rows, even_reward, every_n_steps=100, at_start=True, max_overhead=None, strict=True,
            questions_per_probe=4, rollouts_per_question=4, max_new_tokens=6 if smoke else 128, continuations=2,
            differing_gradients=1.0, agreeing_gradients=1.0,
        )  # fmt: skip
        trainer.add_callback(callback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    parameters = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    values = [torch.empty(whole_shape(one), dtype=one.dtype) for one in parameters.values()]
    copy_whole_values(list(parameters.values()), values)
    outcome = {
        "weights": values,
        "losses": [entry["loss"] for entry in trainer.state.log_history if entry.get("loss") is not None],
        "random": torch.get_rng_state(),
        "seconds": seconds,
        "report": None if callback is None else callback.last_report,
        "replica": callback is not None and callback.monitor.whole_student.is_replica,
        "gpu": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
    }
    torch.save(outcome, folder / f"{os.environ['RANK']}.pt")


def run(strategy: str, watched: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes, and return what each of them saved."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        count = arguments.processes
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        common |= {"PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--worker", strategy, "--folder", folder]
        command += ["--smoke"] * arguments.smoke + ["--watched"] * watched
        started = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.1)
        if any(process.poll() for process in started):
            # The others would wait for it for ever.
            for process in started:
                process.kill()
            raise RuntimeError(f"{strategy} failed; see above.")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def figures_differ_by(report: Any, expected: Any) -> str:
    """How far two reports of the same questions are apart."""
    if [one.text for one in report.rollouts] != [one.text for one in expected.rollouts]:
        return "other rollouts"
    pairs = list(zip(report.nodes, expected.nodes, strict=True))
    totals = all(np.array_equal(one.total, other.total) for one, other in pairs)
    scale = max((float(np.abs(other.gram).max()) for _, other in pairs), default=1.0)
    gram = max((float(np.abs(one.gram - other.gram).max()) for one, other in pairs), default=0.0)
    return f"outcomes {'equal' if totals else 'differ'} at {len(pairs)} nodes, Gram matrices by {gram / scale:.1e}"


def gpu_memory(watched: dict[str, Any], without: dict[str, Any]) -> str:
    """The peak of the memory of the first GPU."""
    return "" if np.isnan(watched["gpu"]) else f", {watched['gpu']:.2f} GiB instead of {without['gpu']:.2f} on the GPU"


def main() -> None:
    """Train by each strategy and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny student")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.watched, arguments.smoke, arguments.folder)
        return
    expected: Any = None
    for strategy in arguments.strategies:
        watched, without = run(strategy, True, arguments), run(strategy, False, arguments)
        same = all(
            torch.equal(one["random"], other["random"])
            and one["losses"] == other["losses"]
            and all(map(torch.equal, one["weights"], other["weights"]))
            for one, other in zip(watched, without, strict=True)
        )
        first = watched[0]
        expected = expected or first
        print(
            f"{strategy}: replica {first['replica']}, same bits with and without {same}; against "
            f"{arguments.strategies[0]}: {figures_differ_by(first['report'], expected['report'])}; "
            f"{first['seconds'] - without[0]['seconds']:.1f} s a probe{gpu_memory(first, without[0])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
