"""Fixtures that all tests share; the functions behind them are in ``tests.helpers``."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import PreTrainedTokenizerFast

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
    """Headless Chromium."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary, "install Debian's package chromium"
    assert driver, "install Debian's package chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1400"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()
