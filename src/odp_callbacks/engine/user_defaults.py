"""Runs the user's functions under the user's own defaults of torch, and not under those of a measurement.

A measurement runs in the precision of the training, without gradients. A reward that makes a tensor, or runs a model of
its own, must give what it gives anywhere else: under Lightning's ``bf16-true``, ``torch.tensor(0.7)`` is 0.69921875.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")
"""Kinds of devices for which autocasting can be on."""


def _autocast_devices() -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocasting is on for each kind of device, and the dtype that it casts to."""
    states = {}
    for device in AUTOCAST_DEVICES:
        try:
            states[device] = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        except RuntimeError:  # this build of torch does not know the device
            continue
    return states


@dataclass(frozen=True)
class UserDefaults:
    """The defaults of torch at one moment.

    Attributes:
        dtype: The default dtype; it holds for all threads.
        device: The default device.
        gradients: Whether gradients are on.
        inference: Whether inference mode is on.
        autocast: Whether autocasting is on for each kind of device, and the dtype that it casts to.
        deterministic: Whether torch uses deterministic algorithms only, and whether it warns instead of raising.
    """

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    device: torch.device = field(default_factory=torch.get_default_device)
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    autocast: dict[str, tuple[bool, torch.dtype]] = field(default_factory=_autocast_devices)
    deterministic: tuple[bool, bool] = field(
        default_factory=lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
    )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set these defaults within the block, and put back afterwards what was set before."""
        before = UserDefaults()
        with ExitStack() as stack:
            if self.dtype != before.dtype:
                stack.callback(torch.set_default_dtype, before.dtype)
                torch.set_default_dtype(self.dtype)
            if self.deterministic != before.deterministic:
                stack.callback(_set_deterministic, before.deterministic)
                _set_deterministic(self.deterministic)
            if self.device != before.device:
                stack.enter_context(self.device)
            for device, (enabled, dtype) in self.autocast.items():
                if before.autocast[device] != (enabled, dtype):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            if self.inference != before.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            yield


_remembered: ContextVar[UserDefaults | None] = ContextVar("user_defaults", default=None)


@contextmanager
def remembering_user_defaults() -> Iterator[None]:
    """Remember the present defaults within the block, unless a block around it remembers others."""
    token = _remembered.set(_remembered.get() or UserDefaults())
    try:
        yield
    finally:
        _remembered.reset(token)


def call_with_user_defaults(function: Callable[..., Result], *arguments: Any, **named_arguments: Any) -> Result:
    """Call a function of the user under the remembered defaults; under the present ones if none are remembered."""
    defaults = _remembered.get()
    if defaults is None:
        return function(*arguments, **named_arguments)
    with defaults.applied():
        return function(*arguments, **named_arguments)


def user_dtype_is_set() -> bool:
    """Whether the default dtype, which all threads share, is the one that the user's functions run under."""
    defaults = _remembered.get()
    return defaults is None or defaults.dtype == torch.get_default_dtype()


def _set_deterministic(flags: tuple[bool, bool]) -> None:
    enabled, warn_only = flags
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
