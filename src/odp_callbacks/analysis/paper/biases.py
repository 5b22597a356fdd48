r"""Two biases of the paper's protocol, in closed form. The derivations are ours.

**The path's own ending.** The paths are split into correct and incorrect ones by how they ended, and each ending is
among the visits of the very tokens that the path took. Among :math:`n` visits one outcome is then known beforehand:

.. math:: E[\hat P_{taken}^{succ} \mid r] - P_{taken}^{succ} = \frac{r - P_{taken}^{succ}}{n},
    \qquad r = 1 \text{ on correct paths and } 0 \text{ on incorrect ones}

The taken token is thus counted too low on incorrect paths and too high on correct ones. A teacher that gives it less
than the student does then scores too high on incorrect paths and too low on correct ones, whatever it knows; a teacher
that gives it more, the reverse. A teacher flatter than the student mostly does the former, a sharper one the latter.
The effect on the score is largest where tokens hardly differ in success, for there it decides a sign
(:func:`expected_cosine`). Leaving the path's own rollout out removes it for a path that was drawn before the split.
The paper draws as many paths of each class from every question. Where all rollouts of a class take the token, as at the
root, the success rate with all of them is then right, and leaving the own one out corrects too much, by the same order.

**Forced tokens at ancestors.** A targeted rollout behind a node of the path is also counted at every node before it.
There, it is no sample of the student's policy: its first tokens are the path's own, and one token is forced. The
success rate of a taken token moves towards the success behind the nodes that the same path reached later:

.. math:: E[\hat P^{succ}] = \frac{n_0 P^{succ} + \sum_b m_b P_b^{succ}}{n_0 + \sum_b m_b}

with :math:`n_0` visits of the student's own policy and :math:`m_b` of the forced token :math:`b`. Success behind later
nodes of a correct path is higher, and forced tokens are taken equally often, likely or not. The bias does not vanish
as visits grow, because forced visits grow with the others. Counting targeted rollouts from their forced token on
removes it.

Neither is needed for "incorrect above correct". An incorrect path took the worse tokens, so that a teacher which gives
the taken token less is right there: with the true success, too, and without knowing anything
(``benchmarks/paper_biases.py``).
"""

from collections.abc import Callable

import numpy as np

from odp_callbacks.analysis.paper.node_score import gkd_gradient
from odp_callbacks.analysis.paper.prefix_tree import Ancestors, Children, Integers, OwnPath, PrefixTree
from odp_callbacks.records import Floats

SuccessOfToken = Callable[[tuple[int, ...], int], float]
"""From a prefix and its next token to the probability that the student then succeeds."""
MAXIMUM_OUTCOMES = 2**21
"""Combinations of successes that are enumerated at most."""


def own_ending_bias(success: float, visits: float, correct: bool) -> float:
    """Bias of the success rate of a taken token because the path's own ending is among its visits.

    Args:
        success: The token's true probability of success.
        visits: Number of visits, the path's own included.
        correct: Whether the path was correct.

    Returns:
        Expected success rate minus ``success``.

    Examples:
        >>> own_ending_bias(0.5, visits=20, correct=False)
        -0.025
    """
    return (float(correct) - success) / visits


def success_with_forced_visits(
    success: float, own_visits: float, forced_success: Floats, forced_visits: Floats
) -> float:
    """Expected success rate of a token whose visits are in part those of tokens forced behind it.

    Args:
        success: The token's true probability of success.
        own_visits: Visits in which the student chose every token behind it.
        forced_success: ``(B,)``, probability of success behind each forced token.
        forced_visits: ``(B,)``, visits of each.

    Examples:
        >>> success_with_forced_visits(0.5, 100, np.array([0.0]), np.array([100]))
        0.25
    """
    total = own_visits + forced_visits.sum()
    return float((own_visits * success + forced_visits @ forced_success) / total)


