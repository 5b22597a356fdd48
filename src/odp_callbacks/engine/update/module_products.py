"""Inner products of success gradients and distillation gradients on the parameters of each LoRA module alone."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from odp_callbacks.engine.gradients.gram_matrices import lora_modules, module_of
from odp_callbacks.update_records import ModuleProducts, UpdateGram


def with_module_products(
    gram: UpdateGram, success: Tensor, directions: Tensor, columns: Mapping[str, int]
) -> UpdateGram:
    """Add the products by module to those on all LoRA parameters.

    Args:
        gram: Of the same gradients.
        success: ``(F, M)``, floating: the success gradient of each group.
        directions: ``(F, K, C, M)``, floating, on the same device, which must have float64.
        columns: How many of the ``M`` columns each LoRA parameter has, by name and in their order.
    """
    names = lora_modules(list(columns))
    groups, teachers = directions.shape[:2]
    cross = torch.zeros(groups, groups, teachers, len(names), dtype=torch.float64, device=success.device)
    first = 0
    for name, width in columns.items():
        part = slice(first, first + width)
        first = part.stop
        of_teachers = directions[..., part].double().sum(dim=2).flatten(0, 1)  # (F K, p)
        products = success[:, part].double() @ of_teachers.mT
        cross[..., names.index(module_of(name))] += products.view(groups, groups, teachers)
    return replace(gram, modules=ModuleProducts(tuple(names), cross.cpu().numpy()))
