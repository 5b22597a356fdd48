"""Notices a run that ends without a probe, and says why."""

from dataclasses import dataclass


@dataclass
class RunWatch:
    """Counts what happened in a run.

    Attributes:
        first_step: The optimizer step at which the run started.
        batches: How many training batches the run had.
        probed: Whether a probe was due, even if there was no time for it.

    Examples:
        >>> RunWatch(first_step=10, batches=5).complaint(step=15, every_n_steps=100)
        'the run ended without a probe: it took 5 optimizer steps, and `every_n_steps` is 100; lower it.'
        >>> RunWatch(first_step=0, batches=5, probed=True).complaint(step=5, every_n_steps=100)
        ''
    """

    first_step: int = 0
    batches: int = 0
    probed: bool = False

    def complaint(self, step: int, every_n_steps: int) -> str:
        """Return what the user should know at the end of the run; empty if there is nothing.

        Args:
            step: The optimizer step at which the run ended.
            every_n_steps: Number of optimizer steps between probes.
        """
        if self.probed or not self.batches:
            return ""
        if step == self.first_step:
            return (
                f"the run ended without a probe: the trainer counted no optimizer step in {self.batches} batches. "
                "Lightning counts the steps of the optimizers that `self.optimizers()` returns, but not those of "
                "`self.optimizers(use_pl_optimizer=False)`."
            )
        return (
            f"the run ended without a probe: it took {step - self.first_step} optimizer steps, and `every_n_steps` is "
            f"{every_n_steps}; lower it."
        )
