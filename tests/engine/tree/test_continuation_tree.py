from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree
from odp_callbacks.engine.tree.nodes import Node
from tests.helpers.worlds import make_world

WORLD = make_world()
QUESTION = as_questions([WORLD.row], WORLD.tokenizer)[0]
ROLLOUTS = [Rollout(QUESTION, ids, "", False, reward=0.25) for ids in ((1, 2, 0), (3, 0))]
NODES = [Node(0, 0, 1.0), Node(0, 1, 1.0), Node(0, 2, 1.0), Node(1, 1, 1.0)]
BRANCHES = [Branch(token, 0.2, 0.2, False) for token in range(5)]


def new_tree(nodes=NODES, rollouts=ROLLOUTS):
    tree = ContinuationTree(rollouts, nodes)
    tree.set_branches([list(BRANCHES) for _ in tree.first_nodes])
    return tree


def test_nodes_with_the_same_prefix_share_their_continuations():
    nodes = [Node(0, 0, 1.0), Node(1, 0, 1.0), Node(1, 1, 1.0)]
    tree = new_tree(nodes)
    assert tree.group_of_node == [0, 0, 1]
    assert tree.first_nodes == [0, 2]
    assert tree.taken_tokens(0) == [1, 3]


def test_a_continuation_counts_wherever_it_passes():
    tree = new_tree()
    tree.add_continuation(0, 1, (1, 2, 3), 0.75)
    seen = [[outcome.rewards for outcome in row] for row in tree.outcomes]
    assert seen == [[[], [0.75], [], [], []], [[], [], [0.75], [], []], [[], [], [], [0.75], []], [[]] * 5]
    tree.outcomes[2][3] = BranchOutcomes([0.5], [0], True)
    tree.add_continuation(0, 1, (1, 2, 3), 0.75)
    assert tree.outcomes[2][3].rewards == [0.5], "a success that is known needs no sample"
    assert tree.outcomes[1][2].halves == tree.outcomes[0][1].halves == [0, 1]


def test_siblings_are_samples_and_the_own_ending_is_not():
    other = as_questions([WORLD.row], WORLD.tokenizer)[0]
    rollouts = [
        Rollout(QUESTION, (1, 2, 0), "", False, 0.0),
        Rollout(QUESTION, (1, 3), "", False, 1.0),
        Rollout(QUESTION, (2, 0), "", False, 0.5),
        Rollout(other, (1, 2), "", False, 0.125),
    ]
    tree = new_tree([Node(0, 0, 1.0), Node(0, 1, 1.0), Node(1, 0, 1.0)], rollouts)
    assert [outcome.rewards for outcome in tree.node_outcomes(0)] == [[], [1.0], [0.5], [], []]
    assert [outcome.rewards for outcome in tree.node_outcomes(1)] == [[], [], [], [1.0], []]
    assert [outcome.rewards for outcome in tree.node_outcomes(2)] == [[], [0.0], [0.5], [], []]
    assert all(not outcome.rewards for row in tree.outcomes for outcome in row)
