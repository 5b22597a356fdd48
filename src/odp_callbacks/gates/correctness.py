"""A gate after the first finding of arXiv:2605.10889: distil where the student failed."""

from torch import Tensor

from odp_callbacks.functional.tokens import Tokens


class IncorrectRolloutGate:
    """Distil on incorrect rollouts, and leave correct ones out.

    The gate is ours. arXiv:2605.10889 finds a higher mean logit cosine on incorrect rollouts (0.028 to 0.058) than on
    correct ones (0.001 to 0.012), and trains no student. A probe tells what holds for your student and teacher
    (``odp/predicted_gain/<teacher>/correct``). In a batch without an incorrect rollout the loss and its gradients are
    exactly 0; the optimizer's momentum and weight decay act as usual.

    Args:
        correct_weight: Weight of the tokens of correct rollouts; those of incorrect ones have the weight 1.

    Raises:
        ValueError: If the weight is negative or not finite.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> gate = IncorrectRolloutGate(correct_weight=0.25)
        >>> gate(tokens_of(torch.tensor([[1, 0], [1, 1]]), rewards=[1.0, 0.0])).tolist()
        [0.25, 1.0, 1.0]
    """

    def __init__(self, correct_weight: float = 0.0) -> None:
        if not 0 <= correct_weight < float("inf"):
            raise ValueError(f"`correct_weight` must be finite and not negative, but {correct_weight!r} was given.")
        self.correct_weight = correct_weight

    def __call__(self, tokens: Tokens) -> Tensor:
        """Return the weights of ``N`` tokens, ``(N,)``."""
        correct = tokens.need("correct").float()
        return 1 + correct * (self.correct_weight - 1)

    def __repr__(self) -> str:
        return f"IncorrectRolloutGate(correct_weight={self.correct_weight!r})"
