"""One run of the paper's protocol: the stages from questions to a record."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from odp_callbacks.analysis.paper.prefix_tree import Children, PrefixTree, TreeResponse, prefix_tree
from odp_callbacks.analysis.paper.records import PaperRecord, PathRecord, QuestionRecord
from odp_callbacks.analysis.paper.representative_paths import representative_paths
from odp_callbacks.engine.engines.student_engine import StudentEngine
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.paper.config import PaperConfig
from odp_callbacks.engine.paper.path_policies import PathPolicies, PathReader
from odp_callbacks.engine.paper.targeted_rollouts import TargetedSampler, forced_tokens
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout, sample_rollouts, score_rollouts, try_thread
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import Teacher
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.verifier import Verifier

QUESTIONS_AT_ONCE = 16
"""Questions whose targeted rollouts are sampled in one batch; more would need more memory for their responses."""


@dataclass(frozen=True)
class RolledOut:
    """A question with its rollouts merged into a tree.

    Attributes:
        question: The question.
        rollouts: Its rollouts, those with a reward.
        pass_rate: Share of them that are correct.
        tree: Their tree, with the representative paths.
        policies: The policies along each path.
    """

    question: Question
    rollouts: list[Rollout]
    pass_rate: float
    tree: PrefixTree
    policies: list[PathPolicies]


@dataclass(frozen=True)
class PaperMeasurement:
    """The stages of the protocol: rollouts, representative paths, ranking, targeted rollouts, record.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        teachers: The teachers by name; one tree serves all.
        config: The options.
        verifier: Scores responses.
        eos_token_ids: Tokens that end a response.
        seed: Seed of everything random.
        timer: Times the stages and reports their progress.
        journal: Stores rollouts as they finish.
        engine: Samples in place of the student's own model; None: that model does.
    """

    student: nn.Module
    tokenizer: Any
    teachers: Mapping[str, Teacher]
    config: PaperConfig
    verifier: Verifier
    eos_token_ids: tuple[int, ...]
    seed: int
    timer: StageTimer
    journal: Journal | None = None
    engine: StudentEngine | None = None

    @property
    def randomness(self) -> Randomness:
        """The source of all random draws; each is a function of the seed and of a name."""
        return Randomness(self.seed)

    @property
    def reader(self) -> PathReader:
        """Computes policies along paths."""
        return PathReader(self.student, self.teachers, self.config.temperature)

    def run(self, questions: Sequence[Question]) -> PaperRecord:
        """Run all stages, for some questions at a time.

        Args:
            questions: The questions, with the teachers' prompts.
        """
        sampler = TargetedSampler(
            self.student,
            self.tokenizer,
            self.verifier,
            self.config,
            self.eos_token_ids,
            self.randomness,
            self.journal,
            self.engine,
        )
        if self.engine is not None:
            with self.timer.stage("engine", 1):
                self.engine.prepare(
                    questions,
                    max_new_tokens=self.config.max_new_tokens,
                    stop_token_ids=self.eos_token_ids,
                    randomness=self.randomness,
                )
        records: list[QuestionRecord] = []
        left_out: Counter[str] = Counter()
        rollout_tokens = 0
        for start in range(0, len(questions), QUESTIONS_AT_ONCE):
            block = questions[start : start + QUESTIONS_AT_ONCE]
            rollouts = self.rollouts(block)
            rollout_tokens += sum(len(rollout.response_ids) for rollout in rollouts)
            rolled_out = self.representative(rollouts, left_out)
            records += self.enriched(rolled_out, sampler)
        return PaperRecord(
            teachers=tuple(self.teachers),
            questions=tuple(records),
            settings={"seed": self.seed, **self.config.settings()},
            deviations=self.config.deviations(),
            unpublished=self.config.unpublished(),
            left_out=dict(left_out),
            generated_tokens={"rollouts": rollout_tokens, "targeted": sampler.cost.tokens},
            targeted_rollouts=sampler.cost.rollouts,
            stage_seconds=self.timer.seconds,
        )

    def rollouts(self, questions: Sequence[Question]) -> list[Rollout]:
        """Sample G rollouts of each question, and score them."""
        config = self.config
        with self.timer.stage("rollouts", len(questions) * config.rollouts_per_question):
            rollouts = sample_rollouts(
                self.student,
                self.tokenizer,
                questions,
                per_question=config.rollouts_per_question,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos_token_ids=self.eos_token_ids,
                randomness=self.randomness,
                batch_size=config.batch_size,
                journal=self.journal,
                engine=self.engine,
            )
        with self.timer.stage("verifier", len(rollouts)):
            rollouts = score_rollouts(self.verifier, rollouts)
        try_thread(self.verifier, rollouts)
        return rollouts

    def representative(self, rollouts: Sequence[Rollout], left_out: Counter[str]) -> list[RolledOut]:
        """Choose each question's paths and read the policies along them; count the questions that are left out."""
        questions = []
        grouped = [list(group) for _, group in groupby(rollouts, key=lambda rollout: id(rollout.question))]
        with self.timer.stage("policies", len(grouped)) as progress:
            for number, group in enumerate(grouped, 1):
                scored = [rollout for rollout in group if not math.isnan(rollout.reward)]
                correct = [rollout.reward >= self.config.success_threshold for rollout in scored]
                if not any(correct):
                    left_out["pass rate 0" if scored else "no reward"] += 1
                    continue
                responses = [rollout.response_ids for rollout in scored]
                paths = representative_paths(responses, correct, self.config.paths_per_class)
                tree = prefix_tree(
                    paths, [TreeResponse(tokens, float(ok)) for tokens, ok in zip(responses, correct, strict=True)]
                )
                question = scored[0].question
                policies = [
                    self.reader.policies(question, path, self.config.enrichment_threshold) for path in tree.paths
                ]
                questions.append(RolledOut(question, scored, sum(correct) / len(correct), tree, policies))
                progress(number)
        return questions

    def enriched(self, questions: Sequence[RolledOut], sampler: TargetedSampler) -> list[QuestionRecord]:
        """Sample the targeted rollouts of the questions, and make their records."""
        chosen = [forced_tokens(index, one.tree, one.policies, self.config) for index, one in enumerate(questions)]
        forced = [token for tokens, _ in chosen for token in tokens]
        with self.timer.stage("targeted rollouts", sum(token.rollouts for token in forced)):
            responses = sampler.sample(
                [one.question for one in questions], [one.tree.paths for one in questions], forced
            )
        with self.timer.stage("log-probabilities", len(questions)) as progress:
            records = []
            for number, (one, added, (_, depths)) in enumerate(zip(questions, responses, chosen, strict=True), 1):
                records.append(self.question_record(one, one.tree.extended(added), depths))
                progress(number)
        return records

    def question_record(
        self, question: RolledOut, tree: PrefixTree, enriched: Sequence[tuple[int, ...]]
    ) -> QuestionRecord:
        """Make the record of a question.

        Args:
            question: The question with its rollouts.
            tree: The tree with all responses.
            enriched: The enriched depths of each path.
        """
        paths = []
        for place, policies in enumerate(question.policies):
            children: Children = tree.children(place)
            student, teachers = self.reader.log_probabilities(
                question.question, tree.paths[place], children.depth, children.token
            )
            rollout = question.rollouts[tree.own[place]]
            paths.append(
                PathRecord(
                    rollout.text,
                    rollout.reward >= self.config.success_threshold,
                    enriched[place],
                    policies.predictors,
                    children.depth,
                    children.token,
                    student,
                    teachers,
                )
            )
        prompt = self.tokenizer.decode(question.question.prompt_ids)
        return QuestionRecord(question.question.id, prompt, question.pass_rate, tree, tuple(paths))
