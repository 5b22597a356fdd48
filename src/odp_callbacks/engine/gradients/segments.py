"""Where to cut a rollout into segments so that the backward passes from its nodes are cheapest."""

from collections.abc import Sequence

MAX_SEGMENTS = 8
MAX_CANDIDATE_ENDS = 64
"""At most this many positions are considered as ends of segments."""


def segment_ends(
    positions: Sequence[int], direction_counts: Sequence[int], pass_overhead: float, *, repeats: bool = False
) -> list[int]:
    """Cut a sequence at its nodes so that the backward passes from them are cheapest.

    The cost of a cut is counted in tokens. Each direction of a node costs the tokens up to the end of the node's
    segment. Each segment that a batch of directions passes through costs ``pass_overhead`` tokens more. The cheapest
    cut is found by dynamic programming.

    Args:
        positions: ``N`` positions, one for each node.
        direction_counts: ``N`` numbers of directions, one for each node.
        pass_overhead: Cost of one pass through the model beyond that of its tokens, in tokens.
        repeats: Whether each segment reads the tokens before it once more, twice forward, which costs as much as a
            direction.

    Returns:
        The end of each segment. Each end is the position after a node, and the last one is after the last node.

    Examples:
        >>> segment_ends([10, 500, 501], [4, 4, 4], pass_overhead=32)
        [11, 502]
        >>> segment_ends([10, 500, 501], [4, 4, 4], pass_overhead=5000)
        [502]
        >>> segment_ends([10, 500, 501], [1, 1, 1], pass_overhead=0, repeats=True)
        [11, 502]
    """
    candidates = _candidate_positions(positions)
    directions_up_to = [
        sum(count for position, count in zip(positions, direction_counts, strict=True) if position <= candidate)
        for candidate in candidates
    ]
    # For the number of candidates that are covered and the number of segments: cost and ends of the cheapest cut.
    cheapest: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for candidate_count, position in enumerate(candidates, 1):
        for segment_count in range(1, min(candidate_count, MAX_SEGMENTS) + 1):
            for previous_count in range(segment_count - 1, candidate_count):
                if (previous_count, segment_count - 1) not in cheapest:
                    continue
                cost, previous_ends = cheapest[previous_count, segment_count - 1]
                directions = directions_up_to[candidate_count - 1]
                directions -= directions_up_to[previous_count - 1] if previous_count else 0
                # The overhead is that of a forward and one backward through each of the segments so far.
                cost += (directions + repeats) * (position + 1) + 2 * segment_count * pass_overhead
                key = candidate_count, segment_count
                if key not in cheapest or cost < cheapest[key][0]:
                    cheapest[key] = cost, [*previous_ends, position + 1]
    complete_cuts = [cut for (candidate_count, _), cut in cheapest.items() if candidate_count == len(candidates)]
    return min(complete_cuts, key=lambda cut: cut[0])[1]


def _candidate_positions(positions: Sequence[int]) -> list[int]:
    """The distinct positions in order; evenly spaced ones of them, with first and last, where there are too many."""
    distinct = sorted(set(positions))
    if len(distinct) <= MAX_CANDIDATE_ENDS:
        return distinct
    spacing = MAX_CANDIDATE_ENDS - 1
    return sorted({distinct[round(i * (len(distinct) - 1) / spacing)] for i in range(MAX_CANDIDATE_ENDS)})
