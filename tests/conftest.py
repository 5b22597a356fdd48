"""Fixtures that all tests share; the functions behind them are in ``tests.helpers``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.helpers.browser import open_browser
from tests.helpers.models import FAMILIES, tiny, word_tokenizer
from tests.helpers.records import MakeReport, report_maker
from tests.helpers.worlds import World, make_world

torch.set_num_threads(1)


settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)


settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in a browser are slow, too."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def student() -> nn.Module:
    return tiny()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_report() -> MakeReport:
    return report_maker()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium for the project's own pages, whose console must stay empty."""
    with open_browser() as opened:
        yield opened
