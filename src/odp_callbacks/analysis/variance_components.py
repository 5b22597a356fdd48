"""How much a figure varies between questions, between rollouts, between nodes, and by the noise of continuations."""

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.records import Floats, ProbeReport


@dataclass(frozen=True)
class VarianceComponents:
    """How much a figure varies at each level; only the ratios matter for a plan.

    Attributes:
        question: Variance between the means of questions.
        rollout: Variance between the means of a question's rollouts.
        node: Variance between the nodes of a rollout.
        continuation: Variance that remains at a node with one continuation of every branch.
    """

    question: float
    rollout: float
    node: float
    continuation: float


def gain_components(report: ProbeReport) -> VarianceComponents | None:
    """Estimate the variance components of predicted gain from a probe, as the mean over teachers.

    Each teacher's components are divided by their sum, so that all teachers count alike; only ratios matter for a plan.

    Args:
        report: A probe's report.

    Returns:
        The components, which add up to 1; None where the probe is too small to tell, or no gain was found.
    """
    evidence = gather(report.nodes)
    rollout = np.array([node.rollout for node in report.nodes], dtype=np.int64)
    spread = fit_success_model(evidence).leave_one_out_spread(evidence.question, np.arange(len(rollout)))
    shares = []
    for teacher_index in range(len(report.teachers)):
        values, noise = _weighted_gain(evidence, teacher_index, spread)
        try:
            components = estimate_components(values, evidence.question, rollout, noise)
        except ValueError:
            return None
        parts = np.array(astuple(components))
        if parts.sum() > 0:
            shares.append(parts / parts.sum())
    return VarianceComponents(*np.mean(shares, axis=0).tolist()) if shares else None


def _weighted_gain(evidence: Evidence, teacher_index: int, spread: Floats) -> tuple[Floats, Floats]:
    """Each node's gain times its relative weight, and its variance with one continuation of each branch.

    Args:
        evidence: ``N`` nodes.
        teacher_index: Index of the teacher.
        spread: ``(N, A)``, expected standard deviation of one reward.
    """
    weight = evidence.token_weight / evidence.token_weight.mean()
    gain = np.nan_to_num(evidence.weighted_gain[:, teacher_index])
    slopes = np.where(evidence.gradient_weight[:, None] > 0, np.nan_to_num(evidence.gain_form[:, teacher_index]), 0)
    # The slopes are known at some nodes where all outcomes agree only, which stand for the others.
    variance = evidence.gradient_weight * ((slopes * spread) ** 2 * ~evidence.exact).sum(axis=1)
    return weight * gain, weight**2 * variance


def estimate_components(
    values: Floats, question: NDArray[np.int64], rollout: NDArray[np.int64], noise: Floats
) -> VarianceComponents:
    """Estimate the variance of each level from nodes, by the analysis of variance of a nested, unbalanced sample.

    A component whose estimate is negative is 0. Source: Searle, Casella and McCulloch, "Variance components" (1992),
    chapter 5 (Henderson's first method).

    Args:
        values: ``(N,)`` float64, the figure at each node.
        question: ``(N,)`` int64, each node's question.
        rollout: ``(N,)`` int64, each node's rollout; a rollout belongs to one question.
        noise: ``(N,)`` float64, the part of each value's variance that comes from its continuations.

    Raises:
        ValueError: If there is one question only, or no question has two rollouts, or no rollout two nodes.

    Examples:
        >>> values = np.array([0.0, 2.0, 4.0, 6.0, 10.0, 12.0, 14.0, 16.0])
        >>> question, rollout = np.repeat([0, 1], 4), np.repeat([0, 1, 2, 3], 2)
        >>> estimate_components(values, question, rollout, np.zeros(8))
        VarianceComponents(question=46.0, rollout=7.0, node=2.0, continuation=0.0)
    """
    question, question_size = _sizes(question)
    rollout, rollout_size = _sizes(rollout)
    first_of_rollout = np.unique(rollout, return_index=True)[1]
    question_of_rollout = question[first_of_rollout]
    total, rollouts, questions = len(values), len(rollout_size), len(question_size)
    if questions < 2 or rollouts == questions or total == rollouts:
        raise ValueError(
            "variance components need two questions, a question with two rollouts and a rollout with two nodes, but "
            f"{questions} questions, {rollouts} rollouts and {total} nodes were given."
        )
    rollout_mean = np.bincount(rollout, values) / rollout_size
    question_mean = np.bincount(question, values) / question_size
    within = ((values - rollout_mean[rollout]) ** 2).sum() / (total - rollouts)
    between_rollouts = (rollout_size * (rollout_mean - question_mean[question_of_rollout]) ** 2).sum()
    between_questions = (question_size * (question_mean - values.mean()) ** 2).sum()
    square_in_question = np.bincount(question_of_rollout, rollout_size**2.0) / question_size
    # How often each component counts in the mean squares, for groups of unequal size.
    nodes_per_rollout = (total - square_in_question.sum()) / (rollouts - questions)
    rollout_share = (square_in_question.sum() - (rollout_size**2.0).sum() / total) / (questions - 1)
    nodes_per_question = (total - (question_size**2.0).sum() / total) / (questions - 1)
    rollout_component = max(0.0, (between_rollouts / (rollouts - questions) - within) / nodes_per_rollout)
    question_component = max(
        0.0, (between_questions / (questions - 1) - within - rollout_share * rollout_component) / nodes_per_question
    )
    noise_mean = float(noise.mean())
    return VarianceComponents(
        float(question_component), float(rollout_component), max(0.0, float(within) - noise_mean), noise_mean
    )


def _sizes(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels as numbers from 0, and how often each occurs."""
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return numbers, sizes
