"""Where there is little to tell, training logs a figure or one sentence, and TensorBoard shows no empty card."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from odp_callbacks import OnPolicyDistillation
from tests.helpers.edges import EDGES
from tests.helpers.models import word_tokenizer
from tests.helpers.training import ROWS, make_callback, make_loader, make_module, make_trainer

ROW_LIST = [*ROWS, *({**row, "prompt": f"{row['prompt']} e"} for row in ROWS)]


def read_scalars(folder: str) -> dict[str, list[float]]:
    """The values of each scalar by its name, in the order of TensorBoard's cards."""
    events = EventAccumulator(folder, size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}


@pytest.mark.parametrize("name", list(EDGES))
def test_tensorboard_has_no_card_without_a_number(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edge = EDGES[name]
    callback = make_callback(
        every_n_steps=1, prompts=ROW_LIST[: edge.questions], questions_per_probe=edge.questions, **edge.settings()
    )
    student = edge.student().train()
    module = OnPolicyDistillation(student, word_tokenizer(), "base", max_new_tokens=4, learning_rate=0.0)
    logger = TensorBoardLogger(str(tmp_path))
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        make_trainer(callback, logger=logger, max_steps=2).fit(module, make_loader())
    logger.finalize("success")
    scalars = read_scalars(logger.log_dir)
    cards = {tag: values for tag, values in scalars.items() if tag.startswith("odp/")}
    assert cards["odp/probe/success_rate"]
    for tag, values in cards.items():
        assert np.isfinite(values).any(), f"{tag} is an empty card"
    for teacher in callback.teachers:
        assert (f"odp/update_gain/{teacher}/all" in cards) == (teacher not in edge.without)
    said = [*(str(warning.message) for warning in caught), *(record.getMessage() for record in caplog.records)]
    said = [message for message in said if message.startswith("odp-callbacks: ")]
    if edge.missing:
        expected = "gave 1.0 to every rollout" if edge.missing == "has the reward 1" else edge.missing
        assert len([message for message in said if expected in message]) == 1
    else:
        assert not any("no update" in message or "can be told" in message for message in said)


def test_the_first_card_has_a_number_with_adam_s_geometry_and_nodes(tmp_path: Path) -> None:
    """Cards are in the order of their names, so `odp/adam/alignment/...` comes first; few alignments have a number."""
    callback = make_callback(optimizer_geometry=True, every_n_steps=1, continuations=1)
    loggers = [TensorBoardLogger(str(tmp_path)), CSVLogger(tmp_path)]
    make_trainer(callback, logger=loggers, max_steps=2).fit(make_module(), make_loader())
    loggers[0].finalize("success")
    cards = read_scalars(loggers[0].log_dir)
    first, values = next((tag, values) for tag, values in cards.items() if tag.startswith("odp/"))
    assert first.startswith("odp/adam/")
    assert np.isfinite(values[0])
    loggers[1].save()
    written = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(written) > {tag for tag in cards if tag.startswith("odp/")}, (
        "other loggers get NaN, in columns of its own"
    )


def test_a_figure_that_had_a_number_shows_when_it_has_none(tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        if callback.monitor.probe_count > 1:
            return [0.0] * len(completions)
        return [len(completion.split()) / 10 for completion in completions]

    callback = make_callback(every_n_steps=1, budget=0, reward=reward)
    logger = TensorBoardLogger(str(tmp_path))
    with pytest.warns(UserWarning, match="to every rollout"):
        make_trainer(callback, logger=logger, max_steps=2).fit(make_module(reward=None), make_loader())
    logger.finalize("success")
    first, second = read_scalars(logger.log_dir)["odp/update_gain/answer/all"]
    assert np.isfinite(first)
    assert np.isnan(second)
