import random

import numpy as np
import pytest
import torch

from conftest import tiny
from odp_callbacks.engine.guest import guest


def draws():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002 (the stream that users use)


@pytest.mark.parametrize("fails", [False, True])
def test_random_streams_and_modes_are_put_back(fails):
    first, second = tiny(dropout=0.5), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    first.train()
    modes = [m.training for model in (first, second) for m in model.modules()]
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), guest():
        expected = draws()
        if fails:
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), guest(first, second):
        assert not any(m.training for model in (first, second) for m in model.modules())
        assert draws() == expected
        if fails:
            raise ZeroDivisionError
    assert draws() == expected
    assert [m.training for model in (first, second) for m in model.modules()] == modes


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_are_off_but_can_be_had(outside):
    with outside():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with guest():
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                (2 * x).backward()
            assert x.grad == 2
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
