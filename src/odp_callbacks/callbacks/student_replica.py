"""A whole copy of a sharded student in each process, on which the probes run.

The frozen base is kept once, in the memory of the CPU. After each step, the parameters that are trained are gathered
from the shards, by all processes together. While something is measured, the copy is on the device of the training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.callbacks.processes import Processes, current_processes
from odp_callbacks.engine.module_copies import copy_modules, plain_name
from odp_callbacks.engine.sharded_parameters import (
    copy_whole_values,
    fully_sharded_modules,
    is_shard,
    is_sharded,
    show_shards,
    training_device,
    whole_shape,
)
from odp_callbacks.engine.student import uncompiled
from odp_callbacks.functional.gradients import active_lora_parameters

ReplicaLoader = Callable[[], nn.Module]
"""Loads the student unsharded: the same base, with LoRA of the same names and shapes."""
ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "scaling", "merged_adapters")
"""Attributes of peft's layers that say which adapters are used, and how strongly."""
COMPARED_NUMBERS = 2**16
"""Parameters of the base with at most so many numbers, such as norms, show whether a loaded copy is the student."""
TOLERANCE = 0.02
"""How much they may differ, relative to their norm; bfloat16 rounds to 0.4 %."""


class StudentReplica:
    """A whole copy of a sharded student; all processes must make it together.

    Args:
        sharded: The student that is trained.
        processes: The processes that train it.
        load: Loads the copy, in whatever form its base shall have, such as 4 bits. None: a copy of the student's own
            modules, whose base is gathered from the shards.

    Attributes:
        student: The copy. Its parameters are on the CPU unless they are in use, or ``load`` put them elsewhere.

    Raises:
        ValueError: In every process, if no copy can be made, or if what ``load`` returned is not the student.
    """

    def __init__(self, sharded: nn.Module, processes: Processes, load: ReplicaLoader | None = None) -> None:
        self._sharded, self._uses = sharded, 0
        show_shards(sharded)
        self._signature = _signature(sharded)
        self._device = training_device(next(sharded.parameters()))
        self._is_loaded = load is not None
        self.student: nn.Module = nn.Module()
        processes.gather_results(lambda: self._make(load))
        self._parked: dict[str, Tensor] = {}
        if self._is_loaded:
            compared = [name for name, source in self._sources.items() if self._shows_base(source)]
            values = [torch.empty(whole_shape(self._sources[name]), dtype=torch.float32) for name in compared]
            copy_whole_values([self._sources[name] for name in compared], values)
            processes.gather_results(lambda: self._compare(dict(zip(compared, values, strict=True))))
        self.gather_base()
        self.synchronize()

    def _make(self, load: ReplicaLoader | None) -> None:
        """Make the copy; the values that will be gathered are undefined until then."""
        with torch.inference_mode(False):
            self.student = _with_empty_parameters(self._sharded, self._device) if load is None else uncompiled(load())
        self._sources = _named(self._sharded)
        copies = _named(self.student)
        self._copy_adapter_state()
        for name, source in self._sources.items():
            copy = copies.get(name)
            if name in self._moving_names() and (copy is None or copy.shape != whole_shape(source)):
                in_replica = "no such parameter" if copy is None else f"one of shape {tuple(copy.shape)}"
                raise ValueError(
                    f"`student_replica` must return the student with the same LoRA, but the student trains {name} of "
                    f"shape {tuple(whole_shape(source))}, and the replica has {in_replica}."
                )
            if copy is not None and copy is not source and copy.is_floating_point():
                copy.requires_grad_(source.requires_grad)

    def fits(self, student: nn.Module) -> bool:
        """Whether this is a copy of the student as it is now, apart from values."""
        return student is self._sharded and self._signature == _signature(student)

    def gather_base(self) -> None:
        """Gather what is frozen; a copy that was loaded has it. All processes must call it together."""
        if not self._is_loaded:
            moving = self._moving_names()
            self._gather([name for name in self._sources if name not in moving])

    def synchronize(self) -> None:
        """Gather what is trained or active, and follow switched adapters. All processes must call it together."""
        show_shards(self._sharded)
        self._copy_adapter_state()
        self._gather(sorted(self._moving_names()))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the copy on the device of the training within the block, and on the CPU afterwards."""
        self._uses += 1
        try:
            if self._uses == 1 and self._device.type != "cpu":
                for name, tensor in self._tensors():
                    if tensor.device.type == "cpu":
                        self._parked[name] = tensor.data
                        tensor.data = tensor.data.to(self._device, non_blocking=True)
            yield
        finally:
            self._uses -= 1
            if self._uses == 0 and self._parked:
                for name, tensor in self._tensors():
                    if name in self._parked:  # nothing has changed it
                        tensor.data = self._parked.pop(name)
                self._parked.clear()
                getattr(torch, self._device.type).empty_cache()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self.student.named_parameters(), self.student.named_buffers())

    def _moving_names(self) -> set[str]:
        """Names of the parameters whose values change: those that are trained, and those of active adapters."""
        trained = {name for name, source in self._sources.items() if source.requires_grad}
        return (trained | set(map(plain_name, active_lora_parameters(self.student)))) & self._sources.keys()

    def _gather(self, names: list[str]) -> None:
        sources, copies = _named(self._sharded), _named(self.student)
        pairs = [(sources[name], copies[name]) for name in names if copies[name] is not sources[name]]
        copy_whole_values([source for source, _ in pairs], [copy.data for _, copy in pairs])

    def _copy_adapter_state(self) -> None:
        """Let the copy use the adapters that the student uses."""
        copies = {plain_name(name): module for name, module in self.student.named_modules()}
        for name, module in self._sharded.named_modules():
            copy = copies.get(plain_name(name))
            for attribute in ADAPTER_STATE:
                if copy is not None and attribute in vars(module):
                    value = vars(module)[attribute]
                    vars(copy)[attribute] = value.copy() if isinstance(value, dict | list) else value

    def _shows_base(self, source: nn.Parameter) -> bool:
        """Whether a parameter is compared with that of a loaded copy."""
        is_small = whole_shape(source).numel() <= COMPARED_NUMBERS
        return is_small and source.is_floating_point() and not source.requires_grad

    def _compare(self, values: dict[str, Tensor]) -> None:
        """Raise ``ValueError`` if the base of a loaded copy is not that of the student."""
        copies = _named(self.student)
        moving = self._moving_names()
        for name, value in values.items():
            copy = copies.get(name)
            if copy is None or copy.shape != value.shape or name in moving:
                continue
            difference = float((copy.detach().cpu().float() - value).norm())
            if not difference <= TOLERANCE * float(value.norm()):
                raise ValueError(
                    f"`student_replica` must return the student with the same base, but {name} differs from the "
                    "student's; load the same checkpoint."
                )


class WholeStudent:
    """Gives the module that holds the whole student in this process: the student itself, or its replica.

    Args:
        load: As in :class:`StudentReplica`.
    """

    def __init__(self, load: ReplicaLoader | None = None) -> None:
        if load is not None and not callable(load):
            raise TypeError(
                f"`student_replica` must be a function that returns the student unsharded, or None, but {load!r} was "
                "given."
            )
        self._load = load
        self._replica: StudentReplica | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the replica, which belongs to the training."""
        return {**self.__dict__, "_replica": None}

    @property
    def is_replica(self) -> bool:
        """Whether the student is sharded."""
        return self._replica is not None

    def of(self, student: nn.Module) -> nn.Module:
        """Return the student, or its replica; all processes must call it together when the student has changed.

        Raises:
            ValueError: If no replica can be made.
        """
        student = uncompiled(student)
        if not is_sharded(student):
            self._replica = None
        elif self._replica is None or not self._replica.fits(student):
            self._replica = None
            self._replica = StudentReplica(student, current_processes(), self._load)
        return student if self._replica is None else self._replica.student

    def synchronize(self) -> None:
        """Give the replica the parameters that are trained; all processes must call it together."""
        if self._replica is not None:
            self._replica.synchronize()

    def gather_base(self) -> None:
        """Gather the base again: a checkpoint may have been loaded. All processes must call it together."""
        if self._replica is not None:
            self._replica.gather_base()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the student on the device of the training within the block."""
        if self._replica is None:
            yield
        else:
            with self._replica.in_use():
                yield


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, without the wrappers that a copy does not have."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def _signature(student: nn.Module) -> list[tuple[Any, ...]]:
    """What a copy depends on, apart from values: names, shapes, what is trained, and what is sharded so far."""
    show_shards(student)
    return [
        (name, tuple(whole_shape(parameter)), parameter.requires_grad, is_shard(parameter))
        for name, parameter in _named(student).items()
    ]


def _with_empty_parameters(sharded: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the student's modules with undefined values on the CPU; what is whole already is shared."""
    dtypes = _forward_dtypes(sharded)
    parameters: dict[int, nn.Parameter] = {}
    for parameter in filter(is_shard, sharded.parameters()):
        # peft computes LoRA in the dtype of its parameters, whose small steps half precision would round away.
        dtype = parameter.dtype if parameter.requires_grad else dtypes.get(id(parameter), parameter.dtype)
        values = torch.empty(whole_shape(parameter), dtype=dtype, pin_memory=device.type == "cuda")
        parameters[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    return copy_modules(sharded, parameters)


def _forward_dtypes(sharded: nn.Module) -> dict[int, torch.dtype]:
    """The dtype that FSDP2's forward pass has each parameter in, by ``id``, where a policy gives one."""
    dtypes: dict[int, torch.dtype] = {}
    # Outer modules come first, so that the innermost one, which manages the parameter, decides.
    for module in fully_sharded_modules(sharded):
        dtype = module._get_fsdp_state()._mp_policy.param_dtype
        for parameter in module.parameters():
            dtypes[id(parameter)] = dtype or parameter.dtype
    return dtypes
