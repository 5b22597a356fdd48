"""Responses that share a prompt: the layout, and whether a model can read it."""

import pytest
import torch

from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.engine.update.token_layout import packs_of_equal_prompts, shared_layout
from tests.helpers.models import paddable, relative, tiny

PROMPTS = [torch.tensor(ids) for ids in ([1, 6, 7, 8], [1, 6, 7, 8], [1, 9], [1, 6, 7, 8])]
RESPONSES = [(6, 7, 8, 2), (9,), (10, 6), (11, 6, 7)]


def test_responses_see_their_prompt_and_themselves() -> None:
    layout = shared_layout(PROMPTS, RESPONSES, [[0, 1, 3], [2]])
    assert layout.ids.tolist() == [[1, 6, 7, 8, 6, 7, 8, 11, 6], [1, 9, 10, 0, 0, 0, 0, 0, 0]]
    assert layout.positions is not None
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert layout.row_of_response == [0, 0, 1, 0]
    assert layout.rows.tolist() == [0] * 5 + [1] * 2 + [0] * 3
    assert layout.columns.tolist() == [3, 4, 5, 6, 3, 1, 2, 3, 7, 8]
    assert layout.longest == 7
    visible = layout.visible()
    assert visible[0, 8].nonzero().flatten().tolist() == [0, 1, 2, 3, 7, 8]
    assert visible[1, 2].nonzero().flatten().tolist() == [0, 1, 2]
    assert visible.any(dim=-1).all()  # attention to nothing would not be a number


def test_responses_share_a_prompt_while_that_saves_more_than_it_costs() -> None:
    prompts, keys = [torch.arange(10)] * 3, [0, 0, 1]
    assert packs_of_equal_prompts(prompts, [(1, 2)] * 3, keys, 16) == [[0, 1], [2]]
    assert packs_of_equal_prompts(prompts, [tuple(range(100))] * 3, [0, 0, 0], 16) == [[0], [1], [2]]
    assert packs_of_equal_prompts([*prompts[:2], torch.arange(9)], [(1, 2)] * 3, [0, 0, 0], 16) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("family", "shares", "options"),
    [
        ("llama", True, {}),
        ("llama", True, {"attn_implementation": "eager"}),
        ("qwen3", True, {}),
        ("gpt2", True, {}),
        ("gemma2", False, {}),
        ("mistral", False, {}),
    ],
)
def test_shared_prompts_give_the_states_of_separate_ones(family: str, shares: bool, options: dict[str, str]) -> None:
    model = paddable(family, **options)
    split = SplitModel(model)
    layout = split.layout(PROMPTS, RESPONSES, [0, 0, 0, 0])
    assert layout is not None
    assert (layout.branches is not None) == shares
    with torch.no_grad():
        sequences = [
            torch.cat([prompt, torch.tensor(response[:-1], dtype=torch.long)])
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
        positions = [range(len(prompt) - 1, len(sequence)) for prompt, sequence in zip(PROMPTS, sequences, strict=True)]
        expected = split.hidden_states(sequences, positions)
        assert relative(split.run(layout), expected) < 1e-5


def test_a_window_that_only_long_sequences_reach_is_found() -> None:
    split = SplitModel(tiny("mistral", sliding_window=50))
    long = [tuple(6 + i % 6 for i in range(30))] * 2
    layout = split.layout([torch.full((30,), 7)] * 2, long, [0, 0])
    assert layout is not None
    assert layout.branches is None
