"""The student's success along its responses."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.success_by_depth import success_by_depth
from tests.helpers.records import random_nodes, report_of, synthetic


def test_success_is_that_of_the_nodes_of_a_class_and_window() -> None:
    sure = [
        synthetic((value, value), depth=depth, correct=correct, question=question, inclusion=inclusion).record
        for value, depth, correct, question, inclusion in (
            (1.0, 0, True, "0", 1.0),
            (0.5, 4, True, "0", 0.5),
            (0.25, 6, True, "1", 1.0),
            (0.0, 4, False, "2", 1.0),
        )
    ]
    found = {(split, window): estimate for split, window, estimate in success_by_depth(report_of(sure))}
    assert {key: estimate.value for key, estimate in found.items()} == pytest.approx(
        {
            ("all", "0"): 1.0,
            ("all", "4-7"): (2 * 0.5 + 0.25) / 4,
            ("correct", "0"): 1.0,
            ("correct", "4-7"): (2 * 0.5 + 0.25) / 3,
            ("incorrect", "4-7"): 0.0,
        }
    )
    assert np.isfinite([found["all", "4-7"].low, found["all", "4-7"].high]).all()
    assert found["correct", "4-7"].note == "2 questions"


def test_every_node_is_in_one_window() -> None:
    nodes = [replace(node, depth=2 * index) for index, node in enumerate(random_nodes(20))]
    counted = [estimate.nodes for split, _, estimate in success_by_depth(report_of(nodes)) if split == "all"]
    assert sum(counted) == 20
