"""Every figure draws, is labelled, and says in words what to see."""

import pandas as pd
import pytest

from klq_edu import figures
from klq_edu.core.tree import TokenTree


@pytest.fixture
def runs():
    columns = {
        "reward": 1.0,
        "kl": 2.0,
        "kl_optimum": 0.5,
        "attained": 0.5,
        "kl_old": 0.1,
        "exact_kl": 2.0,
        "exact_reward": 1.0,
    }
    keys = [(a, s, u) for a in ("klq", "ppo_penalty") for s in (0, 1) for u in range(1, 6)]
    rows = [{"algorithm": a, "seed": s, "rollouts": u} | {k: v * u for k, v in columns.items()} for a, s, u in keys]
    return pd.DataFrame(rows)


def drawings(runs):
    tree = TokenTree.random(3, 2)
    return [
        figures.learning_curves(runs, {"reward": "reward", "kl": "KL [nats]"}, "Rises."),
        figures.reward_kl_plane(runs, figures.frontier(tree)),
        figures.optimum_curves(runs, 0.2),
        figures.exact_steps(),
    ]


def test_every_axis_is_labelled_and_every_figure_described(runs):
    for figure, caption, alt in drawings(runs):
        assert all(axis.get_xlabel() and axis.get_ylabel() and axis.lines for axis in figure.axes)
        assert figure.axes[0].get_legend() is not None
        assert len(caption) > 40 and caption.endswith(".") and len(alt) > 10


def test_the_exact_steps_lie_on_the_diagonal_only_with_the_right_penalty():
    """The figure shows the theorem, not an illustration of it."""
    right, wrong = ([line.get_xydata() for line in axis.lines[:-1]] for axis in figures.exact_steps().figure.axes)
    assert max(abs(xy[:, 0] - xy[:, 1]).max() for xy in right) < 1e-9
    assert min(abs(xy[:, 0] - xy[:, 1]).max() for xy in wrong) > 0.01


def test_the_frontier_bounds_every_policy(random_policy):
    """No policy has more reward at the same KL than the optimum for some τ."""
    tree = TokenTree.random(3, 3, seed=1)
    best = figures.frontier(tree).sort_values("kl")
    for seed in range(20):
        policy = random_policy(tree, seed)
        kl, reward = tree.sequence_kl(policy).item(), tree.expected_reward(policy).item()
        above = best[best["kl"] >= kl]
        assert above.empty or reward <= above["reward"].iloc[0] + 1e-9
