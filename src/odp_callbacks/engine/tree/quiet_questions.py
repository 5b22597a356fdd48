"""Questions about which there is probably nothing to find: no other question has rollouts with different rewards.

At the beginning of a training, and at its end, all responses may get the same reward. Such a probe need not cost what
others cost. But a decision that looks at the outcomes of a node biases the node's mean: of two branches with one
continuation each, let more be sampled only if the two differ. With success rates ``a`` and ``b`` and ``n`` more, the
mean difference is ``(a - b) (1 + n P) / (1 + n)``, where ``P`` is the probability that the first two differ.

So the decision about a question looks at *other* questions only, whose rewards and continuations are independent of its
own. Given all other questions, the question is measured with a known probability, and the number of its continuations
is fixed or planned as always: both leave every mean over its tokens unbiased. Whole questions are drawn, because the
teachers read a question's prompt once, however many of its tokens are measured.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.nodes import Node, systematic_sample

FEWEST_AGREEING = 15
"""How many rollouts of other questions must agree with another one of their question before a question is quiet."""
FEWEST_QUESTIONS = 1
"""How many questions are measured at least, in expectation."""


def quiet_shares(rollouts: Sequence[Rollout]) -> dict[int, float]:
    """The probability with which each question is worth measuring, by the question's identity.

    It is 1 if some other question has rollouts with different rewards. Otherwise the other questions have, together,
    ``n`` rollouts that agree with the first one of their question. Then at most about ``1 / n`` of all pairs of
    rollouts differ, and it is ``1 / (n + 1)``; with ``n`` below :data:`FEWEST_AGREEING` it is 1, too.

    Args:
        rollouts: The probe's rollouts.

    Examples:
        >>> from odp_callbacks.engine.prompts import Question
        >>> rows = [Question(str(number), {}, torch.tensor([1])) for number in range(32)]
        >>> agree = [Rollout(row, (2,), "", False, reward=0.0) for row in rows for _ in range(2)]
        >>> sorted(set(quiet_shares(agree).values()))
        [0.03125]
    """
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(id(rollout.question), []).append(rollout.reward)
    agreeing = {question: len(of_question) - 1 for question, of_question in rewards.items()}
    differ = {question for question, of_question in rewards.items() if len(set(of_question)) > 1}
    total = sum(agreeing.values())
    shares = {}
    for question in rewards:
        others = total - agreeing[question]
        is_quiet = not differ - {question} and others >= FEWEST_AGREEING
        shares[question] = 1 / (others + 1) if is_quiet else 1.0
    return shares


def thin_quiet_questions(rollouts: Sequence[Rollout], nodes: Sequence[Node], generator: torch.Generator) -> list[Node]:
    """Keep some of the questions about which there is probably nothing to find, with all their nodes.

    Args:
        rollouts: The probe's rollouts.
        nodes: The nodes that were selected.
        generator: Random stream, on the CPU.

    Returns:
        The nodes that are kept, with their inclusion probabilities reduced accordingly.
    """
    shares = quiet_shares(rollouts)
    questions = list(dict.fromkeys(id(rollouts[node.rollout].question) for node in nodes))
    fewest = min(1.0, FEWEST_QUESTIONS / max(1, len(questions)))
    keeping = torch.tensor([max(fewest, shares[question]) for question in questions], dtype=torch.float64)
    if (keeping == 1).all():
        return list(nodes)
    kept = {questions[place]: share for place, share in systematic_sample(keeping, generator)}
    return [
        replace(node, inclusion=node.inclusion * kept[question])
        for node in nodes
        if (question := id(rollouts[node.rollout].question)) in kept
    ]
