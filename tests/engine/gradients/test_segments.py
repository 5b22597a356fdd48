"""The choice of segments, against every way to cut a sequence at its nodes."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.gradients.segments import segment_ends


@given(
    nodes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6)), min_size=1, max_size=7, unique_by=lambda n: n[0]),
    overhead=st.floats(0, 300),
)
def test_no_other_cut_at_nodes_is_cheaper(nodes, overhead):
    positions, counts = zip(*nodes, strict=True)

    def cost(ends):
        total = 0.0
        for index, (start, end) in enumerate(pairwise([0, *ends]), 1):
            directions = sum(count for position, count in nodes if start <= position < end)
            total += directions * end + 2 * index * overhead
        return total

    candidates = sorted(position + 1 for position in positions)
    cuts = [(*cut, candidates[-1]) for size in range(len(candidates)) for cut in combinations(candidates[:-1], size)]
    chosen = segment_ends(positions, counts, overhead)
    assert chosen[-1] == candidates[-1]
    assert cost(chosen) == pytest.approx(min(map(cost, cuts)))
