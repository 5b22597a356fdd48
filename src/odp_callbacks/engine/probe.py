"""The probe: from rows to a report, in one pass through the stages."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.allocation import spread_evenly
from odp_callbacks.engine.branches import Branch, choose_branches
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.decoding import PrefixCache, Progress, prefill
from odp_callbacks.engine.directions import Direction, distillation_direction
from odp_callbacks.engine.guest import guest
from odp_callbacks.engine.logits import node_logits
from odp_callbacks.engine.nodes import Node, select_nodes
from odp_callbacks.engine.prompts import Question, Row, as_questions, check_length
from odp_callbacks.engine.pullback import gram_matrices, lora_modules
from odp_callbacks.engine.recording import node_record
from odp_callbacks.engine.rewards import RewardError, RewardFunction, score
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.success import Outcomes, Spent, measure_success
from odp_callbacks.engine.teachers import Teacher, as_teachers, teacher_logits, teacher_prompt_ids
from odp_callbacks.functional.divergences import node_predictors
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.records import NodeRecord, ProbeReport, RolloutRecord


@dataclass
class _Ledger:
    """Seconds by stage, and who is told of the progress."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Time a stage; gives the function to report what is done of it."""
        start = time.perf_counter()

        def report(done: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        report(0)
        yield report
        report(total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Probe:
    """Measures the alignment of teachers on a student's own rollouts.

    Usable alone, as a training-free diagnostic: :func:`diagnose` is the short form.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        reward: The verifier, a TRL reward function.
        teachers: A mapping from name to :class:`~odp_callbacks.engine.teachers.Teacher`, or what
            :func:`~odp_callbacks.engine.teachers.as_teachers` takes.
        config: How to measure.

    Raises:
        ValueError: If the student has no LoRA parameters, or a teacher cannot teach it.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        reward: RewardFunction,
        teachers: object,
        config: ProbeConfig | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(f"`reward` must be a function of prompts, completions and columns, but got {reward!r}.")
        self.student = student
        self.tokenizer = tokenizer
        self.reward = reward
        self.teachers: dict[str, Teacher] = as_teachers(teachers)
        self.config = config or ProbeConfig()
        self.modules = tuple(lora_modules(list(lora_parameters(student))))
        self.eos_token_ids = end_tokens(student, tokenizer, self.config.eos_token_ids)
        self._direction: Direction = distillation_direction(
            self.config.divergence, self.config.beta, self.config.top_k, self.config.temperature
        )
        for teacher in self.teachers.values():
            teacher.check(student, tokenizer)

    def validate(self, rows: Sequence[Row]) -> None:
        """Check rows before any work: prompts, templates, lengths, and what the reward function returns.

        Raises:
            ValueError: If a row has no prompt or is too long, a template names a column that is missing, or the
                reward function returns the wrong number of rewards or one outside [0, 1].
        """
        if len(rows) == 0:
            raise ValueError("`prompts` has no rows; give at least one question.")
        questions = as_questions(rows, self.tokenizer)
        self._check_lengths(questions)
        with guest():
            try:
                score(self.reward, questions[:2], [""] * len(questions[:2]), [()] * len(questions[:2]))
            except RewardError:
                raise
            except Exception as error:
                # Many verifiers never meet an empty response, so this one may still be sound.
                warnings.warn(f"`reward` raised {type(error).__name__} on an empty completion: {error}", stacklevel=2)

    def _check_lengths(self, questions: Sequence[Question]) -> None:
        limit = self.config.max_new_tokens
        for question in questions:
            check_length(question.prompt_ids, limit, self.student, f"question {question.id}")
            for name, teacher in self.teachers.items():
                ids = teacher_prompt_ids(teacher, self.tokenizer, question)
                model = getattr(teacher, "model", self.student)
                check_length(ids, limit, model, f"question {question.id} for teacher {name!r}")

    def run(
        self, rows: Sequence[Row], *, seed: int = 0, ids: Sequence[str] | None = None, progress: Progress | None = None
    ) -> ProbeReport:
        """Measure on these rows.

        Nothing outside changes: weights, gradients, modes, adapters and random streams are as before.

        Args:
            rows: Questions, in TRL's convention.
            seed: Of everything random in the probe.
            ids: Identifies each question in the records; its ``id`` column or its place by default.
            progress: Called with stage, done, total.
        """
        with guest(self.student):
            return self._run(as_questions(rows, self.tokenizer, ids), seed, _Ledger(progress))

    def _run(self, questions: list[Question], seed: int, ledger: _Ledger) -> ProbeReport:
        self._check_lengths(questions)
        config = self.config
        device = next(self.student.parameters()).device
        sampler = torch.Generator(device).manual_seed(seed)
        chooser = torch.Generator().manual_seed(seed)
        with ledger.stage("rollouts", len(questions) * config.rollouts_per_question):
            rollouts = sample_rollouts(
                self.student,
                self.tokenizer,
                questions,
                per_question=config.rollouts_per_question,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos_token_ids=self.eos_token_ids,
                generator=sampler,
                batch_size=config.batch_size,
            )
        with ledger.stage("verifier", len(rollouts)):
            rollouts = score_rollouts(self.reward, rollouts)
        nodes = select_nodes(config.nodes, rollouts, chooser)
        with ledger.stage("branches", len(rollouts)):
            student_logits = self._student_logits(rollouts, nodes)
            branches = [
                self._branches(rollouts, node, z, chooser) for node, z in zip(nodes, student_logits, strict=True)
            ]
            cache = prefill(self.student, [r.sequence[:-1] for r in rollouts])
        outcomes, spent = self._continue(rollouts, cache, nodes, branches, sampler, chooser, ledger)
        del cache
        records = self._pull_back(rollouts, nodes, branches, outcomes, student_logits, ledger)
        return ProbeReport(
            teachers=tuple(self.teachers),
            modules=self.modules,
            rollouts=tuple(self._rollout_record(r) for r in rollouts),
            nodes=tuple(records),
            generated_tokens={"rollouts": sum(len(r.response_ids) for r in rollouts), "continuations": spent.tokens},
            continuations=spent.continuations,
            truncated=spent.truncated + sum(r.truncated for r in rollouts),
            seconds=ledger.seconds,
            settings={"seed": seed, **config.plain()},
        )

    def _student_logits(self, rollouts: list[Rollout], nodes: list[Node]) -> list[Tensor]:
        """The student's logits at each node, ``(V,)``; question by question, as the teachers' are taken."""
        found: list[Tensor] = []
        for indices, depths in _by_question(rollouts, nodes):
            prompts = [rollouts[i].question.prompt_ids for i in indices]
            positions = [[len(p) - 1 + t for t in d] for p, d in zip(prompts, depths, strict=True)]
            for logits in node_logits(self.student, [rollouts[i].sequence for i in indices], positions):
                found += list(logits)
        return found

    def _branches(self, rollouts: list[Rollout], node: Node, logits: Tensor, chooser: torch.Generator) -> list[Branch]:
        return choose_branches(
            torch.softmax(logits.double() / self.config.temperature, dim=-1),
            rollouts[node.rollout].response_ids[node.depth],
            mass=self.config.branch_mass,
            most=self.config.max_branches,
            tail_draws=self.config.tail_draws,
            generator=chooser,
        )

    def _continue(
        self,
        rollouts: list[Rollout],
        cache: PrefixCache,
        nodes: list[Node],
        branches: list[list[Branch]],
        sampler: torch.Generator,
        chooser: torch.Generator,
        ledger: _Ledger,
    ) -> tuple[list[list[Outcomes]], Spent]:
        """Targeted continuations: one a branch first, then rounds that cannot exceed what is left of the budget."""
        config = self.config
        outcomes = [[Outcomes() for _ in row] for row in branches]
        spent = Spent()

        def add(allocation: list[list[int]]) -> None:
            with ledger.stage("continuations", sum(map(sum, allocation))) as progress:
                measure_success(
                    self.student,
                    self.tokenizer,
                    self.reward,
                    rollouts,
                    cache,
                    nodes,
                    branches,
                    allocation=allocation,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos_token_ids=self.eos_token_ids,
                    generator=sampler,
                    batch_size=config.batch_size,
                    outcomes=outcomes,
                    spent=spent,
                    progress=progress,
                )

        if config.budget is None:
            add([[config.continuations] * len(row) for row in branches])
            return outcomes, spent
        add([[1] * len(row) for row in branches])
        while (left := config.budget - spent.tokens) > config.budget // 50:
            allocation = spread_evenly(left, nodes, outcomes, config, chooser)
            if not any(map(sum, allocation)):
                break
            add(allocation)
        return outcomes, spent

    def _pull_back(
        self,
        rollouts: list[Rollout],
        nodes: list[Node],
        branches: list[list[Branch]],
        outcomes: list[list[Outcomes]],
        student_logits: list[Tensor],
        ledger: _Ledger,
    ) -> list[NodeRecord]:
        """Teachers' logits, directions, and their Gram matrices, question by question."""
        records: list[NodeRecord] = []
        done = 0
        for indices, depths in _by_question(rollouts, nodes):
            responses = [rollouts[i].response_ids for i in indices]
            question = rollouts[indices[0]].question
            with ledger.stage("teachers", len(indices)):
                teachers = [
                    teacher_logits(
                        teacher,
                        self.student,
                        [teacher_prompt_ids(teacher, self.tokenizer, question)] * len(indices),
                        responses,
                        depths,
                    )
                    for teacher in self.teachers.values()
                ]
            for place, i in enumerate(indices):
                with ledger.stage("gradients", len(nodes)) as progress:
                    here = range(len(records), len(records) + len(depths[place]))
                    records += self._rollout_nodes(
                        rollouts[i],
                        [nodes[n] for n in here],
                        [branches[n] for n in here],
                        [outcomes[n] for n in here],
                        torch.stack([student_logits[n] for n in here]),
                        [logits[place] for logits in teachers],
                    )
                    done += len(here)
                    progress(done)
        return records

    def _rollout_nodes(
        self,
        rollout: Rollout,
        nodes: list[Node],
        branches: list[list[Branch]],
        outcomes: list[list[Outcomes]],
        student_logits: Tensor,
        teachers: list[Tensor],
    ) -> list[NodeRecord]:
        """Records of one rollout's nodes; ``student_logits`` is ``(N, V)``, ``teachers`` ``K`` times ``(N, V')``."""
        tau = self.config.temperature
        z = student_logits.float() if student_logits.dtype != torch.float64 else student_logits
        taken = torch.tensor([rollout.response_ids[node.depth] for node in nodes], device=z.device)
        pulls = torch.stack([self._direction(z, t.to(z), taken) for t in teachers])  # (K, N, V)
        predictors = [node_predictors(z[..., : t.shape[-1]], t.to(z), tau) for t in teachers]
        p = torch.softmax(z / tau, dim=-1)
        directions = []
        for n, row in enumerate(branches):
            arms = -p[n].expand(len(row) - 1, -1).clone()  # (A - 1, V)
            arms[torch.arange(len(row) - 1), [b.token for b in row[1:]]] += 1
            directions.append(torch.cat([arms / tau, pulls[:, n]]))  # (C, V)
        first = len(rollout.question.prompt_ids) - 1
        grams = gram_matrices(self.student, rollout.sequence, [first + node.depth for node in nodes], directions)
        return [
            node_record(
                rollout,
                node,
                branches[n],
                outcomes[n],
                correct=rollout.reward >= self.config.success_threshold,
                gram=grams[n],
                directions=directions[n],
                teacher_probabilities=[torch.softmax(t[n].to(z) / tau, dim=-1) for t in teachers],
                predictors={k: np.array([float(found[k][n]) for found in predictors]) for k in predictors[0]},
            )
            for n, node in enumerate(nodes)
        ]

    def _rollout_record(self, rollout: Rollout) -> RolloutRecord:
        return RolloutRecord(
            question=rollout.question.id,
            prompt=self.tokenizer.decode(rollout.question.prompt_ids),
            pieces=tuple(self.tokenizer.decode([token]) for token in rollout.response_ids),
            text=rollout.text,
            reward=rollout.reward,
            correct=rollout.reward >= self.config.success_threshold,
            truncated=rollout.truncated,
        )


def diagnose(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **config: Any,
) -> ProbeReport:
    """Training-free diagnosis: measure each teacher's alignment on the student's own rollouts.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        rows: Questions, in TRL's convention.
        reward: The verifier, a TRL reward function.
        teachers: Teachers by name.
        seed: Of everything random.
        progress: Called with stage, done, total.
        **config: Fields of :class:`ProbeConfig`.

    Raises:
        ValueError: If an argument is of no use; it says which, and what would work.
    """
    probe = Probe(student, tokenizer, reward, teachers, ProbeConfig(**config))
    probe.validate(rows)
    return probe.run(rows, seed=seed, progress=progress)


def _by_question(rollouts: Sequence[Rollout], nodes: Sequence[Node]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each question its rollouts, and for each of those the depths of its nodes, in the order of ``nodes``."""
    depths: dict[int, list[int]] = {}
    for node in nodes:
        depths.setdefault(node.rollout, []).append(node.depth)
    groups: dict[int, list[int]] = {}
    for index in depths:
        groups.setdefault(id(rollouts[index].question), []).append(index)
    for indices in groups.values():
        yield indices, [depths[i] for i in indices]
