"""Find a distillation loss without effect: its steps do not point where the teacher does.

Two trainings differ in their loss only. The student is a tiny model that knows the task, with an adapter that starts at
random and spoils it; the teacher is the model without the adapter. The first training descends the divergence from the
teacher. The second has a bug that several frameworks had: the divergence at a position, which does not depend on the
token that was sampled there, serves as the advantage of a policy gradient. Such a gradient is zero on average, whatever
the teacher says.

Run: python examples/ineffective_loss.py
"""

import copy
import itertools
from dataclasses import replace

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, OnPolicyDistillation

STEPS = 40
WORDS = ["</s>", *"abcdefgh"]
ROWS = [{"prompt": f"{first} {second}", "answer": first} for first, second in itertools.product(WORDS[1:], repeat=2)]


class IneffectiveDistillation(OnPolicyDistillation):
    """The bug: ``divergence * log_prob`` in place of the divergence."""

    def token_losses(self, rollouts):
        batch_losses = super().token_losses(rollouts)
        losses = torch.zeros_like(batch_losses.losses)
        for index, rollout in enumerate(rollouts):
            length = len(rollout.response_ids)
            logits = self.student(input_ids=rollout.sequence[None].to(self.device)).logits[0, -length - 1 : -1]
            chosen = torch.tensor(rollout.response_ids, device=self.device)
            log_probs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
            losses[index, :length] = batch_losses.losses[index, :length].detach() * log_probs
        return replace(batch_losses, losses=losses)


class Figures(CSVLogger):
    """Keeps what the callback logs about the steps."""

    def __init__(self):
        super().__init__("odp-demo", "ineffective")
        self.steps = []

    def log_metrics(self, metrics, step=None):
        figures = {
            name.removeprefix("odp/step/"): value
            for name, value in metrics.items()
            if "odp/step" in name and value != ""  # an empty cell of the table
        }
        self.steps += [figures] if figures else []


def first_word_is_right(prompts, completions, answer):
    """The reward: the response is the first word of the question."""
    return [float(completion.split() == [right]) for completion, right in zip(completions, answer, strict=True)]


def train_base(model, tokenizer, steps):
    """Teach a model the task."""
    prompts = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in ROWS])
    answers = torch.tensor([[WORDS.index(row["answer"]), 0] for row in ROWS])
    token_ids = torch.cat([prompts, answers], dim=1)
    labels = torch.cat([torch.full_like(prompts, -100), answers], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=token_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def train(kind, base, tokenizer):
    """Distil, and return what was logged at each step."""
    seed_everything(0, verbose=False)
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    student = get_peft_model(copy.deepcopy(base), adapter)
    module = kind(
        student.train(),
        tokenizer,
        {"base": BaseTeacher()},
        reward=first_word_is_right,
        rollouts_per_question=4,
        max_new_tokens=3,
        learning_rate=3e-3,
    )
    callback = GradientAlignmentCallback(
        {"base": BaseTeacher()},
        ROWS,
        first_word_is_right,
        every_n_steps=1000,
        update_every_n_steps=1,
        max_overhead=None,
        influence=False,
        max_new_tokens=3,
        log="all",
    )
    figures = Figures()
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", logger=figures, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS, batch_size=8, shuffle=True, collate_fn=list))
    return figures.steps, sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)


torch.manual_seed(0)
backend = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}))
backend.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=0, pad_token_id=None, **sizes)
base = train_base(LlamaForCausalLM(config), tokenizer, steps=150)

for description, kind in (("sound loss", OnPolicyDistillation), ("ineffective loss", IneffectiveDistillation)):
    steps, size = train(kind, base, tokenizer)
    cosines = torch.tensor([figures["cosine/base"] for figures in steps if "cosine/base" in figures])
    gains = [figures for figures in steps if "gain" in figures]
    first, last = gains[: len(gains) // 4], gains[-len(gains) // 4 :]
    rewards = [sum(figures["reward"] for figures in part) / len(part) for part in (first, last)]
    print(f"\n{description}: {STEPS} steps of {size} LoRA parameters; by chance a cosine is about {size**-0.5:.3f}")
    print(f"  cosine of the step with the teacher's update: {cosines.mean():+.3f}, spread {cosines.std():.3f}")
    print(f"  share of steps with a positive cosine: {(cosines > 0).float().mean():.0%}")
    print(f"  expected gain of all steps: {gains[-1]['gain_sum']:+.3f} "
          f"[{gains[-1]['gain_sum_low']:+.3f}, {gains[-1]['gain_sum_high']:+.3f}]")  # fmt: skip
    print(f"  reward in the first and the last quarter: {rewards[0]:.2f} -> {rewards[1]:.2f}")
