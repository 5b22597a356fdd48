from types import SimpleNamespace

import pytest
import torch

from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import end_tokens, response_text, sample_rollouts, score_rollouts
from odp_callbacks.engine.sampling.backend_selection import backend_of
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.verifier import Verifier
from tests.helpers.models import BOS, EOS, count_tokens, tiny


def sample(model, tokenizer, rows, eos=(EOS,), **changes):
    options = {"per_question": 3, "max_new_tokens": 6, "temperature": 1.0, "batch_size": 64}
    with torch.no_grad():
        return sample_rollouts(
            model,
            tokenizer,
            as_questions(rows, tokenizer),
            eos_token_ids=eos,
            randomness=Randomness(0),
            **{**options, **changes},
        )


ROWS = [{"prompt": "a b c d", "answer": "1"}, {"prompt": "", "answer": "2"}, {"prompt": "c", "answer": "3"}]


def test_rollouts_of_a_question_stand_together(student, tokenizer):
    backend_of(student)  # the trial of what this model can do has its own forwards
    shapes = []
    stop = count_tokens(student, shapes)
    sampled_rollouts = sample(student, tokenizer, ROWS)
    stop()
    assert [r.question.row["answer"] for r in sampled_rollouts] == [*"111222333"]
    for rollout in sampled_rollouts:
        assert 1 <= len(rollout.response_ids) <= 6
        assert rollout.truncated == (rollout.response_ids[-1] != EOS)
        assert rollout.truncated <= (len(rollout.response_ids) == 6)
        assert rollout.sequence.tolist() == [*rollout.question.prompt_ids.tolist(), *rollout.response_ids]
        assert torch.isnan(torch.tensor(rollout.reward))
    # Each prompt is prefilled once, but for its last token.
    assert shapes[0] == (3, 4)
    sampled = sum(len(r.response_ids) for r in sampled_rollouts)
    assert 1 <= sum(rows * width for rows, width in shapes[1:]) / sampled < 1.15


def test_a_prompt_of_one_token(student, tokenizer):
    sampled_rollouts = sample(student, tokenizer, [{"prompt": ""}], per_question=2)
    assert sampled_rollouts[0].question.prompt_ids.tolist() == [BOS]
    assert all(r.response_ids for r in sampled_rollouts)


def test_a_response_can_stop_at_once(student, tokenizer):
    sampled_rollouts = sample(student, tokenizer, ROWS, eos=tuple(range(12)))
    assert all(len(r.response_ids) == 1 and not r.truncated and r.text == "" for r in sampled_rollouts)


def test_text_has_no_end_token(tokenizer):
    a, b = 6, 7
    assert response_text(tokenizer, [a, b, EOS], [EOS]) == "a b"
    assert response_text(tokenizer, [a, b], [EOS]) == "a b"
    assert response_text(tokenizer, [a, b], [EOS, b]) == "a"
    assert response_text(tokenizer, [b, a, BOS, b], [EOS]) == "b a b"
    assert response_text(tokenizer, [EOS], [EOS]) == ""
    assert response_text(tokenizer, [], [EOS]) == ""


def test_score(student, tokenizer):
    def reward(prompts, completions, completion_ids, answer):
        assert prompts == [row["prompt"] for row in ROWS for _ in range(3)]
        assert [list(r.response_ids) for r in sampled_rollouts] == completion_ids
        assert completions == [r.text for r in sampled_rollouts]
        return [int(a) / 3 for a in answer]

    sampled_rollouts = sample(student, tokenizer, ROWS)
    scored = score_rollouts(Verifier(reward), sampled_rollouts)
    assert [r.reward for r in scored] == [1 / 3] * 3 + [2 / 3] * 3 + [1.0] * 3
    assert [r.response_ids for r in scored] == [r.response_ids for r in sampled_rollouts]


def test_end_tokens_come_from_every_source(tokenizer):
    model = tiny()
    assert end_tokens(model, tokenizer) == (EOS,)
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer, (11,)) == (EOS, 7, 9, 11)
    nothing = SimpleNamespace(eos_token_id=None)
    assert end_tokens(torch.nn.Linear(1, 1), nothing, (0,)) == (0,)
    with pytest.raises(ValueError, match=r"no end-of-sequence token is known; set `tokenizer.eos_token` or give"):
        end_tokens(torch.nn.Linear(1, 1), nothing)
