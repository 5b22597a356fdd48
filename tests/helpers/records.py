"""Records of nodes and reports with known gradients, without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from odp_callbacks.analysis.summaries import PREDICTORS
from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord


@dataclass
class Vectors:
    """Explicit gradients behind a record: ``(A - 1, P)`` and ``(K, P)`` on the parameters, ``V`` on the logits."""

    record: NodeRecord
    arms: Floats
    teachers: Floats
    logit_arms: Floats
    logit_teachers: Floats
    sizes: tuple[int, ...]


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
) -> Vectors:
    """A record of a node with given successes and drawn gradients, in two modules of 5 and 7 parameters."""
    rng, arms = np.random.default_rng(seed), len(success)
    weight = np.full(arms, 1 / arms) if weight is None else np.array(weight)
    tail = np.zeros(arms, bool) if tail is None else np.array(tail)
    counts, q = np.broadcast_to(count, arms).astype(np.int64), np.array(success)
    u, d = rng.normal(size=(arms - 1, 12)), rng.normal(size=(teachers, 12))
    logit_u, logit_d = rng.normal(size=(arms - 1, 9)), rng.normal(size=(teachers, 9))
    rows, logit_rows = np.concatenate([u, d]), np.concatenate([logit_u, logit_d])
    shares = rng.dirichlet(np.ones(arms + 1), size=teachers)
    record = NodeRecord(
        **{
            "rollout": 0,
            "question": "0",
            "depth": 0,
            "inclusion": 1.0,
            "correct": True,
            "tokens": np.arange(arms),
            "probability": weight,
            "weight": weight,
            "tail": tail,
            "taken": 0,
            "count": counts,
            "total": q * counts,
            "total_square": q * q * counts,
            "exact": np.broadcast_to(exact, arms),
            "gram": np.stack([rows[:, :5] @ rows[:, :5].T, rows[:, 5:] @ rows[:, 5:].T]),
            "logit_gram": logit_rows @ logit_rows.T,
            "teacher_probability": shares[:, :-1],
            "teacher_tail": 1 - shares[:, :-1][:, ~tail].sum(1),
            "predictors": {name: rng.random(teachers) for name in PREDICTORS},
            **fields,
        }
    )
    return Vectors(record, u, d, logit_u, logit_d, (5, 7))


MakeReport = Callable[..., ProbeReport]


def node_with_gain(gains: tuple[float, ...], success: tuple[float, float] = (0.25, 0.75), **fields: Any) -> NodeRecord:
    """Two branches whose difference in success, 0.5 by default, points along one direction; teachers lie in a plane.

    The ideal gradient is ``weight (Q_1 - Q_0) u`` with ``|u| = 1``, so a teacher at the cosine ``c`` to ``u`` has the
    predicted gain ``weight (Q_1 - Q_0) c``; ``gains`` are those cosines.
    """
    record = synthetic(success, count=4, weight=(0.5, 0.5), teachers=len(gains), **fields).record
    vectors = np.array([(1.0, 0.0), *((c, (1 - c * c) ** 0.5) for c in gains)])
    gram = vectors @ vectors.T
    return NodeRecord(**{**record.__dict__, "gram": gram[None], "logit_gram": gram})


def report_maker() -> MakeReport:
    """What the fixture ``make_report`` gives, for fixtures of a wider scope."""

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
        """A correct and an incorrect rollout of each question; ``gains(correct, depth)`` are cosines by teacher.

        No depths in a row: neighbours would tell each other what they know of success.
        """
        rng = np.random.default_rng(seed)
        rollouts, nodes = [], []
        for q in range(first, first + questions):
            for correct in (True, False):
                rollouts.append(RolloutRecord(str(q), "p", ("t",) * 8, "t", float(correct), correct, False))
                for depth in depths:
                    cosines = tuple(np.clip(np.array(gains(correct, depth)) + noise * rng.normal(), -1, 1))
                    nodes.append(
                        node_with_gain(
                            cosines,
                            rollout=len(rollouts) - 1,
                            question=str(q),
                            correct=correct,
                            depth=depth,
                            inclusion=1 / max(depth, 1),
                            **fields,
                        )
                    )
        spent = {"rollouts": 10, "continuations": 10}
        return ProbeReport(teachers, ("m",), tuple(rollouts), tuple(nodes), spent, 4, 0, {"rollouts": 1.0})

    return make


def in_modules(report: ProbeReport, layers: int = 2) -> ProbeReport:
    """The same gradients, split over modules of several layers."""
    modules = tuple(f"model.layers.{i}.self_attn.{m}_proj" for i in range(layers) for m in "qv")
    share = np.arange(1.0, len(modules) + 1)
    grams = [np.stack([s * n.gram[0] for s in share / share.sum()]) for n in report.nodes]
    nodes = tuple(replace(n, gram=gram) for n, gram in zip(report.nodes, grams, strict=True))
    return replace(report, nodes=nodes, modules=modules)


def many_teachers(count: int, **fields: Any) -> ProbeReport:
    """A probe of so many teachers, each helping more than the one before."""
    names = tuple(f"teacher {k}" for k in range(count))
    return report_maker()(lambda correct, depth: tuple(0.1 * k - 0.3 for k in range(count)), teachers=names, **fields)


HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\x00\x1b[31mred\x07", "\u202eright to left",
    "x" * 100_000, "\ud800", "Ġâ\x80", "{{ 7 * 7 }}", "$\\frac{1}{0}$", "&amp;\u2028<!--", "",
]  # fmt: skip


def split(correct: bool, depth: int) -> tuple[float, ...]:
    return (0.6, -0.4 if correct else 0.1)


def hostile(make_report: MakeReport) -> ProbeReport:
    report = make_report(split, questions=len(HOSTILE))
    rollouts = tuple(
        replace(r, question=HOSTILE[i // 2], prompt=HOSTILE[i // 2], pieces=tuple(HOSTILE), text=HOSTILE[i // 2])
        for i, r in enumerate(report.rollouts)
    )
    nodes = tuple(replace(n, question=rollouts[n.rollout].question) for n in report.nodes)
    words = dict(enumerate(HOSTILE))
    return replace(report, rollouts=rollouts, nodes=nodes, teachers=(HOSTILE[0], HOSTILE[3]), token_text=words)
