"""Parameters that are spread over processes: which ones are, and their whole values.

Known are the parameters of FSDP2 and of tensor parallelism (``DTensor``), and those of DeepSpeed's ZeRO-3.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MAXIMUM_GATHERED = 2**26
"""Numbers of ZeRO-3's parameters that are gathered at a time; a larger parameter is gathered alone."""


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes; also while FSDP2 shows them whole.

    Examples:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    shows_shards = any(map(is_shard, model.parameters()))
    return shows_shards or any(True for _ in fully_sharded_modules(model))


def fully_sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules to which ``torch.distributed.fsdp.fully_shard`` (FSDP2) was applied."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def is_shard(parameter: Tensor) -> bool:
    """Whether this process has only a part of a parameter."""
    return is_partitioned(parameter) or is_distributed(parameter)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3's, of which each process keeps a part."""
    return hasattr(parameter, "ds_tensor")


def is_distributed(parameter: Tensor) -> bool:
    """Whether a parameter is a ``DTensor``."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter before it was sharded."""
    of_zero: Any = parameter  # DeepSpeed adds attributes
    return torch.Size(of_zero.ds_shape) if is_partitioned(parameter) else parameter.shape


def training_device(parameter: Tensor) -> torch.device:
    """The device that a parameter is trained on; its shard may wait on the CPU."""
    if is_partitioned(parameter):
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    if not is_distributed(parameter):
        return parameter.device
    distributed: Any = parameter
    kind: str = distributed.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def show_shards(model: nn.Module) -> None:
    """Let FSDP2 show its shards, which an optimizer steps on.

    After an evaluation, it may still show the whole values that the forward pass used. It gathers them anew at the next
    forward pass, from the same shards.
    """
    for module in fully_sharded_modules(model):
        module.reshard()


@torch.no_grad()
def copy_whole_values(sources: Sequence[nn.Parameter], targets: Sequence[Tensor]) -> None:
    """Copy the whole values of parameters into tensors; all processes must call it together.

    The parameters keep their shards and their state. A parameter at a time is whole on the training's device, or
    :data:`MAXIMUM_GATHERED` numbers of ZeRO-3.

    Args:
        sources: The parameters, sharded or not.
        targets: For each a tensor of its whole shape, of any dtype and on any device.
    """
    partitioned: list[tuple[nn.Parameter, Tensor]] = []
    for source, target in zip(sources, targets, strict=True):
        if is_partitioned(source):
            partitioned.append((source, target))
        else:
            target.copy_(_assembled(source) if is_distributed(source) else source)
    for chunk in _chunks(partitioned):
        with _gathered([source for source, _ in chunk]):
            for source, target in chunk:
                target.copy_(source)


def _assembled(parameter: Any) -> Tensor:
    """The whole value of a ``DTensor``; shards that were offloaded to the CPU are exchanged between devices."""
    assembled: Tensor = parameter.detach().to(training_device(parameter)).full_tensor()
    return assembled


def _gathered(parameters: Sequence[Any]) -> Any:
    """A context in which ZeRO-3's parameters are whole; those that were whole before stay so."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    parts = [one for one in parameters if one.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return GatheredParameters(parts) if parts else nullcontext()


def _chunks(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """Consecutive pairs, with :data:`MAXIMUM_GATHERED` numbers at most, or a single pair."""
    chunk: list[tuple[nn.Parameter, Tensor]] = []
    for pair in pairs:
        if chunk and sum(target.numel() for _, target in [*chunk, pair]) > MAXIMUM_GATHERED:
            yield chunk
            chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk
