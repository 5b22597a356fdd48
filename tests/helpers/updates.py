"""Measurements of an update with known gains, without a model."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from odp_callbacks.records import ProbeReport
from odp_callbacks.update_records import ModuleProducts, TokenFeatures, TokenInfluence, UpdateRecord, gram_of_rows


def with_update(
    report: ProbeReport,
    gains: Callable[[bool], tuple[float, ...]],
    *,
    noise: float = 0.1,
    seed: int = 0,
    folds: int = 4,
    influence: bool = True,
) -> ProbeReport:
    """A report with a measurement of the update of its rollouts.

    All success gradients are the same unit vector, plus noise. The distillation gradient of a rollout has the length 1
    and the given cosine to it; its tokens share it unevenly, and every fifth has the opposite sign.

    Args:
        report: A report with rollouts.
        gains: Maps correctness of a rollout to the update gain of each teacher in its class.
        noise: Standard deviation of each success gradient's noise, in each of its components.
        seed: Of the noise.
        folds: Folds of questions for the influences of tokens.
        influence: Whether the influences of tokens are measured.
    """
    generator, teachers = np.random.default_rng(seed), len(report.teachers)
    names = list(dict.fromkeys(rollout.question for rollout in report.rollouts))
    folds = min(folds, len(names))
    success = np.eye(1, 2 + teachers) + noise * generator.normal(size=(len(names), 2 + teachers))  # (F, P)
    directions = np.zeros((len(names), teachers, 2, 2 + teachers))
    tokens = np.zeros((len(names), 2))
    vectors, places = [], []
    for index, rollout in enumerate(report.rollouts):
        question, number_of_class = names.index(rollout.question), int(not rollout.correct)
        cosines = np.array(gains(rollout.correct))
        direction = np.zeros((teachers, 2 + teachers))
        direction[:, 0] = cosines
        direction[np.arange(teachers), 1 + np.arange(teachers)] = np.sqrt(1 - cosines**2)
        directions[question, :, number_of_class] += direction
        tokens[question, number_of_class] += len(rollout.pieces)
        shares = np.array([(-1.0 if depth % 5 == 4 else 1.0) / (1 + depth) for depth in range(len(rollout.pieces))])
        vectors += [share * direction for share in shares / shares.sum()]
        places += [(index, depth, question % folds) for depth in range(len(rollout.pieces))]
    gram = gram_of_rows(np.ones(len(names)), tokens, success, directions)
    of_tokens, (rollouts, depths, own_folds) = np.array(vectors), np.array(places).T
    by_fold = np.stack([of_tokens @ success[fold::folds].mean(axis=0) for fold in range(folds)])  # (S, N, K)
    by_fold[own_folds, np.arange(len(own_folds))] = np.nan
    measured = TokenInfluence(
        rollouts,
        depths,
        by_fold.astype(np.float32),
        np.array([len(names[fold::folds]) for fold in range(folds)], float),
        np.linalg.norm(directions.sum(axis=(0, 2)), axis=-1),
        np.linalg.norm(of_tokens, axis=-1).astype(np.float32),
    )
    return replace(report, updates=(UpdateRecord(gram, measured if influence else None),))


def update_only(report: ProbeReport, gains: Callable[[bool], tuple[float, ...]], **options: object) -> ProbeReport:
    """The same without nodes, as a diagnosis without continuations leaves it behind."""
    return replace(with_update(report, gains, **options), nodes=(), continuations=0)  # type: ignore[arg-type]


def with_module_products(report: ProbeReport, shares: Mapping[str, float]) -> ProbeReport:
    """The same measurements, of which each module has a share of all inner products.

    Args:
        report: With measurements of an update.
        shares: Share of each module, by its name; they add up to 1.
    """

    def of_modules(record: UpdateRecord) -> UpdateRecord:
        cross = record.gram.cross.sum(axis=-1)[..., None] * np.array(list(shares.values()))
        return replace(record, gram=replace(record.gram, modules=ModuleProducts(tuple(shares), cross)))

    return replace(report, updates=tuple(of_modules(update) for update in report.updates))


def with_features(report: ProbeReport, seed: int = 0) -> ProbeReport:
    """The same measurements with random features of all tokens, which rules may ask about."""
    generator, teachers = np.random.default_rng(seed), len(report.teachers)

    def of_record(record: UpdateRecord) -> UpdateRecord:
        assert record.influence is not None
        tokens = len(record.influence.depth)
        of_student = -generator.random((2, tokens)).astype(np.float32)
        of_teachers = -generator.random((3, tokens, teachers)).astype(np.float32)
        features = TokenFeatures(
            record.influence.rollout,
            record.influence.depth,
            -of_student[0],
            of_student[1],
            -of_teachers[0],
            of_teachers[1],
            -of_teachers[2],
        )
        return replace(record, features=features)

    return replace(report, updates=tuple(of_record(update) for update in report.updates))


def with_texts(report: ProbeReport, length: int) -> ProbeReport:
    """The same rollouts, with responses of that many different tokens."""
    pieces = tuple(f" w{depth}" for depth in range(length))
    return replace(report, rollouts=tuple(replace(rollout, pieces=pieces) for rollout in report.rollouts))
