"""TRL's trainers that sample from the student, each on a tiny student and a few rows."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn

from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.trainers import COMMON, chat_rows, distillation_trainer, gkd_trainer
from tests.helpers.training import ROWS

pytest.importorskip("trl")

MESSAGE_ROWS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"], "privileged_context": "f"}
    for row in ROWS
]
"""The rows with prompts as messages, as `GKDTrainer` and its kin render them."""
GROUPS: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 5}


def student(dropout: float = 0.0) -> nn.Module:
    return tiny("llama", dropout=dropout).float().train()


def words_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Rewards an odd number of words."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(len(text.split()) % 2) for text in texts]


def length_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """Rewards long completions; it has nothing to say about those that begin with the word a."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [None if text.startswith("a") else float(len(text.split())) for text in texts]


def grpo_trainer(
    folder: Path, dropout: float = 0.0, rewards: Any = words_reward, eval_rows: Any = None, **changes: Any
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(output_dir=str(folder), **(COMMON | GROUPS | changes))
    return GRPOTrainer(
        student(dropout),
        rewards,
        args,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=word_tokenizer(),
    )


def gmpo_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    args = GMPOConfig(output_dir=str(folder), **(COMMON | GROUPS | changes))
    rows = Dataset.from_list(ROWS)
    return GMPOTrainer(student(dropout), words_reward, args, train_dataset=rows, processing_class=word_tokenizer())


def rloo_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(output_dir=str(folder), **(COMMON | GROUPS | changes))
    return RLOOTrainer(student(dropout), words_reward, args, Dataset.from_list(ROWS), processing_class=word_tokenizer())


def sdpo_trainer(folder: Path, dropout: float = 0.0, rewards: Any = words_reward, **changes: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    args = SDPOConfig(output_dir=str(folder), **(COMMON | GROUPS | changes))
    rows = Dataset.from_list(MESSAGE_ROWS)
    return SDPOTrainer(student(dropout), rewards, args, rows, processing_class=word_tokenizer())


def sdft_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(output_dir=str(folder), distillation_topk=5, **(COMMON | GROUPS | changes))
    rows = Dataset.from_list(MESSAGE_ROWS)
    return SDFTTrainer(student(dropout), args, rows, processing_class=word_tokenizer())


def gold_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    options = {"max_completion_length": 5, "max_length": 32, "lmbda": 1.0, "top_p": 1.0, "use_extended_uld": False}
    args = GOLDConfig(output_dir=str(folder), **(COMMON | options | changes))
    return GOLDTrainer(
        student(dropout),
        tiny_base(seed=5).float(),
        args,
        train_dataset=chat_rows(),
        processing_class=word_tokenizer(),
    )


def iwopd_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    options = {"max_completion_length": 5, "max_length": 32, "lmbda": 1.0, "top_p": 1.0}
    args = IWOPDConfig(output_dir=str(folder), **(COMMON | options | changes))
    teacher = tiny_base(seed=5).float()
    word_tokenizer().save_pretrained(folder / "teacher")
    teacher.config._name_or_path = str(folder / "teacher")  # TRL loads the teacher's tokenizer
    return IWOPDTrainer(
        student(dropout),
        teacher,
        args,
        train_dataset=chat_rows(),
        processing_class=word_tokenizer(),
    )


def online_dpo_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    args = OnlineDPOConfig(output_dir=str(folder), max_new_tokens=5, max_length=32, **(COMMON | changes))
    rows = Dataset.from_list(MESSAGE_ROWS)
    return OnlineDPOTrainer(
        student(dropout),
        reward_funcs=words_reward,
        args=args,
        train_dataset=rows,
        processing_class=word_tokenizer(),
    )


def a2po_trainer(folder: Path, dropout: float = 0.0, **changes: Any) -> Any:
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    options = {"max_completion_length": 5, "num_value_samples": 2, "filter_all_incorrect": False}
    args = A2POConfig(output_dir=str(folder), **(COMMON | options | changes))
    rows = Dataset.from_list(MESSAGE_ROWS)
    return A2POTrainer(student(dropout), words_reward, args, rows, processing_class=word_tokenizer())


SAMPLING_TRAINERS: dict[str, Any] = {
    "DistillationTrainer": distillation_trainer,
    "GKDTrainer": gkd_trainer,
    "GRPOTrainer": grpo_trainer,
    "GMPOTrainer": gmpo_trainer,
    "RLOOTrainer": rloo_trainer,
    "SDPOTrainer": sdpo_trainer,
    "SDFTTrainer": sdft_trainer,
    "GOLDTrainer": gold_trainer,
    "IWOPDTrainer": iwopd_trainer,
    "OnlineDPOTrainer": online_dpo_trainer,
    "A2POTrainer": a2po_trainer,
}
