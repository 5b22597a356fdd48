"""What the callback does on a training step without a probe, in microseconds.

Run: python benchmarks/hooks.py
"""

import timeit
from types import SimpleNamespace

from sizes import parse_sizes
from student import lora_student

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, Teacher
from odp_callbacks.engine.probe import Probe

USUAL = {"steps": 10_000}
SMOKE = {"steps": 10}
REPEATS = 5


def main(steps: int = USUAL["steps"]) -> float:
    """Print the seconds of a step, and return them."""
    callback = GradientAlignmentCallback(
        {"base": BaseTeacher(), "answer": Teacher("{answer} {prompt}")},
        [{"prompt": "1 + 1 =", "answer": "2"}],
        lambda **_: [0.0],
        every_n_steps=10**9,
    )
    callback.monitor.probe = Probe.__new__(Probe)  # what is prepared once, before training
    callback.monitor.probe.student, callback.monitor.probe.teachers = lora_student("cpu"), callback.teachers
    trainer = SimpleNamespace(
        global_step=0,
        is_global_zero=True,
        precision_plugin=SimpleNamespace(forward_context=None),
        optimizers=[],
        state=SimpleNamespace(fn="fit"),
    )

    def step() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, 0)

    seconds = min(timeit.repeat(step, number=steps, repeat=REPEATS)) / steps
    print(f"hooks on a step without a probe: {seconds * 1e6:.1f} us (best of {REPEATS} x {steps})")
    return seconds


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
