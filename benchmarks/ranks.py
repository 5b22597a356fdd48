"""What a probe costs on several processes: the same questions measured by 1, 2, ... of them.

Each process has one thread. Prints the seconds of a probe, of which the last step, giving everybody's records to all,
its own; the bytes that a node takes on its way; and the speed against one process.

Run: python benchmarks/ranks.py [--processes 1 2] [--questions 8]
"""

import argparse
import os
import pickle
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model

from odp_callbacks.callbacks.processes import Processes, processes
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.storage import merge

TEACHERS = {"answer": "The answer is {answer}.\n{prompt}", "base": "base"}


def work(rank: int, size: int, port: int, questions: int, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    here: Processes = processes()
    torch.manual_seed(0)
    model, tokenizer = load_student(None, lambda _: None)
    task = make_task("chain_sum", questions=4 * questions, lines=0, shots=2, seed=0)
    rows = list({row["prompt"]: row for row in task.rows}.values())[:questions]
    student = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).eval()
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    config = ProbeConfig(rollouts_per_question=2, continuations=4, max_new_tokens=24, eos_token_ids=newline)
    probe = Probe(student, tokenizer, task.reward, TEACHERS, config)
    ids = [str(i) for i in range(len(rows))]
    probe.run(rows[:1], seed=1)  # warm
    here.gather(None)
    start = time.perf_counter()
    part = probe.run(here.share(rows), seed=0, ids=here.share(ids))
    own = time.perf_counter() - start
    here.gather(None)
    waited = time.perf_counter() - start - own
    report = merge(here.gather(part))
    whole = time.perf_counter() - start
    if rank == 0:
        size_of = len(pickle.dumps(part)) / max(1, len(part.nodes))
        torch.save((whole, own, waited, whole - own - waited, size_of, len(report.nodes), report.continuations),
                   Path(folder) / "found.pt")  # fmt: skip


def main(counts: list[int], questions: int) -> None:
    print("processes  probe s  own share s  waiting s  gather s  kB a node  nodes  continuations  against one")
    first = None
    for size in counts:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
            found.close()
            mp.spawn(work, args=(size, port, questions, folder), nprocs=size)
            whole, own, waited, gather, size_of, nodes, continuations = torch.load(Path(folder) / "found.pt")
        first = whole if first is None else first
        print(f"{size:9d}  {whole:7.1f}  {own:11.1f}  {waited:9.1f}  {gather:8.2f}  {size_of / 1e3:9.1f}  {nodes:5d}  "
              f"{continuations:13d}  {first / whole:10.2f}x", flush=True)  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--questions", type=int, default=8)
    given = parser.parse_args()
    main(given.processes, given.questions)
