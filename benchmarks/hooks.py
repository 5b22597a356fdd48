"""What the callback does on a training step without a probe, by itself: microseconds, against a probe's.

Run: python benchmarks/hooks.py
"""

import timeit
from types import SimpleNamespace

from student import lora_student

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, Teacher
from odp_callbacks.engine.probe import Probe


def main() -> float:
    model = lora_student("cpu")
    teachers = {"base": BaseTeacher(), "answer": Teacher("{answer} {prompt}")}
    callback = GradientAlignmentCallback(
        teachers, [{"prompt": "1 + 1 =", "answer": "2"}], lambda **_: [0.0], every_n_steps=10**9
    )
    callback.monitor.probe = Probe.__new__(Probe)  # what is prepared once, before training
    callback.monitor.probe.student, callback.monitor.probe.teachers = model, callback.teachers
    trainer = SimpleNamespace(global_step=0)

    def step() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, 0)

    count = 10_000
    seconds = min(timeit.repeat(step, number=count, repeat=5)) / count
    print(f"hooks on a step without a probe: {seconds * 1e6:.1f} us (best of 5 x {count})")
    return seconds


if __name__ == "__main__":
    main()
