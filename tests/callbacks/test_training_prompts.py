"""Probes render messages as the training does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from odp_callbacks import OnPolicyDistillation, Teacher
from odp_callbacks.callbacks.training_prompts import rows_of_dataset, training_template
from odp_callbacks.engine.prompts import as_questions
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.trainers import COMMON, add_callback, distillation_trainer, gkd_trainer, trainer_student
from tests.helpers.training import ROWS, make_callback, make_loader, make_module, make_trainer, odd_length_reward

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

CHAT = [{"role": "user", "content": "a b"}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %} {{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% if enable_thinking is defined and not enable_thinking %} e{% endif %}"
    "{% endif %}"
)
OFF = {"enable_thinking": False}
THINKING, NOT_THINKING = "<s> user a b assistant", "<s> user a b assistant e"


def c() -> int:
    """Return something.

    Returns:
        A number.
    """
    return 1


def chat_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return odd_length_reward(prompts, [completion[-1]["content"] for completion in completions])


def tokenizer_with_options() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def trainer_of(kind: str, folder: Path, **options: Any) -> Any:
    """A TRL trainer with options of its chat template."""
    rows = Dataset.from_list([{"prompt": CHAT, "answer": "c"}] * 4)
    common: dict[str, Any] = {
        "model": trainer_student(),
        "train_dataset": rows,
        "processing_class": tokenizer_with_options(),
    }
    if kind == "distillation":
        args = DistillationConfig(output_dir=str(folder), max_completion_length=5, **(COMMON | options))
        return DistillationTrainer(teacher_model=tiny_base(seed=5).float(), args=args, **common)
    args = GRPOConfig(output_dir=str(folder), max_completion_length=5, num_generations=2, **(COMMON | options))
    return GRPOTrainer(reward_funcs=chat_reward, args=args, **common)


def prompt_in_probe(callback: Any, row: dict[str, Any]) -> list[int]:
    (question,) = callback.monitor.probe.encode([row])
    token_ids: list[int] = question.prompt_ids.tolist()
    return token_ids


@pytest.mark.parametrize("kind", ["distillation", "grpo"])
def test_options_of_a_trainer_that_samples_are_those_of_its_probes(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, chat_template_kwargs=OFF)
    trainer.tools = [c]
    callback = add_callback(trainer, prompts=[{"prompt": CHAT, "answer": "c"}], reward=chat_reward)
    conversations = [CHAT, [*CHAT, {"role": "assistant", "content": "c"}], [{"role": "user", "content": "d"}]]
    expected, *_ = trainer._tokenize_prompts(conversations)
    assert tokenizer_with_options().decode(expected[0]) == "<s> c user a b assistant e"
    for conversation, token_ids in zip(conversations, expected, strict=True):
        # These trainers take no options from a row.
        row = {"prompt": conversation, "answer": "c", "chat_template_kwargs": {"enable_thinking": True}, "tools": []}
        assert prompt_in_probe(callback, row) == token_ids


def test_a_template_of_the_trainer_s_own_is_that_of_its_probes(tmp_path: Path) -> None:
    trainer = trainer_of("distillation", tmp_path)
    trainer.chat_template = "{{ bos_token }}{% for m in messages %} f {{ m.content }}{% endfor %}"
    callback = add_callback(trainer, prompts=[{"prompt": CHAT, "answer": "c"}], reward=chat_reward)
    assert prompt_in_probe(callback, {"prompt": CHAT, "answer": "c"}) == trainer._tokenize_prompts([CHAT])[0][0]


def test_a_trainer_that_reads_options_from_rows_does_so_in_its_probes(tmp_path: Path) -> None:
    completion = [{"role": "assistant", "content": "c"}]
    rows = [{"prompt": CHAT, "completion": completion, "chat_template_kwargs": {"enable_thinking": thinking}}
            for thinking in (False, True)]  # fmt: skip
    trainer = SFTTrainer(
        model=trainer_student(),
        args=SFTConfig(output_dir=str(tmp_path), max_length=32, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_with_options(),
    )
    callback = add_callback(trainer, prompts=[{**row, "answer": "c"} for row in rows], reward=chat_reward)
    for row, expected in zip(rows, (NOT_THINKING, THINKING), strict=True):
        assert tokenizer_with_options().decode(prompt_in_probe(callback, {**row, "answer": "c"})) == expected


def test_trainers_without_options_leave_the_template_as_it_is(tmp_path: Path) -> None:
    assert training_template(SimpleNamespace()).arguments == {}
    assert training_template(SimpleNamespace(chat_template_kwargs={}, tools="none")).reads_rows
    assert not training_template(gkd_trainer(tmp_path)).reads_rows, "its collator reads no options"


def test_the_module_s_options_are_those_of_its_training_and_its_probes() -> None:
    rows = [{"prompt": CHAT, "answer": "c"}]
    module = OnPolicyDistillation(
        tiny("llama").float().train(),
        tokenizer_with_options(),
        Teacher("{answer} {prompt}"),
        max_new_tokens=4,
        chat_template_kwargs=OFF,
        tools=[c],
    )
    expected = "<s> c user a b assistant e"
    (rollout,) = module.sample(rows)
    assert tokenizer_with_options().decode(rollout.question.prompt_ids) == expected
    callback = make_callback(prompts=rows, reward=chat_reward, every_n_steps=1, questions_per_probe=1)
    make_trainer(callback, max_steps=1).fit(module, make_loader(rows, batch_size=1))
    assert {record.prompt for record in callback.last_report.rollouts} == {expected}


def test_a_streamed_dataset_is_named_as_what_it_is(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)
    trainer.train_dataset = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`train_dataset` is streamed: .* `list\(dataset.take\(1000\)\)`"):
        add_callback(trainer, prompts=None)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "`train_dataset` is None; give rows"),
        (Dataset.from_list([{"messages": CHAT}]), r"no column 'prompt' .* {'prompt': row\['messages'\]\[:-1\]}"),
        (Dataset.from_list([{"question": "a"}]), r"no column 'prompt' .*\['question'\]; give rows"),
        ([{"question": "a"}], r"no column 'prompt' .*\['question'\]; give rows"),
        ([], "no column 'prompt'"),
    ],
    ids=["none", "messages", "question", "list", "empty"],
)
def test_datasets_without_prompts_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of_dataset(dataset)


def test_a_list_of_rows_serves_as_the_training_s_prompts(tmp_path: Path) -> None:
    trainer = Trainer(
        model=trainer_student(), args=SFTConfig(output_dir=str(tmp_path), **COMMON), train_dataset=ROWS,
        processing_class=word_tokenizer(),
    )  # fmt: skip
    assert list(add_callback(trainer, prompts=None).monitor.prompts) == ROWS
    assert as_questions(rows_of_dataset(ROWS), word_tokenizer())[0].id == "0"


def test_the_trainer_s_state_reaches_the_reward(tmp_path: Path) -> None:
    steps = []

    def reward(completions: list[str], trainer_state: Any, log_metric: Any, **columns: Any) -> list[float]:
        log_metric("length", 1.0)
        steps.append(trainer_state.global_step)
        return odd_length_reward([], completions)

    trainer = distillation_trainer(tmp_path)
    add_callback(trainer, reward=reward, update=False)
    trainer.train()
    assert {2, 4} <= set(steps)
    assert not any("length" in entry for entry in trainer.state.log_history), "a probe's metrics are not the training's"

    steps.clear()
    callback = make_callback(reward=reward)
    make_trainer(callback).fit(make_module(), make_loader())
    assert {2, 4} <= set(steps)
