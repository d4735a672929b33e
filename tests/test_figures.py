"""Every figure draws, is labelled, and says in words what to see."""

from typing import get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest

from klq_edu import figures
from klq_edu.core.tree import TokenTree
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import variant_of

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
    verdicts = VERDICTS.assign(rate=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], low=0.05, high=0.9)
    (axis,) = figures.win_rates(verdicts).figure.axes
    names = dict(zip(axis.get_yticks(), (t.get_text() for t in axis.get_yticklabels())))
    assert list(names.values()) == ["KLQ against reference", "PPO-clip against reference", "KLQ against PPO-clip"]
    assert axis.yaxis_inverted(), "the first is on top"
    found = [(names[round(y)], c.get_label(), x) for c in axis.containers for x, y in zip(*c.lines[0].get_data())]
    assert found == [(f"{row.a} against {row.b}", row.judge, row.rate) for row in verdicts.itertuples()]


def drawn(container):
    """(x, y, lowest, highest) of the points of an error bar along y."""
    (x, y), bars = container.lines[0].get_data(), container.lines[2][0].get_segments()
    return [tuple(np.round([*point, *bar[:, 1]], 6).tolist()) for *point, bar in zip(x, y, bars)]


def test_curves_are_medians_of_their_own_column_and_bands_the_whole_range():
    rows = [
        {"algorithm": "klq", "seed": s, "rollouts": u, "reward": x, "kl": 10 * x}
        for s, x in enumerate((1.0, 2.0, 9.0))
        for u in (1, 2)
    ]
    axes = figures.learning_curves(pd.DataFrame(rows), {"reward": "reward", "kl": "KL"}, "Rises.").figure.axes
    for axis, factor in zip(axes, (1, 10), strict=True):
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert axis.lines[0].get_ydata().tolist() == [2 * factor] * 2
        assert (band.min(), band.max()) == (factor, 9 * factor)


def test_in_the_plane_kl_is_across_and_reward_up(runs):
    (axis,) = figures.reward_kl_plane(runs).figure.axes
    assert axis.lines[0].get_xdata().tolist() == [2.0, 4.0, 6.0, 8.0, 10.0] and axis.lines[0].get_ydata()[-1] == 5.0


def test_gaps_stand_at_their_tau_from_lowest_to_highest():
    """Rows in another order than τ, and more spread above than below."""
    rows = [
        {"algorithm": "klq", "schedule": "replay", "tau": tau, "seed": s, "kl_optimum": tau * x, "rollouts": 1}
        for tau in (1.0, 0.1)
        for s, x in enumerate((1.0, 2.0, 9.0))
    ]
    (axis,) = figures.optimum_gaps(pd.DataFrame(rows), {"replay": "replay"}).figure.axes
    (low, *small), (high, *large) = drawn(axis.containers[0])
    assert small == [0.2, 0.1, 0.9] and large == [2.0, 1.0, 9.0] and round(high - low) == 1
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.1", "1"]


def test_win_rates_reach_from_low_to_high():
    (axis,) = figures.win_rates(VERDICTS.assign(rate=0.6, low=0.5, high=0.9)).figure.axes
    for container in axis.containers:
        assert all(bar[:, 0].tolist() == pytest.approx([0.5, 0.9]) for bar in container.lines[2][0].get_segments())


def test_gains_are_drawn_by_setting_with_the_ends_of_runs_and_the_price_of_kl():
    keys = [(setting, k, s, u) for setting, k in (("0.1", 1.0), ("0.5", 3.0)) for s in (0, 1) for u in (0, 8)]
    rows = [
        {"algorithm": "klq", "setting": t, "seed": s, "update": u, "kl": u * (k + s), "reward": u * k, "gold": -u * k}
        for t, k, s, u in keys
    ]
    first, second = figures.gains_along_kl(pd.DataFrame(rows)).figure.axes
    for axis, sign in ((first, 1), (second, -1)):
        for (path, ends), k in zip((axis.lines[:2], axis.lines[2:4]), (1.0, 3.0)):
            assert path.get_xdata().tolist() == [0, 8 * (k + 0.5)] and path.get_ydata().tolist() == [0, sign * 8 * k]
            assert ends.get_xdata().tolist() == [8 * k, 8 * (k + 1)] and ends.get_ydata().tolist() == [sign * 8 * k] * 2
    prices = {line.get_label(): line.get_xydata()[-1].tolist() for line in first.lines[-2:]}
    assert prices == {"the price, 0.1 KL": [32.0, 3.2], "the price, 0.5 KL": [32.0, 16.0]}


def test_the_benchmarks_figures_show_each_column_where_it_is_named():
    """Whiskers from lowest to highest, and time, memory and error each under its own name."""
    row = {"workload": "klq", "contender": "naive", "n": 8, "v": 16, "h": 4, "dtype": "float32", "limit": 1.0}
    row |= {"units": 3.0, "units_low": 2.0, "units_high": 7.0, "memory_mb": 50.0, "error_gradient": 0.25}
    (axis,) = figures.bench_times(pd.DataFrame([row])).figure.axes
    bars, (whiskers,) = axis.patches, [c for c in axis.collections if len(c.get_segments())]
    assert bars[0].get_width() == 3.0 and whiskers.get_segments()[0][:, 0].tolist() == [2.0, 7.0]
    shown = figures.bench_scaling(pd.DataFrame([row, row | {"v": 32}]), "v").figure.axes
    found = {axis.get_ylabel().split()[0]: axis.lines[0].get_xydata().tolist() for axis in shown}
    assert found == {"time": [[16, 3], [32, 3]], "peak": [[16, 50], [32, 50]], "relative": [[16, 0.25], [32, 0.25]]}


