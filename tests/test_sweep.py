"""What `klq sweep` makes of its runs: paired differences, learning rates chosen elsewhere, the power of a judge."""

import concurrent.futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from klq_edu.app import sweep
from klq_edu.app.comparison import algorithms, difference, power, schedules
from klq_edu.app.experiment import Result
from klq_edu.app.sweep import EARLY, SCHEDULES, SweepConfig, in_parallel, one_run, run_sweep, tuned, win_rates
from klq_edu.figures import optimum_gaps
from klq_edu.rlhf.power import pairs_needed, seeds_needed
from klq_edu.worlds.registry import VARIANTS, preset


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
    table = algorithms(csv(rows[::-1]))
    assert cells(table, "PPO-clip")[-1] == "+0.100 [+0.100, +0.100], 4/4" and cells(table, "KLQ")[-1] == ""
    assert cells(table, "KLQ")[4:7] == ["0.700 [0.200, 0.900]", "0.625", "0.50"]
    assert cells(table, "KLQ")[-3:-1] == ["0.40 of 0.75", "3.000 [1.000, 8.000]"]


def test_the_interval_of_a_difference_covers_the_truth():
    """Student's t over ten seeds: 95 % of intervals hold the true mean, give or take the noise of 400."""
    rng, hits = np.random.default_rng(0), 0
    base = pd.DataFrame({"seed": range(10), "x": 0.0})
    for _ in range(400):
        text = difference(pd.DataFrame({"seed": range(10), "x": rng.normal(0.3, 1.0, 10)}), base, "x")
        low, high = text.split("[")[1].split("]")[0].split(",")
        hits += float(low) <= 0.3 <= float(high)
    assert 0.92 < hits / 400 < 0.98


def test_schedules_are_compared_each_with_its_own_klq(csv):
    rows = [row("klq", 1.0, s) for s in range(3)] + [row("klq", 5.0, s, "on_policy") for s in range(3)]
    rows += [row("ppo_clip", 6.0, s, "on_policy") for s in range(3)]
    assert cells(algorithms(csv(rows)), "PPO-clip")[-1].startswith("+1.000")
    taus = [
        row(a, gap, s, tau=t)
        for t, klq in ((0.1, 1.0), (1.0, 3.0))
        for a, gap in (("klq", klq), ("ppo_clip", 3.5))
        for s in range(3)
    ]
    shown = [line.split("|")[-2].strip() for line in algorithms(csv(taus)).splitlines() if "PPO-clip" in line]
    assert [cell.split()[0] for cell in shown] == ["+2.500", "+0.500"] and all(cell.endswith("3/3") for cell in shown)


def test_what_a_schedule_gains_is_paired_by_seed_within_an_algorithm(csv):
    rows = [row("klq", 5.0 + s, s, "on_policy", row_steps=100, seconds=7.4) for s in range(4)]
    rows += [row("klq", 4.0 + s, s, "replay", row_steps=400, seconds=30.0) for s in range(4)]
    table = schedules(csv(rows))
    assert cells(table, "KLQ") == ["0.2", "KLQ", "0.350", "0.450", "+0.100 [+0.100, +0.100], 4/4"]
    assert cells(table, "row-steps (seconds)") == ["", "row-steps (seconds)", "100 (7)", "400 (30)", ""]
    assert schedules(csv(rows[:4])) == ""


def test_too_few_seeds_give_no_interval(csv):
    rows = [row(a, 1.0, s) for a in ("klq", "ppo_clip") for s in (0, 1)]
    assert cells(algorithms(csv(rows)), "PPO-clip")[-1] == ""


def test_several_learning_rates_are_never_pooled(csv):
    """A screening has five of them: their spread is no spread of seeds."""
    rows = [row(a, 1.0, s, used, rate=r, wins_over_klq=0.4, row_steps=1, seconds=1.0)
            for a in ("klq", "ppo_clip") for s in range(3) for used in SCHEDULES for r in (1e-3, 2e-3)]  # fmt: skip
    assert schedules(csv(rows)) == power(csv(rows)) == ""
    assert cells(algorithms(csv(rows)), "PPO-clip")[-1] == ""


