"""Products of gradients by LoRA module against products of the modules' own gradients."""

import numpy as np
import torch

from odp_callbacks.engine.update.module_products import with_module_products
from odp_callbacks.update_records import gram_of_rows


def test_they_are_products_on_the_module_s_own_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"base_model.model.layers.0.q_proj.lora_A.default.weight": (2, 5), "lm_head.lora_A.default.weight": (3,)}
    shapes |= {"base_model.model.layers.0.q_proj.lora_B.default.weight": (4, 2)}
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    success, directions = (torch.randn(*shape, 21, generator=generator) for shape in ((4,), (4, 2, 2)))
    gram = gram_of_rows(np.ones(4), np.ones((4, 2)), success.double().numpy(), directions.double().numpy())
    columns = {name: parameter.numel() for name, parameter in parameters.items()}
    modules = with_module_products(gram, success, directions, columns).modules
    assert modules is not None
    assert modules.names == ("layers.0.q_proj", "lm_head")
    for module, columns in enumerate(([*range(10), *range(13, 21)], [10, 11, 12])):
        expected = torch.einsum("fp,hkcp->fhk", success[:, columns].double(), directions[..., columns].double())
        np.testing.assert_allclose(modules.cross[..., module], expected, rtol=1e-12)
