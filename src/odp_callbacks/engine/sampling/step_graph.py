"""Capture the kernels of a step once, and launch all of them together from then on.

A step of a model of 28 layers has more than a thousand kernels of a few microseconds each. Launched one by one from
Python, they take several times as long as the device needs for them.
"""

import logging
from collections.abc import Callable

import torch

LOGGER = logging.getLogger(__name__)


class CudaGraph:
    """The kernels that a function launches, captured on a stream of their own.

    Args:
        step: Launches kernels on the current device and does not wait for any. It is called once, and its kernels do
            not run then.

    Raises:
        RuntimeError: If the function waits for the device, or does something else that cannot be captured.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads may use the device meanwhile: the training's data loader, the user's reward function.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        """Launch the kernels."""
        self._graph.replay()


class RepeatedStep:
    """A step that is run again and again on the same memory.

    The first time it is run as it is, the second time it is captured, and then replayed. Where it cannot be captured,
    it goes on as it is.

    Args:
        step: Reads and writes tensors that stay where they are until :meth:`forget` is called.
        capture: Returns what replays the step.

    Examples:
        >>> count = torch.zeros(())
        >>> repeated = RepeatedStep(lambda: count.add_(1), lambda step: 1 / 0)
        >>> for _ in range(3):
        ...     repeated()
        >>> int(count)
        3
    """

    def __init__(
        self, step: Callable[[], object], capture: Callable[[Callable[[], object]], CudaGraph] = CudaGraph
    ) -> None:
        self.step, self.capture = step, capture
        self.can_capture, self.has_run = True, False
        self._captured: CudaGraph | None = None

    def forget(self) -> None:
        """Capture the step anew, since it will use other tensors."""
        self.has_run, self._captured = False, None

    def __call__(self) -> None:
        """Run the step once."""
        if self._captured is None and self.has_run and self.can_capture:
            try:
                self._captured = self.capture(self.step)
            except Exception as error:  # whatever fails, the step itself goes on
                self.can_capture = False
                LOGGER.debug("A step is not captured: %s", error)
        if self._captured is not None:
            self._captured.replay()
        else:
            self.step()
        self.has_run = True
