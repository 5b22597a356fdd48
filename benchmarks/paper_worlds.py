"""Questions small enough to enumerate, measured by the paper's protocol without a model, for `paper_biases.py`."""

from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.paper.biases import expected_successes
from odp_callbacks.analysis.paper.prefix_tree import Children, TreeResponse, prefix_tree
from odp_callbacks.analysis.paper.records import PaperRecord, PathRecord, QuestionRecord
from odp_callbacks.analysis.paper.representative_paths import representative_paths
from odp_callbacks.analysis.paper.scored_nodes import SuccessRates
from odp_callbacks.engine.paper.config import PaperConfig
from odp_callbacks.engine.paper.path_policies import PathPolicies
from odp_callbacks.engine.paper.targeted_rollouts import forced_tokens

LENGTH, TOKENS = 10, 2
"""Of every response, and of the vocabulary: 1,024 responses."""
DECISIVE = 0.3
"""Share of the nodes where the token matters by itself; elsewhere it matters by what it leads to."""
LOGIT_SPREAD = 1.5
"""Standard deviation of the student's logits."""
TEACHERS = {"flatter": 0.5, "independent": None}
"""Teachers that know nothing of success: the student's logits times a factor, and logits of their own. With two tokens,
a sharper teacher scores the negative of a flatter one."""


@dataclass(frozen=True)
class TinyQuestion:
    """A question whose every response is known.

    Attributes:
        student: For each depth ``t``, log-probabilities ``(TOKENS ** t, TOKENS)``; a prefix is a row.
        teachers: The same for each teacher, in the order of :data:`TEACHERS`.
        success: For each depth, ``(TOKENS ** t, TOKENS)``: probability of success after each token.
    """

    student: list[np.ndarray]
    teachers: list[list[np.ndarray]]
    success: list[np.ndarray]

    def success_of(self, prefix: tuple[int, ...], token: int) -> float:
        """The true success after a token."""
        return float(self.success[len(prefix)][row_of(prefix), token])

    def sample(self, prefix: tuple[int, ...], count: int, rng: np.random.Generator) -> list[TreeResponse]:
        """Responses that the student samples after a prefix."""
        tokens = np.tile(np.array(prefix, dtype=np.int64), (count, 1))
        rows = np.full(count, row_of(prefix))
        for depth in range(len(prefix), LENGTH):
            cumulative = np.exp(self.student[depth][rows]).cumsum(axis=1)
            drawn = (rng.random((count, 1)) > cumulative[:, :-1]).sum(axis=1)
            tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
            rows = rows * TOKENS + drawn
        return [
            TreeResponse(tuple(response), self.success_of(tuple(response[:-1]), response[-1]))
            for response in tokens.tolist()
        ]


def row_of(prefix: tuple[int, ...]) -> int:
    """The row of a prefix."""
    row = 0
    for token in prefix:
        row = row * TOKENS + token
    return row


def tiny_question(seed: int) -> TinyQuestion:
    """A question with rewards of 0 and 1 that hang on all tokens, and a pass rate between 0.2 and 0.8."""
    rng = np.random.default_rng(seed)
    logits = [rng.normal(0, LOGIT_SPREAD, (TOKENS**depth, TOKENS)) for depth in range(LENGTH)]
    student = [_log_softmax(values) for values in logits]
    teachers = [
        [
            _log_softmax(rng.normal(0, LOGIT_SPREAD, values.shape) if factor is None else factor * values)
            for values in logits
        ]
        for factor in TEACHERS.values()
    ]
    worth = np.zeros(1)
    for depth in range(LENGTH):
        shape = (TOKENS**depth, TOKENS)
        own_worth = rng.normal(size=shape) * (rng.random((shape[0], 1)) < DECISIVE)
        worth = (worth[:, None] + own_worth).reshape(-1)
    passed = (worth > np.quantile(worth, rng.uniform(0.3, 0.7))).astype(float).reshape(-1, TOKENS)
    success = [passed]
    for depth in range(LENGTH - 1, 0, -1):
        values = (np.exp(student[depth]) * success[0]).sum(axis=1)
        success.insert(0, values.reshape(-1, TOKENS))
    return TinyQuestion(student, teachers, success)


