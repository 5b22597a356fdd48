"""Runs a function in two processes that torch.distributed joins, and trains in them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.helpers.training import make_trainer


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


def trainer_of_two(strategy: Any, callback: Any = None, **changes: Any) -> Any:
    """Lightning's trainer in one of the two processes."""
    import lightning.pytorch as lightning
    from lightning.fabric.plugins.environments import LightningEnvironment

    lightning.seed_everything(int(os.environ["RANK"]), verbose=False)

    class ExistingProcesses(LightningEnvironment):
        creates_processes_externally = True

        def world_size(self) -> int:
            return 2

        def global_rank(self) -> int:
            return int(os.environ["RANK"])

        def local_rank(self) -> int:
            return int(os.environ["RANK"])

    strategy.cluster_environment = ExistingProcesses()
    return make_trainer(callback, strategy=strategy, devices=2, **changes)
