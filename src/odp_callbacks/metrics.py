"""The gradient alignment score as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from odp_callbacks.functional.alignment import gradient_alignment


class GradientAlignment(Metric):
    r"""Mean gradient alignment score over nodes: the modular twin of ``functional.gradient_alignment``.

    .. math:: \frac{\sum_u w_u \cos(g_u, d_u)}{\sum_u w_u}

    over the nodes where the cosine exists. Nodes where it does not are counted in :attr:`undefined` and never
    averaged in; without any defined node the result is NaN. The states are sums, so that ranks and batches add up
    exactly, also where a rank has no defined node.

    As input to ``forward`` and ``update``:

    - ``ideal`` (:class:`~torch.Tensor`): ideal gradients, ``(..., P)``.
    - ``distillation`` (:class:`~torch.Tensor`): distillation gradients, ``(..., P)``.
    - ``weight`` (:class:`~torch.Tensor`, optional): weight of each node, ``(...)``, not negative, such as the inverse
      of its inclusion probability; 1 by default.

    As output of ``forward`` and ``compute``: a float64 scalar in [-1, 1], or NaN.

    Source: arXiv:2605.10889.

    Examples:
        >>> import torch
        >>> metric = GradientAlignment()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
        >>> metric.undefined
        tensor(1)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    aligned: Tensor
    weight: Tensor
    nodes: Tensor
    undefined: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("aligned", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("nodes", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ideal: Tensor, distillation: Tensor, weight: Tensor | None = None) -> None:
        """Add nodes.

        Raises:
            ValueError: If shapes do not fit, or a weight is negative or not finite.
        """
        score = gradient_alignment(ideal.detach(), distillation.detach()).double()
        weight = torch.ones_like(score) if weight is None else weight.to(score)
        if weight.shape != score.shape:
            raise ValueError(f"`weight` must have shape {tuple(score.shape)}, but {tuple(weight.shape)} was given.")
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError("`weight` must be finite and not negative.")
        defined = ~torch.isnan(score)
        self.aligned += (weight * score)[defined].sum()
        self.weight += weight[defined].sum()
        self.nodes += defined.sum()
        self.undefined += (~defined).sum()

    def compute(self) -> Tensor:
        """Weighted mean over the defined nodes; NaN (0 / 0) where there is none."""
        return self.aligned / self.weight
