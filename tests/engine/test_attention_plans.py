"""Which attention kernels a measurement may use."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.update.measurement import UpdateMeter
from tests.engine.update.test_gradient_rows import make_gradients, make_rollouts
from tests.helpers.models import tiny

cudnn_is_on = torch.backends.cuda.cudnn_sdp_enabled


def test_the_choice_is_restored_after_an_error() -> None:
    def fail() -> None:
        with without_attention_plans():
            assert not cudnn_is_on()
            assert torch.backends.cuda.flash_sdp_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert cudnn_is_on()


def test_a_choice_of_the_user_stays() -> None:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), without_attention_plans():
        assert cudnn_is_on()  # there would be no kernel without it
    with sdpa_kernel(SDPBackend.MATH), without_attention_plans():
        assert not cudnn_is_on()
    assert cudnn_is_on()


def test_an_update_is_measured_without_plans() -> None:
    student = tiny()
    seen: set[bool] = set()
    student.register_forward_hook(lambda *_: seen.add(cudnn_is_on()))
    gradients = make_gradients(student)
    seen.clear()
    assert UpdateMeter(gradients).measure(make_rollouts()) is not None
    assert seen == {False}
    assert cudnn_is_on()
