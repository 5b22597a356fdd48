"""Gradient alignment as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from odp_callbacks.functional.alignment import gradient_alignment


class GradientAlignment(Metric):
    r"""Mean gradient alignment over nodes, the modular version of ``functional.gradient_alignment``.

    .. math:: \frac{\sum_u w_u \cos(g_u, d_u)}{\sum_u w_u}

    where :math:`g_u` is the ideal and :math:`d_u` the distillation gradient at node :math:`u`. The sums run over the
    nodes where the cosine exists. Other nodes are counted in :attr:`undefined` and do not enter the mean, which is NaN
    if there is no defined node. All states are sums, so batches and ranks add up exactly, even if one of them has no
    defined node.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``ideal`` (:class:`~torch.Tensor`): ideal gradients, float of shape ``(..., P)``.
    - ``distillation`` (:class:`~torch.Tensor`): distillation gradients, float of shape ``(..., P)``.
    - ``weight`` (:class:`~torch.Tensor`, optional): non-negative weight of each node, of shape ``(...)``, such as the
      inverse of its inclusion probability; 1 by default.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [-1, 1], or NaN.

    Of gradients on the logits this is the score of arXiv:2605.10889 (eq. 2.12); of gradients on the parameters it is
    ours.

    Args:
        kwargs: Options of :class:`torchmetrics.Metric`.

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
        """Add nodes to the mean.

        Args:
            ideal: Ideal gradients, ``(..., P)``.
            distillation: Distillation gradients, ``(..., P)``.
            weight: Weight of each node, ``(...)``; 1 by default.

        Raises:
            ValueError: If the shapes do not match, or a weight is negative or not finite.
        """
        alignment = gradient_alignment(ideal.detach(), distillation.detach()).double()
        weight = torch.ones_like(alignment) if weight is None else weight.to(alignment)
        if weight.shape != alignment.shape:
            raise ValueError(f"`weight` must have shape {tuple(alignment.shape)}, but {tuple(weight.shape)} was given.")
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError("`weight` must be finite and not negative.")
        defined = ~torch.isnan(alignment)
        self.aligned += (weight * alignment)[defined].sum()
        self.weight += weight[defined].sum()
        self.nodes += defined.sum()
        self.undefined += (~defined).sum()

    def compute(self) -> Tensor:
        """Weighted mean over the defined nodes; NaN if there is none."""
        return self.aligned / self.weight