def test_learning_rates_are_the_best_of_another_sweep_at_the_nearest_tau(csv):
    rows = [
        row("klq", gap + 1.5 * (2 * seed - 1) * (rate == 1e-3), seed, tau=tau, rate=rate)  # the mean decides
        for tau, rate, gap in [(0.05, 1e-3, 2.0), (0.05, 4e-3, 1.0), (1.0, 1e-3, 0.1), (1.0, 4e-3, 0.2)]
        for seed in (0, 1)
    ]  # fmt: skip
    rows += [row("klq", gap, 0, "on_policy", 0.05, rate) for rate, gap in ((1e-3, 0.5), (4e-3, 0.6))]
    best = tuned(csv(rows))
    assert [best("replay", "klq", tau) for tau in (0.01, 0.05, 0.1, 0.5, 1.0)] == [4e-3, 4e-3, 4e-3, 1e-3, 1e-3]
    assert best("equal", "klq", 0.05) == 4e-3 and best("on_policy", "klq", 0.05) == 1e-3
    chosen = SweepConfig(taus=(0.05,), variants=("klq",), seeds=1, tuned_by=csv(rows)).experiments().values()
    assert {used: c.learning_rate for used, c in chosen} == {"replay": 4e-3, "equal": 4e-3, "on_policy": 1e-3}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tuned_by": "sweep.csv", "learning_rates": (0.1,)}, "give learning_rates or tuned_by, got both"),
        ({"tuned_by": "sweep.csv", "variants": ("ppo_clip",)}, "tuned_by: .*sweep.csv must have runs of ppo_clip"),
        ({"tuned_by": "old.csv"}, "tuned_by: .*old.csv must be the CSV of a sweep, it has no column .*schedule"),
        ({"updates": 0}, "updates must be an integer >= 1, got 0"),
        ({"taus": (-1.0,)}, "tau must be a finite number > 0, got -1"),
        ({"seeds": 0}, "seeds must not be empty or below 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message, csv, tmp_path):
    csv([row("klq", 1.0, 0)])
    (tmp_path / "old.csv").write_text("algorithm,critic,tau\nklq,shared,0.1\n")
    options |= {"tuned_by": tmp_path / options["tuned_by"]} if "tuned_by" in options else {}
    with pytest.raises(ValueError, match=message):
        SweepConfig(**options).experiments()


def test_every_algorithm_gets_the_same_completions_and_the_same_switches():
    runs = SweepConfig(seeds=1, taus=(0.1,)).experiments()
    assert len(runs) == len(VARIANTS) * len(SCHEDULES)
    assert {c.updates * c.batch_size for _, c in runs.values()} == {5120}
    many = SweepConfig(seeds=2, taus=(0.1, 0.5), learning_rates=(1e-3, 2e-3)).experiments()
    assert len(many) == 8 * len(runs), "no two runs share a folder"
    for schedule in SCHEDULES:
        same = {(c.replay, c.tau_start, c.epochs, c.updates) for used, c in runs.values() if used == schedule}
        assert len(same) == 1, schedule
    steps = {used: (c.batch_size + c.replay) * c.epochs * c.updates for used, c in runs.values()}
    assert steps["equal"] == steps["on_policy"] == steps["replay"] / 4


def test_the_power_table_asks_what_it_takes_to_see_the_difference(csv):
    wins = [0.52, 0.56, 0.55, 0.57]
    rows = [row("klq", 1.0, s, wins_over_klq=0.5) for s in range(4)]
    rows += [row("ppo_clip", 1.0, s, wins_over_klq=w) for s, w in enumerate(wins)]
    shown, sd = cells(power(csv(rows)), "PPO-clip"), pd.Series(wins).std()
    assert shown[3:6] == [f"0.550 ± {sd / 2:.3f}", f"{sd:.3f}", f"{pairs_needed(0.05):,.0f}"]
    assert shown[6:] == [f"{seeds_needed(0.05, sd, n)}" for n in (64, 256, 1024)]
    rows[-1]["wins_over_klq"] = 0.40
    assert cells(power(csv(rows)), "PPO-clip")[5:] == ["–"] * 4, "found nothing, so there is nothing to see"
    assert power(csv(rows[:4])) == "" and power(csv(rows[4:6])) != ""
    assert power(csv([row("ppo_clip", 1.0, 0, wins_over_klq=None)])) == ""


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


def test_wins_are_over_the_reference_and_klq_of_the_same_schedule_tau_and_seed(monkeypatch):
    """What is asked of `win_rate` is whether the run itself beats them."""
    world = SimpleNamespace(tree=SimpleNamespace(ref="reference"), tokenizer=None)
    world.truth = SimpleNamespace(expected_reward=lambda table: torch.tensor(table.tau))
    monkeypatch.setattr("klq_edu.worlds.load", lambda name: world)
    monkeypatch.setattr("klq_edu.app.experiment.trained_policy", lambda world, settings, folder: settings)
    monkeypatch.setattr("klq_edu.worlds.grammar.policy_table", lambda tree, tokenizer, policy: policy)
    monkeypatch.setattr("klq_edu.worlds.grammar.win_rate", lambda truth, a, b: (a, b))
    experiments = SweepConfig(taus=(0.1, 0.5), variants=("ppo_clip", "klq"), seeds=2).experiments()
    for (_, settings), row in zip(experiments.values(), win_rates("grammar", experiments, Path()), strict=True):
        assert row["wins_over_klq"] == (settings, replace(settings, algorithm="klq"))
        assert row["wins_over_reference"] == (settings, "reference")
        assert row["true_reward"] == pytest.approx(settings.tau)


def test_a_run_becomes_a_row(grammar, monkeypatch):
    """Shares after so many completions are where they are asked for, and the optimum is that of the final τ."""
    rows = [{"update": n, "rollouts": 32 * n, "seconds": 1.0, "row_steps": 64 * n} for n in range(10, 51, 10)]
    exact = dict.fromkeys(("kl_optimum", "mode_mass", "J", "exact_reward", "exact_kl"), 0.5)
    rows = [
        r | exact | {"attained": r["rollouts"] / 1e4} if r["rollouts"] % 640 == 0 or r is rows[-1] else r for r in rows
    ]
    monkeypatch.setattr("klq_edu.worlds.load", lambda name: grammar)
    monkeypatch.setattr("klq_edu.app.experiment.run_experiment", lambda world, c, folder: Result(c.to_dict(), rows, {}))
    cooled = preset("grammar", tau=0.2, tau_start=0.5, seed=3)
    found, plain = (one_run("grammar", "replay", c, Path()) for c in (cooled, replace(cooled, tau_start=None)))
    assert (found["attained_640"], found["attained_1280"], found["attained_2560"]) == (0.064, 0.128, None)
    assert (found["attained"], found["rollouts"], found["row_steps"], found["seconds"]) == (0.16, 1600, 3200, 5.0)
    assert found["mode_mass_optimum"] == plain["mode_mass_optimum"] and (found["tau"], found["seed"]) == (0.2, 3)


def test_results_are_in_the_order_of_the_calls(monkeypatch):
    """… not of who was ready first: rows and win-rates are joined by their place."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    ready = Event()
    calls = [(lambda: ready.wait(10) and "first",), (lambda: ready.set() or "second",)]
    assert in_parallel(calls, 2) == ["first", "second"]


def test_seeds_begin_where_asked_and_early_shares_are_measured():
    """A share that no update measures would be an empty column of the CSV."""
    found = SweepConfig(seeds=2, first_seed=7, taus=(0.1,)).experiments().values()
    assert {c.seed for _, c in found} == {7, 8}
    assert all(n % (c.eval_every * c.batch_size) == 0 for n in EARLY for _, c in found)


def test_an_error_ends_a_sweep_before_what_has_not_begun(monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    begun = []
    calls = [(lambda: 1 / 0,), (lambda: Event().wait(0.5),), (lambda: begun.append("third"),)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(calls, 1)
    assert not begun


def test_so_many_runs_at_a_time_as_asked_for(monkeypatch, tmp_path):
    def refuse(calls, jobs, *_):
        raise RuntimeError(f"{len(calls)} runs, {jobs} at a time")

    monkeypatch.setattr(sweep, "in_parallel", refuse)
    monkeypatch.setattr("klq_edu.worlds.load", lambda name: None)
    config = SweepConfig(taus=(0.1,), variants=("klq",), schedules=("replay",), seeds=5, jobs=3, out=tmp_path)
    with pytest.raises(RuntimeError, match="5 runs, 3 at a time"):
        run_sweep(config)
