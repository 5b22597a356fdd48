"""How many optimizer steps a Lightning trainer will take, as far as it knows."""

from typing import Any


def planned_steps(trainer: Any) -> int | None:
    """Return the optimizer step at which a training ends; None if that is not known.

    Args:
        trainer: A Lightning trainer that fits a module.
    """
    if trainer.train_dataloader is None:  # asking would load it
        return trainer.max_steps if trainer.max_steps > 0 else None
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # MisconfigurationException of either package: gradients are accumulated by a schedule
        steps = trainer.max_steps
    return int(steps) if 0 < steps < float("inf") else None