def measure(questions: list[TinyQuestion], config: PaperConfig, seed: int) -> PaperRecord:
    """Measure questions by the protocol."""
    records = [_measured(str(number), one, config, (seed, number)) for number, one in enumerate(questions)]
    return PaperRecord(
        tuple(TEACHERS), tuple(record for record in records if record.paths), config.settings(), config.deviations()
    )


def _measured(name: str, question: TinyQuestion, config: PaperConfig, seed: tuple[int, int]) -> QuestionRecord:
    rng = np.random.default_rng(seed)
    rollouts = question.sample((), config.rollouts_per_question, rng)
    correct = [rollout.success == 1 for rollout in rollouts]
    tree = prefix_tree(
        representative_paths([rollout.tokens for rollout in rollouts], correct, config.paths_per_class), rollouts
    )
    policies = [_policies(question, path, config.enrichment_threshold) for path in tree.paths]
    forced, depths = forced_tokens(0, tree, policies, config)
    targeted = []
    for branch, token in enumerate(forced):
        prefix = (*tree.paths[token.path][: token.depth], token.token)
        targeted += [
            TreeResponse(response.tokens, response.success, token.depth, branch)
            for response in question.sample(prefix, token.rollouts, rng)
        ]
    tree = tree.extended(targeted)
    paths = []
    for place, path in enumerate(tree.paths):
        children = tree.children(place)
        paths.append(
            PathRecord(
                "",
                bool(tree.success[tree.own[place]]),
                depths[place],
                policies[place].predictors,
                children.depth,
                children.token,
                _at_children(question.student, path, children),
                np.stack([_at_children(teacher, path, children) for teacher in question.teachers]),
            )
        )
    return QuestionRecord(name, "", float(np.mean(correct)), tree, tuple(paths))


def _policies(question: TinyQuestion, path: tuple[int, ...], threshold: float) -> PathPolicies:
    """The policies along a path, as the engine computes them from logits."""
    places = [(depth, row_of(path[:depth])) for depth in range(LENGTH)]
    student = np.stack([question.student[depth][row] for depth, row in places])  # (T, V)
    teachers = np.stack([[teacher[depth][row] for depth, row in places] for teacher in question.teachers])
    own, others = np.exp(student), np.exp(teachers)
    ratio = student - teachers
    gradient = -own * (ratio - (own * ratio).sum(axis=-1, keepdims=True))  # (K, T, V)
    difference = np.abs(others - own)
    mixture = np.log((own + others) / 2)
    predictors = {
        "kl": (own * ratio).sum(-1),
        "js": ((own * (student - mixture)).sum(-1) + (others * (teachers - mixture)).sum(-1)) / 2,
        "l2": np.linalg.norm(difference, axis=-1),
        "policy_cosine": (own * others).sum(-1) / np.linalg.norm(own, axis=-1) / np.linalg.norm(others, axis=-1),
    }
    worth = (own > threshold) | (others > threshold).any(axis=0)
    candidates = tuple(tuple(np.flatnonzero(row).tolist()) for row in worth)
    return PathPolicies(np.linalg.norm(gradient, axis=-1), difference.sum(-1) / 2, predictors, candidates)


def true_rates(questions: list[TinyQuestion], record: PaperRecord) -> SuccessRates:
    """The true success of the tokens at the nodes of a record's paths."""

    def rates(question: int, path: int, children: Children) -> np.ndarray:
        one = record.questions[question]
        return _at_children(questions[int(one.id)].success, one.tree.paths[path], children)

    return rates


def predicted_rates(questions: list[TinyQuestion], record: PaperRecord) -> SuccessRates:
    """The success rates that the protocol is predicted to converge to."""

    def rates(question: int, path: int, children: Children) -> np.ndarray:
        one = record.questions[question]
        counted, successes = expected_successes(one.tree, path, questions[int(one.id)].success_of)
        pairs = zip(counted.depth.tolist(), counted.token.tolist(), strict=True)
        rate_of = dict(zip(pairs, (successes / counted.visits).tolist(), strict=True))
        return np.array([rate_of[pair] for pair in zip(children.depth.tolist(), children.token.tolist(), strict=True)])

    return rates


def _at_children(table: list[np.ndarray], path: tuple[int, ...], children: Children) -> np.ndarray:
    """The entries of a table at visited tokens, ``(C,)``."""
    return np.array(
        [
            table[depth][row_of(path[:depth]), token]
            for depth, token in zip(children.depth.tolist(), children.token.tolist(), strict=True)
        ]
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