def expected_cosine(
    student: Floats,
    log_ratio: Floats,
    success: Floats,
    visits: Integers,
    taken: int | None = None,
    correct: bool = False,
) -> tuple[float, float]:
    """Expected score of a node, by enumeration of all numbers of successes.

    Args:
        student: ``(A,)``, the student's probabilities, renormalised over the tokens.
        log_ratio: ``(A,)``, ``ln P_student - ln P_teacher`` in nats.
        success: ``(A,)``, true probabilities of success.
        visits: ``(A,)``, visits of each token.
        taken: Index of the token that the path took, whose own ending is one of its visits; None: it is left out.
        correct: How the path ended.

    Returns:
        The expected cosine where it is defined, and the probability that it is: that the success rates differ.

    Raises:
        ValueError: If there are too many combinations to enumerate.

    Examples:
        >>> even, ratio = np.array([0.5, 0.5]), np.array([1.0, -1.0])
        >>> value, _ = expected_cosine(even, ratio, success=even, visits=np.array([20, 20]))
        >>> abs(value) < 1e-9
        True
        >>> value, _ = expected_cosine(even, ratio, even, np.array([20, 20]), taken=0, correct=False)
        >>> round(value, 3)
        0.143
    """
    from scipy import stats  # importing it takes most of a second

    own_visits = np.zeros(len(success), dtype=np.int64)
    if taken is not None:
        own_visits[taken] = 1
    free = visits - own_visits
    if np.prod(free + 1.0) > MAXIMUM_OUTCOMES:
        raise ValueError(
            f"`visits` is {visits.tolist()}, which gives {np.prod(free + 1.0):.0f} combinations; give fewer visits or "
            f"tokens, with at most {MAXIMUM_OUTCOMES}."
        )
    pmf = [stats.binom.pmf(np.arange(n + 1), n, q) for n, q in zip(free, success, strict=True)]
    successes = np.indices(tuple((free + 1).tolist())).reshape(len(free), -1).T + own_visits * int(correct)  # (M, A)
    probability = np.prod(np.meshgrid(*pmf, indexing="ij"), axis=0).reshape(-1)  # (M,)
    rates = successes / visits
    ideal = student * (rates - (rates @ student)[:, None])  # (M, A)
    defined = np.ptp(rates, axis=1) > 0
    distillation = gkd_gradient(student, log_ratio)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = ideal @ distillation / (np.linalg.norm(ideal, axis=1) * np.linalg.norm(distillation))
    mass = float(probability[defined].sum())
    return float(probability[defined] @ cosine[defined] / mass) if mass > 0 else float("nan"), mass


def expected_successes(
    tree: PrefixTree,
    path: int,
    success_of: SuccessOfToken,
    own_path: OwnPath = "counted",
    ancestors: Ancestors = "counted",
) -> tuple[Children, Floats]:
    """The expected number of successes at the nodes of a path, given the visits and how the path ended.

    Args:
        tree: A question's tree.
        path: Index of the path.
        success_of: The truth.
        own_path: As in :meth:`~odp_callbacks.analysis.paper.prefix_tree.PrefixTree.children`.
        ancestors: As there.

    Returns:
        The children as they were counted, and the expected ``successes`` of each, ``(C,)``.
    """
    children = tree.children(path, own_path, ancestors)
    taken, shared, leaving = tree.paths[path], tree.shared[:, path], tree.next_token[:, path]
    first_rows, branch_of_row = np.unique(tree.branch, return_index=True, return_inverse=True)[1:]
    of_branch = np.array([_forced_success(tree, int(row), success_of) for row in first_rows])
    behind_forced = of_branch[branch_of_row.reshape(-1)]
    weight = tree.count.astype(float)
    own_response = tree.own[path]
    if own_path == "left out":
        weight[own_response] -= 1
    expected = np.zeros(len(children.depth))
    for place, (depth, token) in enumerate(zip(children.depth.tolist(), children.token.tolist(), strict=True)):
        takes = shared > depth if token == taken[depth] else (shared == depth) & (leaving == token)
        chosen_by_student = tree.forced_depth <= depth
        if ancestors == "own policy only":
            takes = takes & chosen_by_student
        success = np.where(chosen_by_student, success_of(taken[:depth], token), behind_forced)
        success[own_response] = tree.success[own_response]
        expected[place] = weight[takes] @ success[takes]
    return children, expected


def _forced_success(tree: PrefixTree, row: int, success_of: SuccessOfToken) -> float:
    """The true success behind the forced token of a targeted rollout; NaN for a rollout, which has none."""
    depth = int(tree.forced_depth[row])
    if depth < 0:
        return float("nan")
    path = int(np.flatnonzero(tree.shared[row] >= depth)[0])
    tokens = tree.paths[path]
    forced = tokens[depth] if tree.shared[row, path] > depth else int(tree.next_token[row, path])
    return success_of(tokens[:depth], forced)
