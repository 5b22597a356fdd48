import numpy as np
import torch
from scipy import stats

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.backends import prefill_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.continuations import ContinuationSampler
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.verifier import Verifier
from tests.helpers.continuations import sample_waves
from tests.helpers.worlds import make_world

WORLD = make_world()
QUESTION = as_questions([WORLD.row], WORLD.tokenizer)[0]
ROLLOUTS = [Rollout(QUESTION, ids, "", False, reward=0.25) for ids in ((1, 2, 0), (3, 0))]
NODES = [Node(0, 0, 1.0), Node(0, 1, 1.0), Node(0, 2, 1.0), Node(1, 1, 1.0)]
BRANCHES = [[Branch(k, 0.2, 0.2, False) for k in range(5)] for _ in NODES]


def new_tree(nodes=NODES, rollouts=ROLLOUTS):
    tree = ContinuationTree(rollouts, nodes)
    tree.set_branches([list(BRANCHES[0]) for _ in tree.first_nodes])
    return tree


def measure(allocation, reward=WORLD.reward, tree=None, seed=0, eos_token_ids=(0,), batch_size=64):
    tree = tree or new_tree()
    with torch.no_grad():
        sampler = ContinuationSampler(
            WORLD.model,
            WORLD.tokenizer,
            Verifier(reward),
            prefill_rollouts(WORLD.model, [rollout.sequence[:-1] for rollout in tree.rollouts]),
            tree,
            ProbeConfig(max_new_tokens=WORLD.horizon, batch_size=batch_size),
            eos_token_ids,
            Randomness(seed),
        )
    sample_waves(sampler, [sampler.plan(allocation, [2.0] * len(tree.first_nodes))])
    return tree.outcomes, sampler.cost


def test_branches_that_end_the_response_are_known():
    outcomes, cost = measure([[2] * 5 for _ in NODES])
    with torch.no_grad():
        exact = WORLD.solve()
    for node, row in zip(NODES, outcomes, strict=True):
        prefix = ROLLOUTS[node.rollout].response_ids[: node.depth]
        for k, outcome in enumerate(row):
            ends = k == 0 or node.depth == WORLD.horizon - 1  # an end token, or the last that the limit allows
            assert outcome.exact == ends
            assert len(outcome.rewards) == 1 if ends else len(outcome.rewards) >= 2
            if ends:
                assert outcome.rewards == [exact[prefix].success[k]]
    assert cost.continuations == 3 * 4 * 2
    # From depth 0 up to two more tokens each, from depth 1 one.
    assert cost.tokens <= 4 * 2 * 2 + 2 * 4 * 2


def test_rewards_are_unbiased_samples_of_the_success():
    n = 800
    outcomes, _ = measure([[n] * 5, [0] * 5, [0] * 5, [n] * 5], batch_size=4000)
    with torch.no_grad():
        exact = WORLD.solve()
    for at, prefix in ((0, ()), (3, (3,))):
        for k in range(1, 5):
            rewards, truth = np.array(outcomes[at][k].rewards), float(exact[prefix].success[k])
            assert len(rewards) >= n
            assert stats.ttest_1samp(rewards, truth).pvalue > 1e-3


def test_the_verifier_sees_the_whole_response():
    seen = []

    def reward(prompts, completions, completion_ids):
        seen.extend(zip(completion_ids, completions, strict=True))
        return [0.0] * len(prompts)

    _, cost = measure([[1] * 5 for _ in NODES], reward=reward)
    starts = [(*ROLLOUTS[n.rollout].response_ids[: n.depth], b.token) for n, row in zip(NODES, BRANCHES) for b in row]
    over = [start for start in starts if start[-1] == 0 or len(start) == WORLD.horizon]
    going = [start for start in starts if start not in over]
    assert [tuple(ids) for ids, _ in seen[: len(over)]] == over
    assert [tuple(ids[: len(start)]) for (ids, _), start in zip(seen[len(over) :], going, strict=True)] == going
    for ids, text in seen:
        assert text == WORLD.text(tuple(ids))
        assert 0 not in ids[:-1]
        assert len(ids) == WORLD.horizon or ids[-1] == 0
    assert cost.truncated == sum(ids[-1] != 0 for ids, _ in seen[len(over) :])


def test_more_are_added_and_nothing_known_is_scored_again():
    tree = new_tree()
    outcomes, _ = measure([[1] * 5 for _ in NODES], tree=tree)
    before = [[list(o.rewards) for o in row] for row in outcomes]
    scored = []

    def reward(prompts, completions):
        scored.extend(completions)
        return WORLD.reward(prompts, completions)

    _, cost = measure([[0, 3, 0, 1, 0]] * 4, reward=reward, tree=tree, seed=1)
    added = [[len(o.rewards) - len(old) for o, old in zip(row, olds)] for row, olds in zip(outcomes, before)]
    # Some continuations from the root pass through the nodes below it.
    assert added[0] == [0, 3, 0, 1, 0]
    assert all(
        n >= m for row, least in zip(added[1:], ([0, 3, 0, 1, 0], [0] * 5, [0, 3, 0, 1, 0])) for n, m in zip(row, least)
    )
    assert len(scored) == cost.continuations == 12
    assert all(o.rewards[: len(old)] == old for row, olds in zip(outcomes, before) for o, old in zip(row, olds))


def test_nothing_to_do():
    outcomes, cost = measure([[0] * 5 for _ in NODES], eos_token_ids=(9,))
    assert (cost.tokens, cost.continuations, cost.truncated) == (0, 0, 0)
    assert sum(len(o.rewards) for row in outcomes for o in row) == 5


def test_what_passes_is_an_unbiased_sample():
    """Continuations from the root alone: what they leave at the nodes below has the exact success of each token."""
    outcomes, _ = measure([[3000] * 5, *[[0] * 5] * 3], batch_size=4000)
    with torch.no_grad():
        exact = WORLD.solve()
    for at, prefix in ((1, (1,)), (3, (3,))):
        for k in range(1, 5):
            rewards = np.array(outcomes[at][k].rewards)
            assert len(rewards) > 50
            assert stats.ttest_1samp(rewards, float(exact[prefix].success[k])).pvalue > 1e-3
