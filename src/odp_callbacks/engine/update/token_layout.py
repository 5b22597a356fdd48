"""Where the tokens of several responses lie in one padded batch; responses to one prompt can share its tokens.

Responses that share a prompt stand one after the other in one sequence. A mask lets each see the prompt and itself, and
the position of its first token is that after the prompt.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ATTENTION_COST = 6
"""Linear layers multiply at least 12 H^2 times for each token, attention 2 H times for each pair of tokens."""


@dataclass(frozen=True)
class TokenLayout:
    """A batch of sequences of tokens, and where the positions are that choose the response tokens.

    Attributes:
        ids: ``(B, L)`` int64, padded on the right.
        lengths: ``(B,)`` int64, tokens of each sequence.
        rows: ``(N,)`` int64, the sequence of each response token, response by response.
        columns: ``(N,)`` int64, the position in the sequence whose logits choose the token.
        row_of_response: The sequence of each response.
        positions: ``(B, L)`` int64, positions in the text; None where they count from 0.
        branches: ``(B, L)`` int64, 0 in the prompt and padding, and the number of the response in the sequence
            otherwise; None where no prompt is shared.
        longest: Tokens of the longest prompt with one of its responses.
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor
    columns: Tensor
    row_of_response: list[int]
    positions: Tensor | None
    branches: Tensor | None
    longest: int

    def visible(self) -> Tensor:
        """Which positions a position attends to, ``(B, L, L)`` bool: its past in the prompt and in its own response."""
        assert self.branches is not None
        size = self.ids.shape[1]
        places = torch.arange(size)
        causal = places[None, :] <= places[:, None]
        theirs = self.branches[:, None, :]
        own = (theirs == 0) | (theirs == self.branches[:, :, None])
        real = places[None] < self.lengths[:, None]  # (B, L)
        return (causal[None] & own & real[:, None]) | torch.eye(size, dtype=torch.bool)[None]


def layout_of_sequences(sequences: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> TokenLayout:
    """A sequence for each response.

    Args:
        sequences: ``(T_b,)`` int64 each.
        positions: For each sequence, the positions that are wanted.
    """
    return TokenLayout(
        pad_sequence([sequence.cpu() for sequence in sequences], batch_first=True),
        torch.tensor([len(sequence) for sequence in sequences]),
        torch.tensor([row for row, wanted in enumerate(positions) for _ in wanted], dtype=torch.long),
        torch.tensor([position for wanted in positions for position in wanted], dtype=torch.long),
        list(range(len(sequences))),
        None,
        None,
        max(map(len, sequences)),
    )


def shared_layout(
    prompts: Sequence[Tensor], responses: Sequence[Sequence[int]], packs: Sequence[Sequence[int]]
) -> TokenLayout:
    """A sequence for each pack of responses to one prompt.

    The last token of a response is not read, since nothing follows it. The last token of the prompt chooses the first
    token of every response.

    Args:
        prompts: ``(P_r,)`` int64, the prompt of each response.
        responses: The tokens of each response, at least one.
        packs: Indices of the responses in each sequence; those of a pack have the same prompt.
    """
    ids, positions, branches = [], [], []
    row_of_response = [0] * len(responses)
    columns: list[list[int]] = [[] for _ in responses]
    for row, pack in enumerate(packs):
        prompt = prompts[pack[0]].cpu()
        parts, places, numbers = [prompt], [torch.arange(len(prompt))], [torch.zeros(len(prompt), dtype=torch.long)]
        end = len(prompt)
        for number, index in enumerate(pack, start=1):
            read = torch.tensor(responses[index][:-1], dtype=torch.long)
            parts.append(read)
            places.append(len(prompt) + torch.arange(len(read)))
            numbers.append(torch.full((len(read),), number))
            row_of_response[index] = row
            columns[index] = [len(prompt) - 1, *range(end, end + len(read))]
            end += len(read)
        ids.append(torch.cat(parts))
        positions.append(torch.cat(places))
        branches.append(torch.cat(numbers))
    shared = any(len(pack) > 1 for pack in packs)
    return TokenLayout(
        pad_sequence(ids, batch_first=True),
        torch.tensor([len(sequence) for sequence in ids]),
        torch.tensor([row_of_response[index] for index, of_one in enumerate(columns) for _ in of_one]),
        torch.tensor([column for of_one in columns for column in of_one]),
        row_of_response,
        pad_sequence(positions, batch_first=True) if shared else None,
        pad_sequence(branches, batch_first=True) if shared else None,
        max(len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)),
    )


def packs_of_equal_prompts(
    prompts: Sequence[Tensor], responses: Sequence[Sequence[int]], keys: Sequence[Hashable], hidden_size: int
) -> list[list[int]]:
    """Choose which responses share their prompt.

    A response joins a pack as long as the linear layers save more on the prompt than attention loses on the pairs of
    tokens that the mask hides.

    Args:
        prompts: ``(P_r,)`` int64, the prompt of each response.
        responses: The tokens of each response.
        keys: Responses with different keys stay apart.
        hidden_size: Features of the hidden states.

    Returns:
        Indices of the responses of each pack, by the first response.
    """
    packs: list[list[int]] = []
    open_packs: dict[Hashable, tuple[list[int], int]] = {}
    for index, (prompt, response, key) in enumerate(zip(prompts, responses, keys, strict=True)):
        whole_key = (key, tuple(prompt.tolist()))
        pack, length = open_packs.get(whole_key, ([], 0))
        hidden_pairs = 2 * length * (len(response) - 1)
        if not pack or hidden_pairs > ATTENTION_COST * hidden_size * len(prompt):
            pack, length = [], 0
            packs.append(pack)
        pack.append(index)
        open_packs[whole_key] = (pack, length + len(response) - 1)
    return packs