def test_curves_are_smoothed_as_their_caption_says():
    """Running means over so many updates, against the completions sampled."""
    rows = [{"algorithm": "klq", "seed": 0, "rollouts": 32 * u, "reward": x} for u, x in ((1, 0.0), (2, 4.0), (3, 2.0))]
    figure, caption, _ = figures.learning_curves(pd.DataFrame(rows), {"reward": "reward"}, "Rises.", smooth=2)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[32, 0], [64, 2], [96, 3]]
    assert "one seed, so no error bars; running mean over 2 updates" in caption


def test_beside_the_best_possible_stand_exact_values_and_a_dot_at_the_end(runs):
    """A batch's mean can lie above the frontier."""
    exact = runs.assign(exact_kl=runs["kl"] / 2, exact_reward=3 * runs["reward"])
    best = pd.DataFrame({"kl": [0.0, 5.0], "reward": [0.0, 9.0]})
    (axis,) = figures.reward_kl_plane(exact, best).figure.axes
    frontier, path, dot = (line.get_xydata().tolist() for line in axis.lines[:3])
    assert frontier == [[0, 0], [5, 9]] and path == [[u, 3 * u] for u in range(1, 6)] and dot == [[5, 15]]


def test_the_distance_to_the_optimum_is_on_a_logarithmic_axis(runs):
    figure, caption, alt = figures.optimum_curves(runs, 0.2)
    assert figure.axes[0].get_yscale() == "log" and "logarithmic" in alt and "τ = 0.2" in caption


def test_each_schedule_has_its_own_gaps():
    rows = [
        {"algorithm": "klq", "schedule": used, "tau": 0.1, "seed": 0, "kl_optimum": gap, "rollouts": 1}
        for used, gap in (("on_policy", 4.0), ("replay", 1.0))
    ]
    axes = figures.optimum_gaps(pd.DataFrame(rows), {"replay": "cooled", "on_policy": "plain"}).figure.axes
    assert [(axis.get_title(), drawn(axis.containers[0])[0][1]) for axis in axes] == [("cooled", 1.0), ("plain", 4.0)]


def test_bars_of_the_calibration_are_95_percent_intervals():
    """Of 100 pairs, half of which agree: 1.96 √(¼ / 100)."""
    pairs = pd.DataFrame({"proxy": [(-1) ** i * (1 + i / 1000) for i in range(100)]})
    ((_, share, low, high),) = drawn(figures.calibration(pairs, bins=1).figure.axes[0].containers[0])
    assert (share, low, high) == pytest.approx((0.5, 0.402, 0.598))


BENCH = {"dtype": "float32", "h": 4, "units_low": 1.0, "units_high": 9.0, "memory_mb": 1.0, "error_gradient": 0.1}


def test_each_bar_of_the_benchmark_stands_at_its_name_with_its_own_limit():
    """Of each workload the first size only."""
    found = [("klq", "naive", 8, 3.0, 1.0), ("klq", "ours (torch)", 8, 2.0, 1.5), ("klq", "naive", 32, 7.0, 1.0)]
    found += [("update", "naive", 64, 5.0, np.nan)]
    rows = [
        {"workload": w, "contender": c, "n": 8, "v": v, "units": units, "limit": least} | BENCH
        for w, c, v, units, least in found
    ]
    (axis,) = figures.bench_times(pd.DataFrame(rows)).figure.axes
    names = dict(zip(np.round(axis.get_yticks(), 6), (label.get_text() for label in axis.get_yticklabels())))
    bars = [(names[round(bar.get_y() + bar.get_height() / 2, 6)], bar.get_width()) for bar in axis.patches]
    limits = {names[round(y, 6)]: x for x, y in axis.lines[0].get_xydata()}
    assert bars[::-1] == [("klq: naive", 3.0), ("klq: ours (torch)", 2.0), ("update: naive", 5.0)]
    assert limits == {"klq: naive": 1.0, "klq: ours (torch)": 1.5}


@pytest.mark.parametrize("along, label, fixed", [("v", "vocabulary V", "N = 8,"), ("n", "tokens N", "V = 16,")])
def test_scaling_says_what_grows_and_what_is_fixed(along, label, fixed):
    row = {"workload": "klq", "contender": "naive", "n": 8, "v": 16, "units": 3.0} | BENCH
    figure, caption, _ = figures.bench_scaling(pd.DataFrame([row, row | {along: 64}]), along)
    assert {axis.get_xlabel() for axis in figure.axes} == {label}
    assert f"against {along.upper()}, " in caption and fixed in caption


def test_every_judge_is_drawn_however_many_there_are():
    names = [f"judge {i}" for i in range(6)]
    (axis,) = figures.win_rates(pd.concat([VERDICTS[:3].assign(judge=name) for name in names])).figure.axes
    points = {c.get_label(): (c.lines[0].get_color(), c.lines[0].get_marker()) for c in axis.containers}
    assert list(points) == names and len(set(points.values())) == 6
    rows = sorted(y for c in axis.containers for y in c.lines[0].get_ydata())
    assert len(rows) == 18 and min(np.diff(rows)) > 0.1, "each in a place of its own"


def test_whatever_can_be_trained_has_a_name_and_a_look_of_its_own():
    """Whitened KLQ too, the ablation that TrainConfig offers: without them `klq train --whiten` ended in a KeyError."""
    names = get_args(get_type_hints(TrainConfig)["algorithm"])
    looks = [figures.STYLES[variant_of({"algorithm": a, "whiten": w})] for a in names for w in (False, True)]
    assert len({look["label"] for look in looks}) == len({look["color"] for look in looks}) == 2 * len(names) == 6
