"""The torchmetrics metric."""

import pytest
import torch
from torchmetrics import MetricCollection

from odp_callbacks import GradientAlignment
from odp_callbacks.functional import gradient_alignment


def test_it_is_the_weighted_mean_over_defined_nodes_in_any_batching() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 12, 5, dtype=torch.float64)
    a[3] = 0
    w = torch.rand(12, dtype=torch.float64)
    keep = torch.arange(12) != 3
    expected = (w * gradient_alignment(a, b))[keep].sum() / w[keep].sum()
    metric = GradientAlignment()
    for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
        metric.update(a[part], b[part], w[part])
    torch.testing.assert_close(metric.compute(), expected)
    assert (int(metric.nodes), int(metric.undefined)) == (11, 1)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric GradientAlignment was called before:UserWarning")
def test_ranks_add_up_also_where_one_has_no_defined_node() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 6, 4)
    whole, first, second = GradientAlignment(), GradientAlignment(), GradientAlignment()
    whole.update(torch.cat([a, torch.zeros(2, 4)]), torch.cat([b, b[:2]]))
    first.update(a, b)
    second.update(torch.zeros(2, 4), b[:2])
    assert torch.isnan(second.compute())
    for name, reduction in first._reductions.items():
        setattr(first, name, reduction(torch.stack([getattr(first, name), getattr(second, name)])))
    torch.testing.assert_close(first.compute(), whole.compute())
    assert int(first.undefined) == int(whole.undefined) == 2


def test_without_a_defined_node_it_is_nan_and_reset_forgets() -> None:
    metric = GradientAlignment()
    metric.update(torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.isnan(metric.compute())
    metric.reset()
    metric.update(torch.ones(1, 3), -torch.ones(1, 3))
    assert float(metric.compute()) == pytest.approx(-1)
    assert int(metric.undefined) == 0


def test_in_a_collection_and_by_forward() -> None:
    collection = MetricCollection({"alignment": GradientAlignment()})
    assert float(collection(torch.ones(2, 3), torch.ones(2, 3))["alignment"]) == pytest.approx(1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="`weight` must have shape"):
        GradientAlignment().update(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        GradientAlignment().update(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([1.0, -1.0]))
