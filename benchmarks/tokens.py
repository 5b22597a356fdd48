"""Do the intervals of single tokens' alignments cover, and are sure tokens right? Simulated nodes of known success.

python benchmarks/tokens.py; python benchmarks/tokens.py --leads
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy import stats

from odp_callbacks.analysis import token_intervals as certainty
from odp_callbacks.analysis.evidence import gather, norm
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.analysis.summaries import PREDICTORS
from odp_callbacks.records import Floats, NodeRecord

BRANCHES, SIZE = 4, 12


def lead(rng: np.random.Generator) -> Floats:
    """One token likely right, the others likely wrong."""
    return np.concatenate([rng.beta(4, 1.5, 1), rng.beta(1, 4, BRANCHES - 1)])


def alike(rng: np.random.Generator) -> Floats:
    """Hardly a difference between tokens."""
    return np.clip(rng.uniform(0.1, 0.9) + 0.05 * rng.normal(size=BRANCHES), 0.01, 0.99)


WORLDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "any": lambda rng: rng.random(BRANCHES),
    "one right": lead,
    "alike": alike,
}


def node(success: Floats, count: int, question: int, rng: np.random.Generator) -> NodeRecord:
    """A node with drawn rewards, and with gradients of branches and one teacher that are drawn, too."""
    wins = rng.binomial(count, success).astype(float)
    rows = rng.normal(size=(BRANCHES, SIZE))
    weight, none = np.full(BRANCHES, 1 / BRANCHES), np.zeros(BRANCHES, bool)
    return NodeRecord(
        rollout=question, question=str(question), depth=0, inclusion=1.0, correct=True, tokens=np.arange(BRANCHES),
        probability=weight, weight=weight, tail=none, taken=0, count=np.full(BRANCHES, count), total=wins,
        total_square=wins, exact=none, gram=(rows @ rows.T)[None], logit_gram=rows @ rows.T,
        teacher_probability=weight[None], teacher_tail=np.zeros(1),
        predictors={name: np.zeros(1) for name in PREDICTORS},
    )  # fmt: skip


def main() -> None:
    """Print a row for each world and number of continuations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=100, help="of a probe")
    parser.add_argument("--probes", type=int, default=40)
    parser.add_argument("--continuations", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--leads", action="store_true", help="with the leads of the model, which the library leaves out"
    )
    options = parser.parse_args()
    if options.leads:
        certainty.fit_success_model = lambda evidence, symmetric: fit_success_model(evidence)
    print("| world | continuations | coverage (95 % of it) | sure | sure and wrong | sign wrong, all tokens |")
    print("|---|---|---|---|---|---|")
    for name, world in WORLDS.items():
        for count in options.continuations:
            rng = np.random.default_rng(options.seed)
            inside, sure, wrong, plain = (np.zeros(0, bool) for _ in range(4))
            for _ in range(options.probes):
                truth = np.stack([world(rng) for _ in range(options.nodes)])
                evidence = gather([node(row, count, i, rng) for i, row in enumerate(truth)])
                offset = truth - truth[:, :1]
                length = norm(evidence.norm_form, offset)[:, None]
                true = np.einsum("nka,na->nk", evidence.gain_form, offset) / length
                low, high = certainty.alignment_intervals(evidence)
                side = (low > 0) | (high < 0)
                other = np.sign(evidence.cosine) != np.sign(true)
                inside = np.append(inside, (low <= true) & (true <= high))
                sure = np.append(sure, side)
                wrong = np.append(wrong, side & (np.sign(low + high) != np.sign(true)))
                plain = np.append(plain, other[np.isfinite(evidence.cosine)])
            ends = stats.binomtest(int(inside.sum()), inside.size).proportion_ci(method="wilson")
            share = f"{wrong.sum() / sure.sum():.1%} ({wrong.sum()} of {sure.sum()})" if sure.any() else "none"
            print(
                f"| {name} | {count} | {inside.mean():.3f} ({ends.low:.3f} to {ends.high:.3f}) | {sure.mean():.0%} | "
                f"{share} | {plain.mean():.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
