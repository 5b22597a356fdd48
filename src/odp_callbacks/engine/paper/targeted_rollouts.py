"""Targeted rollouts: prefix and forced token, then the student to the end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from odp_callbacks.analysis.paper.depth_windows import ranked_depths
from odp_callbacks.analysis.paper.enrichment import missing_visits
from odp_callbacks.analysis.paper.prefix_tree import PrefixTree, TreeResponse
from odp_callbacks.engine.engines.student_engine import StudentEngine
from odp_callbacks.engine.journal import Journal, sample_unless_stored
from odp_callbacks.engine.paper.config import PaperConfig
from odp_callbacks.engine.paper.path_policies import PathPolicies
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import response_text
from odp_callbacks.engine.sampling.backends import prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.records import Floats


@dataclass(frozen=True)
class ForcedToken:
    """A token that is enriched.

    Attributes:
        question: Index of the question.
        path: Index of a path of the question that reaches the node.
        depth: Depth of the node.
        token: The token.
        rollouts: Number of targeted rollouts.
    """

    question: int
    path: int
    depth: int
    token: int
    rollouts: int


def forced_tokens(
    question: int, tree: PrefixTree, policies: Sequence[PathPolicies], config: PaperConfig
) -> tuple[list[ForcedToken], list[tuple[int, ...]]]:
    """Choose the tokens of a question that are enriched.

    Args:
        question: Index of the question.
        tree: Its tree, with its rollouts.
        policies: The policies along each of its paths.
        config: The options.

    Returns:
        The tokens, each once where paths share a node, and for each path the depths that are enriched because they
        rank high on it.
    """
    chosen: dict[tuple[tuple[int, ...], int], ForcedToken] = {}
    depths_of_path = []
    for path_index, (path, of_path) in enumerate(zip(tree.paths, policies, strict=True)):
        depths = _ranked(of_path, config)
        depths_of_path.append(depths)
        children = tree.children(path_index)
        visits = {
            (int(depth), int(token)): int(count)
            for depth, token, count in zip(children.depth, children.token, children.visits, strict=True)
        }
        for depth in depths:
            for token in of_path.candidates[depth]:
                missing = missing_visits(visits.get((depth, token), 0), config.enriched_visits)
                if missing and (path[:depth], token) not in chosen:
                    chosen[path[:depth], token] = ForcedToken(question, path_index, depth, token, missing)
    return list(chosen.values()), depths_of_path


def _ranked(policies: PathPolicies, config: PaperConfig) -> tuple[int, ...]:
    """The depths of a path that rank high for at least one teacher."""

    def of_teacher(gradient_size: Floats, difference: Floats) -> tuple[int, ...]:
        return ranked_depths(gradient_size, difference, config.by_gradient, config.by_difference, config.first_window)

    depths: set[int] = set()
    for gradient_size, difference in zip(policies.gradient_size, policies.difference, strict=True):
        depths.update(of_teacher(gradient_size, difference))
    return tuple(sorted(depths))


@dataclass
class TargetedCost:
    """What targeted rollouts have cost.

    Attributes:
        rollouts: Number of targeted rollouts that were sampled.
        tokens: Number of sampled tokens.
    """

    rollouts: int = 0
    tokens: int = 0


@dataclass
class TargetedPlan:
    """What is sampled and scored, by number: first the rollouts to sample, then the responses that a token ends.

    Attributes:
        requests: One request for each rollout to sample.
        keys: For each request, the key of its random draws.
        branches: For each number, the index of its forced token.
        prefixes: For each forced token, the response up to it, with it.
    """

    requests: list[ContinuationRequest] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class TargetedSampler:
    """Samples targeted rollouts of several questions in one batch, and scores them.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        verifier: Scores the responses.
        config: The options.
        eos_token_ids: Tokens that end a response.
        randomness: Random draws; those of a rollout depend on its question, prefix, token and number only.
        journal: Stores rollouts as they finish.
        engine: Samples in place of the student's own model; None: that model does.
        cost: What has been sampled so far.
    """

    student: nn.Module
    tokenizer: Any
    verifier: Verifier
    config: PaperConfig
    eos_token_ids: Sequence[int]
    randomness: Randomness
    journal: Journal | None = None
    engine: StudentEngine | None = None
    cost: TargetedCost = field(default_factory=TargetedCost)

    def sample(
        self,
        questions: Sequence[Question],
        paths: Sequence[Sequence[tuple[int, ...]]],
        forced: Sequence[ForcedToken],
    ) -> list[list[TreeResponse]]:
        """Sample all targeted rollouts of some questions.

        A forced token that ends the response leaves nothing to sample. The response is scored once, and counts as
        often as the rollouts that were asked for.

        Args:
            questions: The questions.
            paths: The paths of each question.
            forced: What to sample. Its place is the number of the branch.

        Returns:
            The scored responses of each question; those without a reward are left out.
        """
        plan = self._plan(questions, paths, forced)
        scoring = self.verifier.open()
        responses: dict[int, tuple[int, ...]] = {}

        def submit(number: int, suffix: tuple[int, ...]) -> None:
            branch = plan.branches[number]
            responses[number] = (*plan.prefixes[branch], *suffix)
            text = response_text(self.tokenizer, responses[number], self.eos_token_ids)
            scoring.add(number, questions[forced[branch].question], text, responses[number])

        def on_finished(finished: Mapping[int, Continuation]) -> None:
            for number, continuation in finished.items():
                submit(number, continuation.tokens)

        sampled = self._continuations(questions, paths, plan, on_finished)
        for number in range(len(sampled), len(plan.branches)):
            submit(number, ())
        self.cost.rollouts += len(sampled)
        self.cost.tokens += sum(len(continuation.tokens) for continuation in sampled)
        of_question: list[list[TreeResponse]] = [[] for _ in questions]
        for number, reward in sorted(scoring.rewards().items()):
            if math.isnan(reward):  # the reward function has nothing to say
                continue
            branch = plan.branches[number]
            token, success = forced[branch], float(reward >= self.config.success_threshold)
            count = 1 if number < len(sampled) else token.rollouts
            of_question[token.question].append(TreeResponse(responses[number], success, token.depth, branch, count))
        return of_question

    def _plan(
        self,
        questions: Sequence[Question],
        paths: Sequence[Sequence[tuple[int, ...]]],
        forced: Sequence[ForcedToken],
    ) -> TargetedPlan:
        """Turn forced tokens into requests."""
        plan, ending = TargetedPlan(), []
        first_sequence = [sum(map(len, paths[:index])) for index in range(len(questions))]
        for branch, token in enumerate(forced):
            question, limit = questions[token.question], self.config.max_new_tokens - token.depth - 1
            prefix = paths[token.question][token.path][: token.depth]
            plan.prefixes.append((*prefix, token.token))
            if token.token in self.eos_token_ids or limit == 0:
                ending.append(branch)
                continue
            sequence, length = first_sequence[token.question] + token.path, len(question.prompt_ids) + token.depth
            plan.requests += [ContinuationRequest(sequence, length, token.token, limit)] * token.rollouts
            plan.branches += [branch] * token.rollouts
            plan.keys += [
                self.randomness.key(question.id, "targeted", prefix, token.token, number)
                for number in range(token.rollouts)
            ]
        plan.branches += ending
        return plan

    def _continuations(
        self,
        questions: Sequence[Question],
        paths: Sequence[Sequence[tuple[int, ...]]],
        plan: TargetedPlan,
        on_finished: FinishedCallback,
    ) -> list[Continuation]:
        """Sample the requests, or take them from the journal."""
        config = self.config

        def sample(missing: list[int], report: FinishedCallback) -> list[Continuation]:
            # A path's last prompt token belongs to its response: a forced token at depth 0 must not see it twice.
            prefilled = prefill_rollouts(
                self.student,
                [question.prompt_ids[:-1] for question in questions],
                [
                    torch.cat([question.prompt_ids[-1:], torch.tensor(path[:-1], dtype=torch.long)])
                    for question, of_question in zip(questions, paths, strict=True)
                    for path in of_question
                ],
                [index for index, of_question in enumerate(paths) for _ in of_question],
                max_new_tokens=config.max_new_tokens,
                engine=self.engine,
            )
            return sample_continuations(
                self.student,
                prefilled,
                [plan.requests[index] for index in missing],
                temperature=config.temperature,
                eos_token_ids=self.eos_token_ids,
                keys=[plan.keys[index] for index in missing],
                batch_size=config.batch_size,
                max_memory_bytes=config.max_memory_bytes,
                on_finished=report,
            )

        return sample_unless_stored(self.journal, plan.keys, sample, on_finished)
