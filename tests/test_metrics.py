"""The torchmetrics metric."""

import pytest
import torch
from torchmetrics import MetricCollection

from odp_callbacks import GradientAlignment
from odp_callbacks.functional import gradient_alignment


def test_it_is_the_weighted_mean_over_defined_nodes_in_any_batching() -> None:
    torch.manual_seed(0)
    ideal, distillation = torch.randn(2, 12, 5, dtype=torch.float64)
    ideal[3] = 0
    weight = torch.rand(12, dtype=torch.float64)
    defined = torch.arange(12) != 3
    expected = (weight * gradient_alignment(ideal, distillation))[defined].sum() / weight[defined].sum()
    metric = GradientAlignment()
    for batch in (slice(0, 4), slice(4, 5), slice(5, 12)):
        metric.update(ideal[batch], distillation[batch], weight[batch])
    torch.testing.assert_close(metric.compute(), expected)
    assert (int(metric.nodes), int(metric.undefined)) == (11, 1)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric GradientAlignment was called before:UserWarning")
def test_ranks_add_up_also_where_one_has_no_defined_node() -> None:
    torch.manual_seed(1)
    ideal, distillation = torch.randn(2, 6, 4)
    single_process, first_rank, second_rank = GradientAlignment(), GradientAlignment(), GradientAlignment()
    single_process.update(torch.cat([ideal, torch.zeros(2, 4)]), torch.cat([distillation, distillation[:2]]))
    first_rank.update(ideal, distillation)
    second_rank.update(torch.zeros(2, 4), distillation[:2])
    assert torch.isnan(second_rank.compute())
    for state, reduction in first_rank._reductions.items():
        states = torch.stack([getattr(first_rank, state), getattr(second_rank, state)])
        setattr(first_rank, state, reduction(states))
    torch.testing.assert_close(first_rank.compute(), single_process.compute())
    assert int(first_rank.undefined) == int(single_process.undefined) == 2


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
