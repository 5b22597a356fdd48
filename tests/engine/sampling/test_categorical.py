import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.sampling.categorical import BLOCK_SIZE, sample_tokens


def uniform_draws(count, seed):
    return torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [2, 5, BLOCK_SIZE, BLOCK_SIZE + 3, 1000])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies_are_the_probabilities(size, temperature):
    count = 20_000
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    tokens, valid = sample_tokens(logits.expand(count, -1), temperature, uniform_draws(count, 1), 10_000)
    assert valid.all()
    expected = count * torch.softmax(logits.double() / temperature, -1).numpy()
    observed = np.bincount(tokens.numpy(), minlength=size).astype(float)
    rare = expected < 8
    if rare.sum() > 1:
        expected, observed = (np.append(counts[~rare], counts[rare].sum()) for counts in (expected, observed))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_tokens_with_probability_zero_are_never_drawn():
    logits = torch.full((50_000, 700), -torch.inf)
    logits[:, [0, 255, 256, 699]] = 0.0
    tokens, _ = sample_tokens(logits, 1.0, uniform_draws(50_000, 0))
    assert set(tokens.tolist()) == {0, 255, 256, 699}


@pytest.mark.slow
def test_small_probabilities_keep_their_frequencies():
    """Where one token has nearly all probability, sums in float32 would lose the others."""
    count, odds = 4_000_000, 2e-6
    logits = torch.tensor([0.0, np.log(odds)]).expand(count, 2)
    tokens, _ = sample_tokens(logits, 1.0, uniform_draws(count, 3))
    assert stats.binomtest(int(tokens.sum()), count, odds / (1 + odds)).pvalue > 1e-4


@pytest.mark.parametrize("invalid_logit", [float("nan"), float("inf")])
def test_rows_that_are_no_distribution_are_reported(invalid_logit):
    logits = torch.zeros(3, 10)
    logits[1, 4] = invalid_logit
    tokens, valid = sample_tokens(logits, 1.0)
    assert valid.tolist() == [True, False, True]
    assert ((tokens >= 0) & (tokens < 10)).all()


def test_temperature_may_be_an_integer():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    by_type = [sample_tokens(logits, temperature, uniform_draws(4, 1))[0] for temperature in (1, 1.0)]
    assert torch.equal(*by_type)
