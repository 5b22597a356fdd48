"""What a probe costs on several processes: the same questions measured by 1, 2, ... of them.

Each process has one thread. Prints the seconds of a probe: of the first process's own share, of waiting for the others,
and of exchanging records; the bytes of a node's record; and the speed against one process.

Run: python benchmarks/ranks.py [--processes 1 2] [--questions 8]
"""

import os
import pickle
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer, sums

from odp_callbacks.callbacks.processes import Processes, current_processes
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.storage import merge

TEACHERS = {"answer": "The answer is {answer}.\n{prompt}", "base": "base"}
RESULT_FILE = "result.pt"
USUAL = {"processes": [1, 2], "questions": 8, "continuations": 4, "max_new_tokens": 24}
SMOKE = {"processes": [2], "questions": 2, "continuations": 1, "max_new_tokens": 2}


def measure(
    rank: int, size: int, port: int, questions: int, continuations: int, max_new_tokens: int, folder: str
) -> None:
    """One process: measure its share, and exchange records; the first writes down how long that took."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    processes: Processes = current_processes()
    torch.manual_seed(0)
    student, tokenizer = student_and_tokenizer(lora_alpha=16)
    task, rows = sums(questions, seed=0)
    config = ProbeConfig(
        rollouts_per_question=2,
        continuations=continuations,
        max_new_tokens=max_new_tokens,
        eos_token_ids=end_of_line(tokenizer),
    )
    probe = Probe(student, tokenizer, task.reward, TEACHERS, config)
    ids = [str(row_index) for row_index in range(len(rows))]
    probe.run(rows[:1], seed=1)  # the first run also finds out what the model supports
    processes.gather(None)
    start = time.perf_counter()
    part = probe.run(processes.share(rows), seed=0, ids=processes.share(ids))
    share_seconds = time.perf_counter() - start
    processes.gather(None)
    waiting_seconds = time.perf_counter() - start - share_seconds
    report = merge(processes.gather(part))
    seconds = time.perf_counter() - start
    if rank == 0:
        exchange_seconds = seconds - share_seconds - waiting_seconds
        bytes_per_node = len(pickle.dumps(part)) / max(1, len(part.nodes))
        result = (
            seconds,
            share_seconds,
            waiting_seconds,
            exchange_seconds,
            bytes_per_node,
            len(report.nodes),
            report.continuations,
        )
        torch.save(result, Path(folder) / RESULT_FILE)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def main(processes: list[int], questions: int, continuations: int, max_new_tokens: int) -> None:
    """Print a row for each number of processes."""
    print("processes  probe s  own share s  waiting s  gather s  kB a node  nodes  continuations  against one")
    first_seconds = None
    for size in processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(size, free_port(), questions, continuations, max_new_tokens, folder), nprocs=size)
            seconds, share, waiting, exchange, bytes_per_node, nodes, sampled = torch.load(Path(folder) / RESULT_FILE)
        first_seconds = seconds if first_seconds is None else first_seconds
        print(
            f"{size:9d}  {seconds:7.1f}  {share:11.1f}  {waiting:9.1f}  {exchange:8.2f}  {bytes_per_node / 1e3:9.1f}  "
            f"{nodes:5d}  {sampled:13d}  {first_seconds / seconds:10.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(**parse_sizes(__doc__, USUAL, SMOKE))
