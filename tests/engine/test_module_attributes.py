"""Attributes of modules, wherever a module keeps them."""

import torch
from torch import nn

from odp_callbacks.engine.module_attributes import module_attribute


class Layer(nn.Module):
    """A module with an attribute of each kind."""

    of_class = 1

    def __init__(self) -> None:
        super().__init__()
        self.of_instance = 2
        self.part = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("buffer", torch.zeros(1))

    @property
    def computed(self) -> int:
        """Something that is computed."""
        return 3


def test_an_attribute_of_any_kind_is_found_and_one_that_is_missing_is_none() -> None:
    layer = Layer()
    for name in ("of_class", "of_instance", "part", "weight", "buffer", "computed"):
        assert module_attribute(layer, name) is not None
        assert module_attribute(layer, name) == getattr(layer, name)
    assert module_attribute(layer, "missing") is None
