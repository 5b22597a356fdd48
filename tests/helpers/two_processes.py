"""Runs a function in two processes that torch.distributed joins."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        return int(free_socket.getsockname()[1])


def _start(rank: int, work: Callable[..., None], port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    work(rank, Path(folder), *arguments)


def run_in_two_processes(work: Callable[..., None], folder: Path, *arguments: Any) -> list[Any]:
    """Run ``work`` in two processes, and return what each of them saved in ``folder``."""
    mp.spawn(_start, args=(work, free_port(), str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
