"""Records of nodes and reports with known gradients, without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from odp_callbacks.analysis.predictors import PREDICTORS
from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord, StepSums


@dataclass
class NodeVectors:
    """A node's record and the explicit gradients behind its Gram matrices.

    Attributes:
        record: With ``A`` branches and ``K`` teachers, in two modules of 5 and 7 parameters.
        branches: ``(A - 1, 12)``, gradients of the branches' directions on the parameters.
        teachers: ``(K, 12)``, distillation gradients on the parameters.
        logit_branches: ``(A - 1, 9)``, the same on the logits.
        logit_teachers: ``(K, 9)``, the same on the logits.
    """

    record: NodeRecord
    branches: Floats
    teachers: Floats
    logit_branches: Floats
    logit_teachers: Floats


def synthetic(
    success: Sequence[float],
    *,
    count: Sequence[int] | int = 4,
    weight: Sequence[float] | None = None,
    tail: Sequence[bool] | None = None,
    exact: Sequence[bool] | bool = False,
    teachers: int = 2,
    seed: int = 0,
    **fields: Any,
) -> NodeVectors:
    """A node with the given successes and random gradients.

    Args:
        success: Mean reward of each branch.
        count: Continuations of each branch.
        weight: Weight of each branch; equal ones by default.
        tail: Whether each branch was drawn from the tail.
        exact: Whether the success of each branch is known.
        teachers: Number of teachers.
        seed: Of the gradients, teachers' probabilities and predictors.
        fields: Fields of the record to replace.
    """
    generator, branch_count = np.random.default_rng(seed), len(success)
    weights = np.full(branch_count, 1 / branch_count) if weight is None else np.array(weight)
    in_tail = np.zeros(branch_count, bool) if tail is None else np.array(tail)
    counts, successes = np.broadcast_to(count, branch_count).astype(np.int64), np.array(success)
    branches, gradients = generator.normal(size=(branch_count - 1, 12)), generator.normal(size=(teachers, 12))
    logit_branches, logit_gradients = generator.normal(size=(branch_count - 1, 9)), generator.normal(size=(teachers, 9))
    vectors = np.concatenate([branches, gradients])
    logit_vectors = np.concatenate([logit_branches, logit_gradients])
    module_vectors = vectors[:, :5], vectors[:, 5:]
    teacher_shares = generator.dirichlet(np.ones(branch_count + 1), size=teachers)
    record = NodeRecord(
        **{
            "rollout": 0,
            "question": "0",
            "depth": 0,
            "inclusion": 1.0,
            "correct": True,
            "tokens": np.arange(branch_count),
            "probability": weights,
            "weight": weights,
            "tail": in_tail,
            "taken": 0,
            "count": counts,
            "total": successes * counts,
            "total_square": successes * successes * counts,
            "exact": np.broadcast_to(exact, branch_count),
            "gram": np.stack([part @ part.T for part in module_vectors]),
            "logit_gram": logit_vectors @ logit_vectors.T,
            "teacher_probability": teacher_shares[:, :-1],
            "teacher_tail": 1 - teacher_shares[:, :-1][:, ~in_tail].sum(1),
            "predictors": {name: generator.random(teachers) for name in PREDICTORS},
            **fields,
        }
    )
    return NodeVectors(record, branches, gradients, logit_branches, logit_gradients)


MakeReport = Callable[..., ProbeReport]


def node_with_gain(gains: tuple[float, ...], success: tuple[float, float] = (0.25, 0.75), **fields: Any) -> NodeRecord:
    """A node with two branches and unit gradients in a plane, whose alignments are ``gains``.

    The ideal gradient is ``weight (Q_1 - Q_0) u`` with ``|u| = 1``, so a teacher whose gradient has the cosine ``c`` to
    ``u`` has the predicted gain ``weight (Q_1 - Q_0) c``.

    Args:
        gains: Cosine ``c`` of each teacher.
        success: Of the two branches.
        fields: Fields of the record to replace.
    """
    record = synthetic(success, count=4, weight=(0.5, 0.5), teachers=len(gains), **fields).record
    vectors = np.array([(1.0, 0.0), *((cosine, (1 - cosine * cosine) ** 0.5) for cosine in gains)])
    gram = vectors @ vectors.T
    return NodeRecord(**{**record.__dict__, "gram": gram[None], "logit_gram": gram})


def report_maker() -> MakeReport:
    """The function behind the fixture ``make_report``, for fixtures of a wider scope."""

    def make(
        gains: Callable[[bool, int], tuple[float, ...]],
        *,
        questions: int = 6,
        depths: tuple[int, ...] = (0, 2, 5),
        noise: float = 0.05,
        seed: int = 0,
        teachers: tuple[str, ...] = ("near", "far"),
        first: int = 0,
        **fields: Any,
    ) -> ProbeReport:
        """A report with a correct and an incorrect rollout of each question.

        Args:
            gains: Maps correctness and depth of a node to the alignment of each teacher.
            questions: Number of questions.
            depths: Of the nodes; no two in a row, because consecutive nodes are pooled.
            noise: Standard deviation of noise that is added to the alignments of a node.
            seed: Of the noise.
            teachers: Names.
            first: Number of the first question.
            fields: Fields of the node records to replace.
        """
        generator = np.random.default_rng(seed)
        rollouts, nodes = [], []
        for question in range(first, first + questions):
            for correct in (True, False):
                rollouts.append(RolloutRecord(str(question), "p", ("t",) * 8, "t", float(correct), correct, False))
                for depth in depths:
                    cosines = tuple(np.clip(np.array(gains(correct, depth)) + noise * generator.normal(), -1, 1))
                    nodes.append(
                        node_with_gain(
                            cosines,
                            rollout=len(rollouts) - 1,
                            question=str(question),
                            correct=correct,
                            depth=depth,
                            inclusion=1 / max(depth, 1),
                            **fields,
                        )
                    )
        generated_tokens = {"rollouts": 10, "continuations": 10}
        return ProbeReport(teachers, ("m",), tuple(rollouts), tuple(nodes), generated_tokens, 4, 0, {"rollouts": 1.0})

    return make


def in_modules(report: ProbeReport, layers: int = 2) -> ProbeReport:
    """The same gradients, distributed over modules of several layers."""
    modules = tuple(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(layers) for kind in "qv")
    shares = np.arange(1.0, len(modules) + 1)
    grams = [np.stack([share * node.gram[0] for share in shares / shares.sum()]) for node in report.nodes]
    nodes = tuple(replace(node, gram=gram) for node, gram in zip(report.nodes, grams, strict=True))
    return replace(report, nodes=nodes, modules=modules)


def many_teachers(count: int, **fields: Any) -> ProbeReport:
    """A report of ``count`` teachers, each of which helps more than the one before."""
    names = tuple(f"teacher {index}" for index in range(count))
    gains = tuple(0.1 * index - 0.3 for index in range(count))
    return report_maker()(lambda correct, depth: gains, teachers=names, **fields)


def report_of(nodes: Sequence[NodeRecord], teachers: tuple[str, ...] = ("near", "far")) -> ProbeReport:
    """A report with the given nodes of questions "0", "1" and "2"; its four rollouts have the mean reward 0.625."""
    rollouts = tuple(
        RolloutRecord(question, "p", ("t",), "t", reward, reward >= 1, truncated)
        for question, reward, truncated in (("0", 1.0, False), ("0", 0.0, True), ("1", 0.5, False), ("2", 1.0, False))
    )
    generated_tokens = {"rollouts": 40, "continuations": 60}
    stage_seconds = {"rollouts": 1.0, "gradients": 2.0}
    return ProbeReport(teachers, ("m", "n"), rollouts, tuple(nodes), generated_tokens, 16, 4, stage_seconds)


def random_nodes(count: int = 12, seed: int = 0) -> list[NodeRecord]:
    """Nodes of three questions in both classes with unequal inclusion; every fourth has the same success everywhere."""
    generator = np.random.default_rng(seed)
    return [
        synthetic(
            (0.5,) * 3 if index % 4 == 3 else generator.random(3).tolist(),
            seed=index,
            question=str(index % 3),
            correct=index % 2 == 0,
            inclusion=1 / (1 + index % 5),
            exact=index % 8 == 3,
        ).record
        for index in range(count)
    ]


def has_equal_successes(node: NodeRecord) -> bool:
    """Whether all branches of a node with equal counts have the same success."""
    return bool((node.total == node.total[0]).all())


HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\x00\x1b[31mred\x07", "\u202eright to left",
    "x" * 100_000, "\ud800", "Ġâ\x80", "{{ 7 * 7 }}", "$\\frac{1}{0}$", "&amp;\u2028<!--", "",
]  # fmt: skip


def split(correct: bool, depth: int) -> tuple[float, ...]:
    """Alignments of two teachers, of which the second depends on correctness."""
    return (0.6, -0.4 if correct else 0.1)


def hostile(make_report: MakeReport) -> ProbeReport:
    """A report whose questions, prompts, responses, tokens and teachers are named by hostile texts."""
    report = make_report(split, questions=len(HOSTILE))
    texts = [text for text in HOSTILE for _ in ("correct", "incorrect")]
    rollouts = tuple(
        replace(rollout, question=text, prompt=text, pieces=tuple(HOSTILE), text=text)
        for rollout, text in zip(report.rollouts, texts, strict=True)
    )
    nodes = tuple(replace(node, question=rollouts[node.rollout].question) for node in report.nodes)
    token_text = dict(enumerate(HOSTILE))
    return replace(report, rollouts=rollouts, nodes=nodes, teachers=(HOSTILE[0], HOSTILE[3]), token_text=token_text)


def example_report(**fields: Any) -> ProbeReport:
    """A small report that fills every field; the records in ``tests/data/records`` were saved from it.

    Args:
        fields: Fields to replace.
    """
    generator = np.random.default_rng(0)
    rollouts, nodes = [], []
    for question in ("sum", "product"):
        for correct in (True, False):
            pieces = ("4", "<end>") if correct else ("5", "<end>")
            rollouts.append(RolloutRecord(question, f"{question}?", pieces, pieces[0], float(correct), correct, False))
            node = synthetic(
                (0.25, 1.0, 0.5),
                count=(4, 1, 2),
                weight=(0.5, 0.3, 0.2),
                tail=(False, False, True),
                exact=(False, True, False),
                seed=len(nodes),
                rollout=len(nodes),
                question=question,
                correct=correct,
                depth=len(nodes) % 2,
                inclusion=0.5,
                taken=1 if correct else 0,
            ).record
            nodes.append(node)
    sums = generator.normal(size=(2, 4, 2, 4))
    report = ProbeReport(
        teachers=("answer", "base"),
        modules=("layers.0.q_proj", "layers.0.v_proj"),
        rollouts=tuple(rollouts),
        nodes=tuple(nodes),
        generated_tokens={"rollouts": 8, "continuations": 24},
        continuations=24,
        truncated=1,
        stage_seconds={"rollouts": 0.5, "continuations": 1.5},
        settings={"seed": 0, "seconds": 2.0, "geometry": "euclidean"},
        step=StepSums(("sum", "product"), (True, False), sums + sums.transpose(2, 3, 0, 1)),
        token_text={0: "4", 1: "<end>", 2: "½"},
    )
    preconditioned = replace(
        report,
        nodes=tuple(replace(node, gram=2 * node.gram) for node in nodes),
        settings={**report.settings, "geometry": "adam"},
    )
    return replace(report, preconditioned=preconditioned, **fields)
