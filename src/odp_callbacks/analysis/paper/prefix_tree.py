"""The prefix tree of a question: how often each token was visited at each node, and how often that ended in success."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats

Integers = NDArray[np.int64]
OwnPath = Literal["counted", "left out"]
Ancestors = Literal["counted", "own policy only"]
OWN_PATH: tuple[OwnPath, ...] = ("counted", "left out")
ANCESTORS: tuple[Ancestors, ...] = ("counted", "own policy only")
ROLLOUT = -1
"""Branch and forced depth of a rollout, in which no token was forced."""
ENDED = -1
"""The next token of a response that has none."""


@dataclass(frozen=True)
class TreeResponse:
    """A finished response of the student.

    Attributes:
        tokens: All of its tokens, from the first on.
        success: 1 for success, 0 for failure.
        forced_depth: Depth of the token that was forced in a targeted rollout; :data:`ROLLOUT` in a rollout.
        branch: Number of the enriched branch of a targeted rollout; :data:`ROLLOUT` in a rollout.
        count: How often it counts. A forced token that ends the response leaves nothing to sample: the response
            stands for all of the branch's targeted rollouts.
    """

    tokens: tuple[int, ...]
    success: float
    forced_depth: int = ROLLOUT
    branch: int = ROLLOUT
    count: int = 1


@dataclass(frozen=True)
class Children:
    """The visited tokens of the nodes of a path, ``(C,)`` each, in ascending order of depth and token.

    Attributes:
        depth: Depth of the node, which is the number of tokens before it.
        token: The token.
        visits: Number of responses that take the token at the node.
        successes: How many of these succeeded.
    """

    depth: Integers
    token: Integers
    visits: Floats
    successes: Floats


@dataclass(frozen=True)
class PrefixTree:
    """All responses to a question as a tree of prefixes, seen from its ``P`` representative paths.

    Only nodes of these paths are scored. Of each of the ``R`` responses the tree therefore keeps where it leaves each
    path, which determines visits and successes at every node of the paths.

    Attributes:
        paths: The tokens of each path.
        own: ``(P,)``, index of the response that is the path itself.
        shared: ``(R, P)``, number of first tokens that a response shares with a path.
        next_token: ``(R, P)``, the token with which it leaves the path; :data:`ENDED` if it does not.
        success: ``(R,)``.
        forced_depth: ``(R,)``.
        branch: ``(R,)``.
        count: ``(R,)``.

    Examples:
        >>> rollouts = [TreeResponse((5, 7), 1.0), TreeResponse((5, 8), 0.0), TreeResponse((6, 8), 0.0)]
        >>> children = prefix_tree([0], rollouts).children(0)
        >>> children.depth.tolist(), children.token.tolist(), children.visits.tolist(), children.successes.tolist()
        ([0, 0, 1, 1], [5, 6, 7, 8], [2.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0])
    """

    paths: tuple[tuple[int, ...], ...]
    own: Integers
    shared: Integers
    next_token: Integers
    success: Floats
    forced_depth: Integers
    branch: Integers
    count: Integers

    def extended(self, responses: Sequence[TreeResponse]) -> "PrefixTree":
        """Return the tree with further responses."""
        leaving = [_leaves(np.asarray(path), responses) for path in self.paths]
        added: dict[str, NDArray[Any]] = {
            "shared": np.array([shared for shared, _ in leaving], dtype=np.int64).reshape(len(self.paths), -1).T,
            "next_token": np.array([token for _, token in leaving], dtype=np.int64).reshape(len(self.paths), -1).T,
            "success": np.array([response.success for response in responses], dtype=float),
            **{
                name: np.array([getattr(response, name) for response in responses], dtype=np.int64)
                for name in ("forced_depth", "branch", "count")
            },
        }
        columns: dict[str, Any] = {name: np.concatenate([getattr(self, name), new]) for name, new in added.items()}
        return replace(self, **columns)

    def children(self, path: int, own_path: OwnPath = "counted", ancestors: Ancestors = "counted") -> Children:
        """Count visits and successes at the nodes of a path.

        The paper counts every response at every node that it passes. A targeted rollout thereby counts at its node, at
        the nodes that it passes afterwards and at all ancestors, and nothing is reweighted. Both options change one
        part of this, and both biases are described in :mod:`odp_callbacks.analysis.paper.biases`.

        Args:
            path: Index of the path.
            own_path: ``"counted"`` as in the paper, or ``"left out"``: the path's own rollout does not count.
            ancestors: ``"counted"`` as in the paper, or ``"own policy only"``: a targeted rollout does not count at
                nodes before its forced token, which the student did not choose.

        Raises:
            ValueError: If an option is unknown.
        """
        check_counting(own_path, ancestors)
        weight = self.count.astype(float)
        if own_path == "left out":
            weight[self.own[path]] -= 1
        first = np.maximum(self.forced_depth, 0) if ancestors == "own policy only" else np.zeros_like(self.forced_depth)
        shared, token = self.shared[:, path], self.next_token[:, path]
        taken = np.asarray(self.paths[path], dtype=np.int64)
        visits_taken = _covering(first, shared, weight, len(taken))
        successes_taken = _covering(first, shared, weight * self.success, len(taken))
        leaves = (token != ENDED) & (shared >= first) & (weight > 0)
        depth = np.concatenate([np.arange(len(taken)), shared[leaves]])
        tokens = np.concatenate([taken, token[leaves]])
        keys, places = np.unique(np.stack([depth, tokens]), axis=1, return_inverse=True)
        places = places.reshape(-1)
        visits = np.bincount(places, np.concatenate([visits_taken, weight[leaves]]), keys.shape[1])
        successes = np.bincount(
            places, np.concatenate([successes_taken, (weight * self.success)[leaves]]), keys.shape[1]
        )
        visited = visits > 0
        return Children(
            keys[0][visited], keys[1][visited], visits[visited].astype(float), successes[visited].astype(float)
        )

    def thinned(self, share: float) -> "PrefixTree":
        """The tree of the same protocol with fewer responses: the first ones of the rollouts and of each branch.

        Args:
            share: The share of the rollouts and of each branch's targeted rollouts that is kept, in (0, 1]. The paths'
                own rollouts are always kept.
        """
        kept_count = np.zeros_like(self.count)
        for branch in np.unique(self.branch):
            of_branch = np.flatnonzero(self.branch == branch)
            before = np.concatenate([[0], self.count[of_branch].cumsum()])
            limit = int(np.ceil(share * before[-1]))
            kept_count[of_branch] = np.clip(limit - before[:-1], 0, self.count[of_branch])
        kept_count[self.own] = 1
        kept = np.flatnonzero(kept_count)
        rows = {name: getattr(self, name)[kept] for name in ("shared", "next_token", "success", "forced_depth")}
        return replace(
            self, own=np.searchsorted(kept, self.own), branch=self.branch[kept], count=kept_count[kept], **rows
        )


def prefix_tree(own: Sequence[int], responses: Sequence[TreeResponse]) -> PrefixTree:
    """Make the tree of a question.

    Args:
        own: For each of ``P`` paths, the index of its response.
        responses: ``R`` responses.
    """
    paths = tuple(responses[index].tokens for index in own)
    no_responses, no_rows = np.zeros(0, dtype=np.int64), np.zeros((0, len(paths)), dtype=np.int64)
    empty = PrefixTree(
        paths,
        np.asarray(own, dtype=np.int64),
        no_rows,
        no_rows,
        np.zeros(0),
        no_responses,
        no_responses,
        no_responses,
    )
    return empty.extended(responses)


def check_counting(own_path: str, ancestors: str) -> None:
    """Raise ``ValueError`` unless both options of :meth:`PrefixTree.children` are known."""
    for name, given, valid in (("own_path", own_path, OWN_PATH), ("ancestors", ancestors, ANCESTORS)):
        if given not in valid:
            raise ValueError(f"`{name}` must be one of {list(valid)}, but {given!r} was given.")


def _leaves(path: Integers, responses: Sequence[TreeResponse]) -> tuple[list[int], list[int]]:
    """Where each response leaves a path, and with which token."""
    lengths, tokens = [], []
    for response in responses:
        tokens_taken = np.asarray(response.tokens, dtype=np.int64)
        common = min(len(tokens_taken), len(path))
        different = np.flatnonzero(tokens_taken[:common] != path[:common])
        shared = int(different[0]) if len(different) else common
        lengths.append(shared)
        tokens.append(int(tokens_taken[shared]) if shared < len(tokens_taken) and shared < len(path) else ENDED)
    return lengths, tokens


def _covering(first: Integers, end: Integers, weight: Floats, length: int) -> Floats:
    """For each depth below ``length``, the weight of the responses with ``first <= depth < end``."""
    change = np.zeros(length + 1)
    covered = first < end
    np.add.at(change, first[covered], weight[covered])
    np.add.at(change, end[covered], -weight[covered])
    total: Floats = change.cumsum()[:length]
    return total
