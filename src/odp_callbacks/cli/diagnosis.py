"""A diagnosis that can be interrupted: question by question, each kept when it is measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from odp_callbacks.cli.datasets import fingerprint
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.tree.journal import Journal
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import load, merge, save

SETTINGS = "diagnosis.json"


def run_diagnosis(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    output: Path,
    *,
    config: ProbeConfig,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeReport:
    """Measure questions one by one, and keep each under ``output/questions``; what is there already is not repeated.

    Within a question continuations are kept as they finish, so that an interruption costs none of them.

    A question's random draws depend on the seed and on its place alone, so that an interrupted diagnosis ends with the
    figures of one that was not. A ``budget`` is shared out evenly.

    Args:
        student: A peft model.
        tokenizer: Its tokenizer.
        rows: Questions.
        reward: The verifier.
        teachers: As in :class:`~odp_callbacks.engine.Probe`.
        output: Folder of the diagnosis.
        config: How to measure.
        seed: Of everything random.
        about: What else names this diagnosis (the student's path, say): in another one's folder it is refused.
        progress: Called with the questions done and all.

    Raises:
        ValueError: If the folder holds another diagnosis, or something that was given cannot work.
    """
    budget = None if not config.budget else max(1, config.budget // len(rows))
    probe = Probe(student, tokenizer, reward, teachers, replace(config, budget=config.budget and budget))
    probe.validate(rows)
    settings = {**config.plain(), "seed": seed, "rows": fingerprint(list(rows)), **(about or {})}
    settings["teachers"] = (about or {}).get("teachers", list(probe.teachers))
    _claim(output, settings)
    parts = []
    for i, row in enumerate(rows):
        folder = output / "questions" / f"{i:05d}"
        if not folder.exists():
            journal = Journal(output / "questions" / f".{i:05d}.journal")
            save(probe.run([row], seed=seed, ids=[str(i)], journal=journal), folder)
            journal.remove()
        parts.append(load(folder))
        if progress is not None:
            progress(i + 1, len(rows))
    report = replace(merge(parts), seconds=_added(parts))
    save(report, output / "records", overwrite=True)
    return report


def _claim(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS
    plain = json.loads(json.dumps(settings, default=repr))
    if path.exists():
        there = json.loads(path.read_text())
        if changed := sorted(key for key in plain.keys() | there.keys() if plain.get(key) != there.get(key)):
            raise ValueError(
                f"`output` is {str(output)!r}, which holds a diagnosis with another `{changed[0]}`; give another "
                "folder, or remove that one."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1))


def _added(parts: Sequence[ProbeReport]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.seconds.items():
            total[name] = total.get(name, 0.0) + value
    return total
