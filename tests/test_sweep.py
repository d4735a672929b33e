"""What `klq sweep` makes of its runs: paired differences, learning rates chosen elsewhere, the power of a judge."""

import math

import pandas as pd
import pytest

from klq_edu.app.sweep import SCHEDULES, SweepConfig, difference, markdown, power_table, tuned
from klq_edu.figures import optimum_gaps
from klq_edu.rlhf.judge import pairs_needed, seeds_needed
from klq_edu.worlds.registry import VARIANTS


def row(algorithm, gap, seed, schedule="replay", tau=0.2, rate=2e-3, **more):
    shares = {"attained": 1 - gap / 10, "attained_1280": 0.5, "kl_optimum": gap, "rollouts": 5120, "mode_mass": 0.4}
    shares["mode_mass_optimum"] = 0.75
    return (
        {"schedule": schedule, "algorithm": algorithm, "tau": tau, "learning_rate": rate, "seed": seed} | shares | more
    )


@pytest.fixture
def csv(tmp_path):
    """A function: rows -> the file that holds them."""

    def write(rows):
        pd.DataFrame(rows).to_csv(tmp_path / "sweep.csv", index=False)
        return tmp_path / "sweep.csv"

    return write


def cells(table, algorithm):
    return next([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if f"| {algorithm} |" in line)


def test_differences_are_paired_by_seed(csv):
    """Seeds differ by whole nats and the algorithms by 0.1 in each: unpaired that would drown."""
    gaps = [1.0, 4.0, 2.0, 8.0]
    rows = [row("klq", g, s) for s, g in enumerate(gaps)] + [row("ppo_clip", g + 0.1, s) for s, g in enumerate(gaps)]
    table = markdown(csv(rows[::-1]))
    assert cells(table, "PPO-clip")[-1] == "+0.100 [+0.100, +0.100]" and cells(table, "KLQ")[-1] == ""
    assert cells(table, "KLQ")[4:6] == ["0.700 [0.200, 0.900]", "0.625"]
    assert cells(table, "KLQ")[-3] == "0.40 of 0.75"
    assert cells(table, "KLQ")[-2] == "3.000 [1.000, 8.000]"


def test_the_interval_of_a_difference_covers_the_truth():
    """Percentile intervals over ten seeds: near 95 %, a little below as the bootstrap is at small numbers."""
    import numpy as np

    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = difference(pd.Series(rng.normal(0.3, 1.0, 10))).split("[")[1].rstrip("]").split(",")
        hits += float(low) <= 0.3 <= float(high)
    assert 0.85 < hits / 200 < 0.98


def test_schedules_are_compared_each_with_its_own_klq(csv):
    rows = [row("klq", 1.0, 0), row("klq", 5.0, 0, "on_policy"), row("ppo_clip", 6.0, 0, "on_policy")]
    assert cells(markdown(csv(rows)), "PPO-clip")[-1].startswith("+1.000")
    assert "PPO-clip" not in markdown(csv(rows), "replay")


def test_learning_rates_are_the_best_of_another_sweep_at_the_nearest_tau(csv):
    rows = [
        row("klq", gap, seed, tau=tau, rate=rate)
        for tau, rate, gap in [(0.05, 1e-3, 2.0), (0.05, 4e-3, 1.0), (1.0, 1e-3, 0.1), (1.0, 4e-3, 0.2)]
        for seed in (0, 1)
    ]  # fmt: skip
    rows += [row("klq", gap, 0, "on_policy", 0.05, rate) for rate, gap in ((1e-3, 0.5), (4e-3, 0.6))]
    best = tuned(csv(rows))
    assert [best("replay", "klq", tau) for tau in (0.01, 0.05, 0.1, 0.5, 1.0)] == [4e-3, 4e-3, 4e-3, 1e-3, 1e-3]
    assert best("equal", "klq", 0.05) == 4e-3 and best("on_policy", "klq", 0.05) == 1e-3
    chosen = SweepConfig(taus=(0.05,), variants=("klq",), seeds=1, tuned_by=csv(rows)).experiments().values()
    assert {used: c.learning_rate for used, c in chosen} == {"replay": 4e-3, "equal": 4e-3, "on_policy": 1e-3}


def test_every_algorithm_gets_the_same_completions_and_the_same_switches():
    runs = SweepConfig(seeds=1, taus=(0.1,)).experiments()
    assert len(runs) == len(VARIANTS) * len(SCHEDULES)
    assert {c.updates * c.batch_size for _, c in runs.values()} == {5120}
    for schedule in SCHEDULES:
        same = {(c.replay, c.tau_start, c.epochs, c.updates) for used, c in runs.values() if used == schedule}
        assert len(same) == 1, schedule
    steps = {used: (c.batch_size + c.replay) * c.epochs * c.updates for used, c in runs.values()}
    assert steps["equal"] == steps["on_policy"] == steps["replay"] / 4


def test_the_power_table_asks_what_it_takes_to_see_the_difference(csv):
    wins = [0.52, 0.56, 0.55, 0.57]
    rows = [row("klq", 1.0, s, wins_over_klq=0.5) for s in range(4)]
    rows += [row("ppo_clip", 1.0, s, wins_over_klq=w) for s, w in enumerate(wins)]
    shown = cells(power_table(csv(rows)), "PPO-clip")
    sd = pd.Series(wins).std()
    assert shown[3:6] == ["0.555 [0.520, 0.570]", f"{sd:.3f}", f"{pairs_needed(0.05):,.0f}"]
    assert shown[6:] == [f"{seeds_needed(0.05, sd, n)}" for n in (64, 256, 1024)]
    for r in rows:
        r["wins_over_klq"] = 0.5
    assert cells(power_table(csv(rows)), "PPO-clip")[5:] == [str(math.inf)] * 4


def test_the_figure_shows_every_run_in_its_panel():
    rows = [
        row(a, g, s, used, tau)
        for used in SCHEDULES
        for tau in (0.1, 1.0)
        for a, g in (("klq", 1.0), ("ppo_clip", 2.0))
        for s in (0, 1)
    ]
    figure, caption, alt = optimum_gaps(pd.DataFrame(rows), {name: name for name in SCHEDULES})
    assert len(figure.axes) == len(SCHEDULES) and caption.endswith(".") and "KLQ" in alt
    for axis in figure.axes:
        assert axis.get_xlabel() and axis.get_ylabel() and axis.get_yscale() == "log" and len(axis.containers) == 2
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
