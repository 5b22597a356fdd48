"""The step that one of TRL's trainers took."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.helpers.trainers import add_callback, distillation_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


def test_the_steps_of_a_trainer_are_in_its_log(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, max_steps=4)
    add_callback(trainer, every_n_steps=1000, update_every_n_steps=1)
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "odp/step/gain" in entry}
    assert list(logged) == [2, 3, 4]
    total = 0.0
    for entry in logged.values():
        total += entry["odp/step/gain"]
        assert entry["odp/step/gain_sum"] == pytest.approx(total)
        assert any(name.startswith("odp/step/cosine/") for name in entry)


def test_a_checkpoint_s_history_does_not_grow_with_every_step(tmp_path: Path) -> None:
    """Trackers get every figure; the history that is saved in `trainer_state.json` those of the logged steps."""
    trainer = distillation_trainer(tmp_path, max_steps=4, logging_steps=3)
    add_callback(trainer, every_n_steps=1000, update_every_n_steps=1)
    seen: list[int] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend([state.global_step] * ("odp/step/gain" in logs))

    trainer.add_callback(Tracker())
    trainer.train()
    assert seen == [2, 3, 4]
    assert [entry["step"] for entry in trainer.state.log_history if "odp/step/gain" in entry] == [3]
