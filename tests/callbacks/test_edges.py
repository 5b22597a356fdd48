"""Where there is little to tell, training logs a figure or one sentence, and TensorBoard shows no empty card."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from odp_callbacks import OnPolicyDistillation
from tests.helpers.edges import EDGES
from tests.helpers.models import word_tokenizer
from tests.helpers.tensorboard import read_runs
from tests.helpers.training import ROWS, make_callback, make_loader, make_module, make_trainer

ROW_LIST = [*ROWS, *({**row, "prompt": f"{row['prompt']} e"} for row in ROWS)]


def read_scalars(folder: str) -> dict[str, list[float]]:
    """The values of each of the callback's scalars in all runs, in the order of TensorBoard's cards."""
    cards: dict[str, list[float]] = {}
    for scalars in read_runs(folder).values():
        for tag, events in scalars.items():
            cards.setdefault(tag, []).extend(value for _, value in events)
    return {tag: cards[tag] for tag in sorted(cards) if tag.startswith("odp")}


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
    cards = read_scalars(logger.log_dir)
    assert cards["odp/probe/success_rate"]
    for tag, values in cards.items():
        assert np.isfinite(values).all(), tag
    for teacher in callback.teachers:
        run = read_runs(logger.log_dir).get(f"odp/{teacher}", {})
        assert ("odp/update_gain" in run) == (teacher not in edge.without)
    said = [*(str(warning.message) for warning in caught), *(record.getMessage() for record in caplog.records)]
    said = [message for message in said if message.startswith("odp-callbacks: ")]
    if edge.missing:
        expected = "gave 1.0 to every rollout" if edge.missing == "has the reward 1" else edge.missing
        assert len([message for message in said if expected in message]) == 1
    else:
        assert not any("no update" in message or "can be told" in message for message in said)


def test_the_first_card_has_a_number_with_adam_s_geometry_and_nodes(tmp_path: Path) -> None:
    """Cards are in the order of their names; few alignments have a number."""
    callback = make_callback(optimizer_geometry=True, every_n_steps=1, continuations=1, log="all")
    loggers = [TensorBoardLogger(str(tmp_path)), CSVLogger(tmp_path)]
    make_trainer(callback, logger=loggers, max_steps=2).fit(make_module(), make_loader())
    loggers[0].finalize("success")
    cards = read_scalars(loggers[0].log_dir)
    first, values = next((tag, values) for tag, values in cards.items() if tag.startswith("odp/"))
    assert first == "odp/adam/predicted_gain"
    assert np.isfinite(values).all()
    loggers[1].save()
    header, *rows = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    assert "odp/adam/alignment/answer/all" in header.split(",")
    assert not any("nan" in row for row in rows), "a cell without a number is empty"


def test_a_figure_that_has_no_number_any_more_ends(tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        if callback.monitor.probe_count > 1:
            return [0.0] * len(completions)
        return [len(completion.split()) / 10 for completion in completions]

    callback = make_callback(every_n_steps=1, budget=0, reward=reward)
    logger = TensorBoardLogger(str(tmp_path))
    with pytest.warns(UserWarning, match="to every rollout"):
        make_trainer(callback, logger=logger, max_steps=2).fit(make_module(reward=None), make_loader())
    logger.finalize("success")
    assert [step for step, _ in read_runs(logger.log_dir)["odp/answer"]["odp/update_gain"]] == [1]
