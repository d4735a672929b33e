"""Every figure draws, is labelled, and says in words what to see."""

import numpy as np
import pandas as pd
import pytest

from klq_edu import figures
from klq_edu.core.tree import TokenTree

VERDICTS = pd.DataFrame(
    [
        {"a": a, "b": b, "judge": judge, "rate": 0.6, "low": 0.5, "high": 0.7, "seeds": 1, "n": 128}
        for judge in ("gold", "MiniLM")
        for a, b in (("KLQ", "reference"), ("PPO-clip", "reference"), ("KLQ", "PPO-clip"))
    ]
)


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
        figures.calibration(pd.DataFrame({"proxy": [0.1 * i - 1 for i in range(60)]})),
        figures.win_rates(VERDICTS),
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


def test_a_calibrated_reward_model_lies_on_the_line_and_a_sure_one_below():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 6000)
    right = rng.random(6000) < 1 / (1 + np.exp(-abs(margin)))  # labels drawn with the model's own odds
    honest, sure = (pd.DataFrame({"proxy": np.where(right, abs(margin), -abs(margin)) * stretch}) for stretch in (1, 3))
    for pairs, holds in ((honest, lambda x, y: abs(x - y) < 0.05), (sure, lambda x, y: y < x)):
        said, found = figures.calibration(pairs).figure.axes[0].containers[0].lines[0].get_data()
        assert all(holds(x, y) for x, y in zip(said, found))


def test_win_rates_stand_at_their_place():
    figure = figures.win_rates(VERDICTS.assign(rate=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], low=0.05, high=0.9)).figure
    (axis,) = figure.axes
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names[::-1] == ["KLQ against reference", "PPO-clip against reference", "KLQ against PPO-clip"] * 2
    drawn = {c.get_label(): dict(zip(*c.lines[0].get_data()[::-1])) for c in axis.containers}
    assert [drawn["gold"][5 - i] for i in range(3)] == [0.1, 0.2, 0.3]
    assert [drawn["MiniLM"][2 - i] for i in range(3)] == [0.4, 0.5, 0.6]
