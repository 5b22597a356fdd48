"""Do the intervals of single tokens' alignments cover, and do significant tokens have the right sign?

Simulated nodes, whose success is known.

Run: python benchmarks/tokens.py; python benchmarks/tokens.py --leads
"""

from collections.abc import Callable

import numpy as np
from scipy import stats
from sizes import size_parser

from odp_callbacks.analysis import alignment_intervals as token_intervals
from odp_callbacks.analysis.evidence import gather, norm
from odp_callbacks.analysis.predictors import PREDICTORS
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.records import Floats, NodeRecord

BRANCHES, PARAMETERS = 4, 12
USUAL = {"nodes": 100, "probes": 40, "continuations": [2, 4, 8, 32], "seed": 0}
SMOKE = {"nodes": 10, "probes": 2, "continuations": [4]}


def one_right(rng: np.random.Generator) -> Floats:
    """One token is likely right, the others are likely wrong."""
    return np.concatenate([rng.beta(4, 1.5, 1), rng.beta(1, 4, BRANCHES - 1)])


def alike(rng: np.random.Generator) -> Floats:
    """Tokens hardly differ."""
    return np.clip(rng.uniform(0.1, 0.9) + 0.05 * rng.normal(size=BRANCHES), 0.01, 0.99)


WORLDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "any": lambda rng: rng.random(BRANCHES),
    "one right": one_right,
    "alike": alike,
}
"""From a random stream to the true success ``(A,)`` of a node's branches."""


def make_node(success: Floats, count: int, question: int, rng: np.random.Generator) -> NodeRecord:
    """A node with drawn rewards, and with drawn gradients of its branches and of one teacher."""
    wins = rng.binomial(count, success).astype(float)
    gradients = rng.normal(size=(BRANCHES, PARAMETERS))
    gram = gradients @ gradients.T
    weight, no_branch = np.full(BRANCHES, 1 / BRANCHES), np.zeros(BRANCHES, bool)
    return NodeRecord(
        rollout=question,
        question=str(question),
        depth=0,
        inclusion=1.0,
        correct=True,
        tokens=np.arange(BRANCHES),
        probability=weight,
        weight=weight,
        tail=no_branch,
        taken=0,
        count=np.full(BRANCHES, count),
        total=wins,
        total_square=wins,
        exact=no_branch,
        gram=gram[None],
        logit_gram=gram,
        teacher_probability=weight[None],
        teacher_tail=np.zeros(1),
        predictors={name: np.zeros(1) for name in PREDICTORS},
    )


def simulate(
    world: Callable[[np.random.Generator], Floats], nodes: int, probes: int, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Simulated probes of one world.

    For each token, whether its interval covers, whether it is significant, and whether it is so with the wrong sign;
    for each token with an estimate, whether the estimate's sign is wrong.
    """
    rng = np.random.default_rng(seed)
    covered, significant, significantly_wrong, wrong = (np.zeros(0, bool) for _ in range(4))
    for _ in range(probes):
        success = np.stack([world(rng) for _ in range(nodes)])
        evidence = gather([make_node(row, count, question, rng) for question, row in enumerate(success)])
        offset = success - success[:, :1]
        ideal_norm = norm(evidence.norm_form, offset)[:, None]
        true_cosine = np.einsum("nka,na->nk", evidence.gain_form, offset) / ideal_norm
        low, high = token_intervals.alignment_intervals(evidence)
        excludes_zero = (low > 0) | (high < 0)
        has_wrong_sign = np.sign(evidence.cosine) != np.sign(true_cosine)
        covered = np.append(covered, (low <= true_cosine) & (true_cosine <= high))
        significant = np.append(significant, excludes_zero)
        significantly_wrong = np.append(
            significantly_wrong, excludes_zero & (np.sign(low + high) != np.sign(true_cosine))
        )
        wrong = np.append(wrong, has_wrong_sign[np.isfinite(evidence.cosine)])
    return covered, significant, significantly_wrong, wrong


def main(nodes: int, probes: int, continuations: list[int], seed: int) -> None:
    """Print a row for each world and number of continuations."""
    print("| world | continuations | coverage (95 % of it) | significant | and wrong | sign wrong, all tokens |")
    print("|---|---|---|---|---|---|")
    for name, world in WORLDS.items():
        for count in continuations:
            covered, significant, significantly_wrong, wrong = simulate(world, nodes, probes, count, seed)
            ends = stats.binomtest(int(covered.sum()), covered.size).proportion_ci(method="wilson")
            wrong_share = (
                f"{significantly_wrong.sum() / significant.sum():.1%} "
                f"({significantly_wrong.sum()} of {significant.sum()})"
                if significant.any()
                else "none"
            )
            print(
                f"| {name} | {count} | {covered.mean():.3f} ({ends.low:.3f} to {ends.high:.3f}) | "
                f"{significant.mean():.0%} | {wrong_share} | {wrong.mean():.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = size_parser(__doc__, USUAL, SMOKE)
    parser.add_argument(
        "--leads", action="store_true", help="with the leads of the success model, which the library leaves out"
    )
    sizes = vars(parser.parse_args())
    del sizes["smoke"]
    if sizes.pop("leads"):
        token_intervals.fit_success_model = lambda evidence, symmetric: fit_success_model(evidence)
    main(**sizes)
