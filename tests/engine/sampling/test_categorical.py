import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.sampling.categorical import BLOCK, sample_tokens


def draws(n, seed):
    return torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [2, 5, BLOCK, BLOCK + 3, 1000])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies(size, temperature):
    n = 20_000
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    found, sound = sample_tokens(logits.expand(n, -1), temperature, draws(n, 1), 10_000)
    assert sound.all()
    expected = n * torch.softmax(logits.double() / temperature, -1).numpy()
    observed = np.bincount(found.numpy(), minlength=size).astype(float)
    rare = expected < 8
    if rare.sum() > 1:
        expected, observed = (np.append(x[~rare], x[rare].sum()) for x in (expected, observed))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_never_a_token_without_probability():
    logits = torch.full((50_000, 700), -torch.inf)
    logits[:, [0, 255, 256, 699]] = 0.0
    found, _ = sample_tokens(logits, 1.0, draws(50_000, 0))
    assert set(found.tolist()) == {0, 255, 256, 699}


def test_small_probabilities_are_not_lost():
    """Where one token has nearly everything, float32 sums would round the others away."""
    n, odds = 4_000_000, 2e-6
    logits = torch.tensor([0.0, np.log(odds)]).expand(n, 2)
    found, _ = sample_tokens(logits, 1.0, draws(n, 3))
    assert stats.binomtest(int(found.sum()), n, odds / (1 + odds)).pvalue > 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_told(bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    tokens, sound = sample_tokens(logits, 1.0)
    assert sound.tolist() == [True, False, True]
    assert ((tokens >= 0) & (tokens < 10)).all()


def test_a_temperature_may_be_a_whole_number():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    found = [sample_tokens(logits, t, draws(4, 1))[0] for t in (1, 1.0)]
    assert torch.equal(*found)
