"""`klq compare`: runs become files that say it all, are taken up again, compared by seed at the same τ and KL."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from klq_edu.app import compare, comparison, experiment, study, sweep
from klq_edu.app.compare import CompareConfig, done, record, run_compare
from klq_edu.app.experiment import Result, run_experiment, summarise_results
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.power import seeds_needed
from klq_edu.worlds import registry
from klq_edu.worlds.registry import Entry, preset

PROMPTS = [f"p{i}" for i in range(40)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Enough to tell where an interval lies, in a tenth of the time."""
    monkeypatch.setattr("klq_edu.rlhf.judge.RESAMPLES", 1000)


def samples(kl, reward, length=5.0, seed=0):
    """Test samples with these means; single completions scatter."""
    noise = np.random.default_rng(seed).normal(size=(3, len(PROMPTS)))
    noise -= noise.mean(axis=1, keepdims=True)
    table = {"prompt": PROMPTS, "reward": reward + noise[0], "kl": kl + 0.01 * noise[1]}
    table |= {"length": length + noise[2].round(), "ended": 1, "copied": 0.0, "gold": reward / 2 + noise[0]}
    return pd.DataFrame(table)


def run(name, seed, ends, tau=0.1, changes="", noise=0, **more):
    """A run through these (KL, reward), from (0, 0); those of one seed and noise scatter in the same way."""
    settings = {"algorithm": name, "whiten": False, "tau": tau, "seed": seed, "updates": 8 * len(ends)}
    tests = {8 * i: samples(*end, seed=seed + noise, **more) for i, end in enumerate([(0.0, 0.0), *ends])}
    return Result(settings | {"changes": changes}, [], tests)


def cells(table, *begin):
    """The row of a Markdown table that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [dict(zip(rows[0], row)) for row in rows if tuple(row[: len(begin)]) == begin]
    return found


def number(cell):
    return float(cell.split()[0])


def test_at_a_kl_between_two_tests_a_run_is_their_mixture():
    one = run("klq", 0, [(1.0, 0.4), (3.0, 0.6)])
    for kl, reward in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.4), (1.5, 0.45), (2.0, 0.5), (3.0, 0.6), (9.0, 0.6)):
        found = study.at_kl(one, kl)
        assert found["reward"].mean() == pytest.approx(reward, abs=1e-3), kl
        assert found["kl"].mean() == pytest.approx(min(kl, 3.0), abs=1e-3) and list(found["prompt"]) == PROMPTS


def test_a_run_that_turns_back_is_met_where_it_passed_last():
    one = run("klq", 0, [(2.0, 0.4), (1.0, 0.8)])
    for kl, reward in ((1.0, 0.8), (1.5, 0.6), (2.0, 0.4), (0.5, 0.1)):
        assert study.at_kl(one, kl)["reward"].mean() == pytest.approx(reward, abs=1e-3), kl


def test_who_only_went_further_is_ahead_at_the_same_tau_and_not_at_the_same_kl():
    runs = [run("klq", s, [(1.0, 0.3), (2.0, 0.6)]) for s in range(3)]
    runs += [run("ppo_clip", s, [(0.5, 0.15), (1.0, 0.3)]) for s in range(3)]
    same_tau = cells(study.differences(runs), "0.1", "KLQ", "PPO-clip")
    assert number(same_tau["reward"]) == pytest.approx(0.3) and number(same_tau["KL [nats]"]) == pytest.approx(1.0)
    assert same_tau["seeds"] == "3" and number(same_tau["finished"]) == 0
    assert number(same_tau["J = reward − τ KL"]) == pytest.approx(0.3 - 0.1 * 1.0)
    same_kl = cells(study.matched(runs), "0.1", "KLQ", "PPO-clip")
    assert same_kl["at a KL of"] == "1.00" and number(same_kl["reward"]) == pytest.approx(0, abs=2e-3)


def test_any_two_are_compared_klq_first_and_only_klq_before_judges():
    """Not in the order of the files; and a rival without KLQ's seeds is compared by those it has."""
    runs = [run("ppo_clip", s, [(1.0, 0.3)]) for s in range(3)] + [run("ppo_penalty", s, [(1.0, 0.5)]) for s in (1, 2)]
    runs += [run("klq", s, [(1.0, 0.6)]) for s in range(2)]
    assert number(cells(study.differences(runs), "0.1", "KLQ", "PPO-clip")["reward"]) == pytest.approx(0.3)
    row = cells(study.matched(runs), "0.1", "PPO-clip", "PPO-penalty")
    assert row["seeds"] == "2" and number(row["reward"]) == pytest.approx(-0.2, abs=2e-3)
    rows = study.verdicts(runs).splitlines()[2:]
    assert rows and all(row.startswith("| 0.1 | PPO-clip |") for row in rows) and "2" in rows[0].split("|")[4]


def test_the_summary_has_a_row_per_setting_with_klq_and_ppo_clip_of_the_same_seeds():
    runs = [run("klq", s, [(1.0, 0.3), (2.0, 0.6)]) for s in range(4)]
    rivals = [run("ppo_clip", s, [(0.5, 0.15), (1.0, 0.3)]) for s in range(3)]
    hotter = [run(name, 0, [(1.0, x)], tau=0.5) for name, x in (("klq", 2.0), ("ppo_clip", 1.0))]
    others = [run("ppo_penalty", 0, [(9.0, 9.0)]), run("klq", 0, [(9.0, 9.0)], changes="x 1")]
    for r in (*runs, *rivals, *hotter, *others):
        r.tests = {n: table.assign(MiniLM=-table["gold"]) for n, table in r.tests.items()}
    found = study.summary({"tldr": runs + rivals + others[:1] + hotter + others[1:], "dialogue": runs})
    assert len(found.splitlines()) == 4, "no rival, no row"
    row, other = (cells(found, "tldr", tau) for tau in ("0.1", "0.5"))
    assert row["seeds"] == "3" and number(row["Δ reward"]) == pytest.approx(0.3)
    assert number(row["Δ KL [nats]"]) == pytest.approx(1)
    assert number(row["J, KLQ − reference"]) == pytest.approx(0.6 - 0.1 * 2)
    assert number(row["J, PPO-clip − reference"]) == pytest.approx(0.3 - 0.1 * 1)
    assert number(row["J, KLQ − PPO-clip"]) == pytest.approx(0.2) and row["J, KLQ − PPO-clip"].endswith("3/3")
    assert number(row["Δ reward at the same KL"]) == pytest.approx(0, abs=2e-3)
    assert (number(row["KLQ wins, gold"]), number(row["KLQ wins, MiniLM or TextBlob"])) == (1, 0)
    assert number(other["J, KLQ − reference"]) == pytest.approx(2.0 - 0.5), "each at its own τ"


def test_along_a_run_scores_are_gains_over_its_own_reference():
    one = run("klq", 0, [(1.0, 0.4), (3.0, 0.6)])
    one.tests = {n: table.assign(reward=table["reward"] + 5) for n, table in one.tests.items()}
    rows = comparison.along([one, run("klq", 1, [(2.0, 0.7)], changes="replay 0")])
    assert rows["reward"].tolist() == pytest.approx([0, 0.4, 0.6, 0, 0.7], abs=1e-6)
    assert rows["kl"].tolist() == pytest.approx([0, 1, 3, 0, 2], abs=1e-6), "of its own test, not of the run's end"
    assert (
        rows["update"].tolist() == [0, 8, 16, 0, 8] and rows["setting"].tolist() == ["0.1"] * 3 + ["0.1, replay 0"] * 2
    )


def test_seeds_are_paired_and_settings_are_not_pooled():
    """Seeds that differ a lot, by the same for both: paired, nothing is left of it."""
    ends = {seed: [(1.0, seed)] for seed in range(4)}
    runs = [run(name, seed, end) for name in ("klq", "ppo_clip") for seed, end in ends.items()]
    runs += [run("klq", seed, [(1.0, 9.0)], changes="replay 0") for seed in range(2)]
    row = cells(study.differences(runs), "0.1", "KLQ", "PPO-clip")
    assert row["reward"] == "+0.000 [+0.000, +0.000], 0/4" and row["seeds"] == "4"
    assert number(cells(study.differences(runs), "0.1, replay 0", "KLQ", "reference")["reward"]) == pytest.approx(9.0)
    found = cells(study.differences(runs), "0.1", "KLQ", "reference")["reward"]
    assert number(found) == pytest.approx(1.5) and found.endswith(", 3/4"), "seed 0 gains nothing"


def test_what_was_shown_and_what_could_have_been():
    """Four seeds whose win-rates are far apart: the scatter is the seeds' own, and hides a small difference."""
    shift = {0: 3.0, 1: 3.0, 2: -3.0, 3: -3.0}
    runs = [run("klq", s, [(1.0, shift[s])]) for s in shift] + [run("ppo_clip", s, [(1.0, 0.0)]) for s in shift]
    row = cells(study.verdicts(runs), "0.1", "PPO-clip", "reward")
    assert row["win-rate"].startswith("0.500 [") and float(row["sd of a seed"]) == pytest.approx(0.577, abs=1e-3)
    assert float(row["shown from"][1:]) > 0.3 and row["seeds for the one found"] == "–"
    sure = [run("klq", s, [(1.0, 0.5)]) for s in shift] + [run("ppo_clip", s, [(1.0, 0.0)]) for s in shift]
    row = cells(study.verdicts(sure), "0.1", "PPO-clip", "reward")
    assert row["win-rate"] == "1.000 [1.000, 1.000]" and row["sd of a seed"] == "0.000"


def test_the_scatter_of_seeds_is_what_their_prompts_do_not_explain():
    shifts = (1.2, -1.2, 0.9, -0.3, 0.6)
    runs = [run("klq", s, [(1.0, x)]) for s, x in enumerate(shifts)]
    runs += [run("ppo_clip", s, [(1.0, 0.0)], noise=50) for s in range(len(shifts))]
    row = cells(study.verdicts(runs), "0.1", "PPO-clip", "reward")
    won = [(a.after["reward"] > b.after["reward"]) for a, b in zip(runs, runs[len(shifts) :])]
    between, within = np.var([w.mean() for w in won], ddof=1), np.mean([w.var() / len(w) for w in won])
    rate, sd = np.mean([w.mean() for w in won]), (between - within) ** 0.5
    assert row["seeds for the one found"] == f"{seeds_needed(rate - 0.5, sd, len(PROMPTS)):,.0f}"
    assert 0 < within < between and float(row["sd of a seed"]) == pytest.approx((between - within) ** 0.5, abs=1e-3)
    low, high = (float(x) for x in row["win-rate"].split("[")[1].strip("]").split(", "))
    assert float(row["shown from"][1:]) == pytest.approx((1.96 + 0.84) * (high - low) / 2 / 1.96, abs=2e-3)


def test_what_a_judge_that_looks_at_nothing_but_length_would_have_said():
    """KLQ's completions are all longer, and the reward prefers the longer one whenever two differ."""
    runs = [run("klq", s, [(1.0, 1.0)], length=5.0) for s in range(2)]
    for r in runs:
        r.tests[8] = r.tests[8].assign(length=9.0)
    runs += [run("ppo_clip", s, [(1.0, 0.0)]) for s in range(2)]
    row = cells(study.leanings(runs), "0.1", "reward")
    assert row["win-rate"] == row["length alone"] == "1.000" and row["leans to the longer"] == "1.00"


def test_a_run_becomes_a_file_and_is_read_again(tmp_path):
    stages = pd.DataFrame({"stage": ["pairs", "reward"], "digest": ["aa", "bb"]})
    config = preset("tldr", tau=0.1, seed=3, updates=16)
    made = run("klq", 3, [(1.0, 0.4), (3.0, 0.6)])
    made.tests = {n: table.assign(completion="x", ended=True) for n, table in made.tests.items()}
    made.rows = [
        {"rollouts": 256, "row_steps": 512, "seconds": 1.0},
        {"rollouts": 512, "row_steps": 1024, "seconds": 2.4},
    ]
    assert not done(tmp_path, "one", config)
    for changes in ("", ""):  # twice: the line is replaced
        record(tmp_path, "one", changes, config, made, stages)
    assert done(tmp_path, "one", config) and not done(tmp_path, "one", replace(config, epochs=3))
    table = pd.read_csv(tmp_path / "runs.csv")
    assert len(table) == 1
    without = {k: v for k, v in json.loads(table["settings"][0]).items() if k != "retrace"}  # an older version's
    table.assign(settings=json.dumps(without)).to_csv(tmp_path / "runs.csv", index=False)
    assert done(tmp_path, "one", config) and not done(tmp_path, "one", replace(config, retrace=True, replay=32))
    (again,) = study.read(tmp_path)
    assert again.labels == made.labels and list(again.tests) == [0, 8, 16]
    for n, table in made.tests.items():
        np.testing.assert_allclose(again.tests[n]["reward"], table["reward"], atol=1e-4)
        assert again.tests[n]["ended"].all() and again.tests[n]["prompt"].nunique() == len(PROMPTS)
    named = ["reward_model", "seconds", "rollouts", "row_steps"]
    assert pd.read_csv(tmp_path / "runs.csv").loc[0, named].tolist() == ["bb", 3, 512, 1024]
    (tmp_path / "one.csv").unlink()
    assert not done(tmp_path, "one", config)


@pytest.fixture
def world(monkeypatch):
    """The grammar world as if its reward were learnt and judged by its first letter."""
    from klq_edu.worlds import grammar

    usual = TrainConfig(updates=2, batch_size=4, epochs=1, max_new_tokens=4, critic="separate", eval_every=1)
    monkeypatch.setitem(registry.WORLDS, "grammar", Entry("", usual, ("klq",), 1, ("reward",)))

    def letters(prompts, completions, **_):
        return [len(c) / 10 for c in completions]

    judges = {"gold": letters, "MiniLM": letters}
    tables = {"stages": pd.DataFrame({"stage": ["reward"], "digest": ["cc"]})}
    made = replace(grammar.load(), evaluate=None, tree=None, judges=judges, tables=tables)
    monkeypatch.setattr("klq_edu.worlds.load", lambda name: made)
    monkeypatch.setattr(sweep, "in_parallel", lambda calls, *_: [f(*rest) for f, *rest in calls])
    return made


def test_a_run_is_tested_along_the_way_and_each_test_is_of_its_own_update(world, tmp_path):
    config = replace(registry.WORLDS["grammar"].settings, updates=5, eval_every=2, device="cpu", learning_rate=0.01)
    result = run_experiment(world, config, tmp_path)
    assert list(result.tests) == [0, 2, 4, 5] and result.before["kl"].abs().max() < 1e-6
    for n, table in list(result.tests.items())[1:]:
        assert result.rows[n - 1]["test_reward"] == pytest.approx(table["reward"].mean())
        assert result.rows[n - 1]["test_gold"] == pytest.approx(table["gold"].mean())
    assert "test_reward" not in result.rows[0] and result.after["kl"].mean() > 0


def test_one_command_runs_what_is_missing_and_writes_tables_and_figure(world, tmp_path, monkeypatch, capsys):
    config = CompareConfig("grammar", seeds=2, out=tmp_path / "out", runs=tmp_path / "runs", jobs=1)
    run_compare(config)
    said = capsys.readouterr().out
    assert "Differences at the same KL" in said and (tmp_path / "out" / "grammar.md").read_text().strip() in said
    assert (tmp_path / "out" / "grammar.svg").exists()
    assert pd.read_csv(tmp_path / "out" / "grammar" / "made_stages.csv")["digest"].tolist() == ["cc"]
    runs = pd.read_csv(tmp_path / "out" / "grammar" / "runs.csv")
    assert (
        runs["seed"].tolist() == [100, 101] * 2
        and runs["seed"].dtype == int
        and sorted(set(runs["algorithm"])) == ["klq", "ppo_clip"]
    )
    one = pd.read_csv(tmp_path / "out" / "grammar" / f"{runs['run'][0]}.csv")
    assert sorted(set(one["update"])) == [0, 1, 2] and "completion" not in one
    first, second = (study.read(tmp_path / "out" / "grammar")[i].before for i in (0, 1))
    assert not first["reward"].equals(second["reward"]), "each seed samples for itself"

    def refuse(*_):
        raise AssertionError("it is all there")

    monkeypatch.setattr(compare, "some_runs", refuse)
    run_compare(config)
    with pytest.raises(AssertionError, match="it is all there"):
        run_compare(replace(config, changes={"epochs": 2.0}))
    world.tables["stages"]["digest"] = ["dd"]  # the reward model has been made anew
    with pytest.raises(ValueError, match=r"must hold runs for one reward model, got \['cc', 'dd'\]: choose another"):
        run_compare(replace(config, seeds=3))
    path = tmp_path / "out" / "grammar" / "runs.csv"
    runs.assign(reward_model=["cc", "cc", "cc", "dd"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="one reward model"):
        study.write(path.parent)


def test_changes_are_numbers_of_known_fields():
    config = CompareConfig(changes={"replay": 0.0, "learning_rate": 2e-4}, seeds=1)
    ((name, settings),) = (
        config.experiments()[0].items() if len(config.variants) == 1 else [next(iter(config.experiments()[0].items()))]
    )
    assert name == "klq-tau0.1-learning_rate0.0002-replay0-seed100" and settings.replay == 0
    assert isinstance(settings.replay, int) and settings.learning_rate == 2e-4 and settings.seed == 100
    with pytest.raises(ValueError, match="changes must be numbers that these fields .*, got 'critic'"):
        CompareConfig(changes={"critic": 1.0})
    for name, value in (("tau", 0.3), ("seed", 7.0), ("epochs", 2.5), ("whiten", 1.0)):  # files would say what isn't so
        with pytest.raises(ValueError, match=f"changes must .* got '{name}': {value}"):
            CompareConfig(changes={name: value})
    with pytest.raises(ValueError, match="seeds must not be empty or below 1, got 0"):
        CompareConfig(seeds=0)


def test_every_tau_seed_and_algorithm_is_run_with_the_changes():
    """A change that reached one algorithm alone would be published as KLQ's lead."""
    config = CompareConfig(taus=(0.1, 0.2), seeds=2, first_seed=7, changes={"replay": 0.0, "learning_rate": 1e-4})
    parts = [list(part.values()) for part in config.experiments()]
    assert sorted((a.tau, a.seed) for a, _ in parts) == list(product((0.1, 0.2), (7, 8)))
    for a, b in parts:
        assert (a.algorithm, b.algorithm) == ("klq", "ppo_clip") and replace(b, algorithm="klq") == a
        assert (a.replay, a.learning_rate) == (0, 1e-4)


def test_each_setting_is_priced_and_judged_by_its_own_runs():
    """At τ = 0.1 KLQ's longer completions win before the reward, at 0.5 they lose; MiniLM says the opposite."""
    runs = []
    for tau, gain in ((0.1, 1.0), (0.5, -1.0)):
        pairs = [("klq", (2.0, gain)), ("ppo_clip", (1.0, 0.0))]
        runs += [run(name, seed, [end], tau=tau) for name, end in pairs for seed in range(2)]
    for r in runs:
        longer = r.after["length"] + 20 * (r.labels["algorithm"] == "klq")
        r.tests[8] = r.after.assign(length=longer)
        r.tests = {n: table.assign(MiniLM=-table["gold"]) for n, table in r.tests.items()}
    differences, verdicts, leanings = study.differences(runs), study.verdicts(runs), study.leanings(runs)
    for tau, gain, rates in (("0.1", 1.0, ("1.000", "0.000")), ("0.5", -1.0, ("0.000", "1.000"))):
        found = cells(differences, tau, "KLQ", "PPO-clip")["J = reward − τ KL"]
        assert number(found) == pytest.approx(gain - float(tau), abs=1e-3)
        for judge, rate in zip(("reward", "MiniLM"), rates):
            row = cells(verdicts, tau, "PPO-clip", judge)
            assert row["win-rate"].startswith(rate) and row["seeds"] == "2"
            row = cells(leanings, tau, judge)
            assert row["win-rate"] == row["length alone"] == rate and row["leans to the longer"] == rate[:-1]
    row = cells(study.summary({"tldr": runs}), "tldr", "0.1")
    assert number(row["J, KLQ − PPO-clip"]) == pytest.approx(0.9, abs=1e-3)
    assert number(row["Δ reward at the same KL"]) == pytest.approx(0.5, abs=1e-2)
    assert number(row["KLQ wins, gold"]) == 1 and number(row["KLQ wins, MiniLM or TextBlob"]) == 0


def test_each_seed_is_met_where_its_own_two_runs_meet():
    runs = [run("klq", s, [(2.0 * s, 1.0)]) for s in (1, 2)] + [run("ppo_clip", s, [(1.0 * s, 0.0)]) for s in (1, 2)]
    row = cells(study.matched(runs), "0.1", "KLQ", "PPO-clip")
    assert row["at a KL of"] == "1.50" and number(row["reward"]) == pytest.approx(0.5, abs=2e-3)


def test_differences_and_win_rates_are_of_prompts_and_stay_in_their_range():
    """Twenty samples of one prompt tell no more than its mean; widened intervals of win-rates end at 1."""
    a = pd.DataFrame({"prompt": ["a"] * 20 + ["b"] * 20, "reward": [1.0] * 20 + [-1.0] * 20, "kl": 0.0})
    assert study._difference([(a, a.assign(reward=0.0))], "reward") == "+0.000 [-1.000, +1.000]"
    runs = [run("klq", s, [(1.0, 9.0 * s - 0.7)]) for s in range(2)]
    runs += [run("ppo_clip", s, [(1.0, 0.0)], noise=50) for s in range(2)]
    for r in runs:
        r.tests = {n: table.assign(MiniLM=table["gold"]) for n, table in r.tests.items()}
    tables = (
        (study.summary({"tldr": runs}), "tldr", "0.1"),
        (study.verdicts(runs), "0.1", "PPO-clip", "gold"),
    )
    for found in (cells(*t) for t in tables):
        found = found.get("KLQ wins, gold") or found["win-rate"]
        assert found.endswith(", 1.000]"), found


class Folder(SimpleNamespace):
    """What `read_result` asks of a run: its folder, settings, and how many updates it has logged."""

    def rows(self):
        """So many rows."""
        return [{}] * self.logged


def test_a_result_is_read_only_if_logged_to_its_end_and_judged_by_these_judges(tmp_path):
    """The samples of the last update are there before its row is: cut off between them, a run isn't finished."""
    run, table = Folder(folder=tmp_path, settings={"updates": 2}, logged=2), samples(0.0, 0.0)
    for updates in (0, 1, 2):
        experiment.keep_test(run, "judges", updates, table)
    assert list(experiment.read_result(run, "judges").tests) == [0, 1, 2]
    assert experiment.read_result(run, "other judges") is None
    run.logged = 1
    assert experiment.read_result(run, "judges") is None
    run.logged = 3
    run.settings["updates"] = 3
    assert experiment.read_result(run, "judges") is None, "raised, and not yet tested at its new end"
    experiment.keep_test(run, "other judges", 0, table)
    judged, tests = experiment.read_tests(tmp_path)
    assert judged == "other judges" and list(tests) == [0], "what the old judges said must not stay beside it"


def test_who_judges_is_told_by_what_they_say_of_which_samples():
    """The same names are not enough: stored verdicts of other judges must not be read as theirs."""

    def judged_by(bias=0.0, prompts=("p", "q"), each=1):
        judges = {"gold": lambda prompts, completions: [bias] * len(completions)}
        test_prompts = Dataset.from_dict({"prompt": prompts})
        world = SimpleNamespace(judges=judges, test_prompts=test_prompts, samples_per_prompt=each)
        return experiment.judged_by(world)

    assert judged_by() == judged_by()
    assert len({judged_by(), judged_by(bias=1.0), judged_by(prompts=("p", "r")), judged_by(each=2)}) == 4


class Rolled(SimpleNamespace):
    """A rollout of one completion."""

    def __len__(self):
        return len(self.completions)


def test_samples_say_what_was_sampled_in_these_units():
    """KL in nats per completion, length in tokens, and the share of the completion that stands in its prompt."""
    values = {"prompts": ["one two three four"], "completions": ["one two three"], "ended": torch.tensor([True])}
    values |= {"kl": torch.tensor([[0.5, 0.25, 0.0]]), "mask": torch.tensor([[True, True, False]])}
    rollout = Rolled(**values, tokens=torch.tensor([[3, 4, 0]]), logprobs=torch.zeros(1, 3))
    judges = {"MiniLM": lambda prompts, completions, bonus: [bonus[0] + 1.0]}
    world = SimpleNamespace(reward=lambda prompts, completions, bonus: [bonus[0]], judges=judges)
    (row,) = experiment.judged(world, rollout, {"bonus": [2.0]}).to_dict("records")
    assert row == {
        "prompt": "one two three four", "completion": "one two three", "reward": 2.0, "kl": 0.75, "length": 2,
        "ended": True, "copied": 1.0, "MiniLM": 3.0,
    }  # fmt: skip


def test_every_batch_of_test_samples_has_random_numbers_of_its_own(monkeypatch):
    """… the same on each call with the same seed: algorithms are compared under common random numbers."""

    def collect(policy, tokenizer, prompts, generator, **_):
        return [(p, torch.rand((), generator=generator).item()) for p in prompts]

    monkeypatch.setattr(experiment, "collect", collect)
    monkeypatch.setattr(experiment, "judged", lambda world, rollout, rows: pd.DataFrame(rollout, columns=list("px")))
    prompts = Dataset.from_dict({"prompt": ["p", "q"]})
    world = SimpleNamespace(test_prompts=prompts, samples_per_prompt=3, tokenizer=None, constraint=None)
    configs = (TrainConfig(batch_size=2, seed=s) for s in (0, 0, 1))
    first, again, other = (experiment.held_out_samples(world, None, config) for config in configs)
    assert first["p"].tolist() == ["p", "q"] * 3 and first["x"].nunique() == 6
    assert first.equals(again) and not set(first["x"]) & set(other["x"])


def test_a_summary_of_results_is_of_the_last_quarter_and_of_before_and_after():
    one = run("klq", 0, [(2.0, 0.4)])
    one.rows = [{"reward": float(i), "kl": 2.0 * i, "attained": i / 10, "seconds": 1.0} for i in range(8)]
    (row,) = summarise_results([one]).to_dict("records")
    assert (row["reward"], row["kl"], row["attained"], row["seconds"]) == (6.5, 13.0, 0.7, 8.0)
    found = [row[name] for name in ("reward_before", "reward_after", "kl_before", "kl_after")]
    assert found == pytest.approx([0, 0.4, 0, 2], abs=1e-6)


def test_a_finished_folder_does_not_answer_for_another_reward_or_other_prompts(world, tmp_path):
    """Its judges and test prompts are the same, and its result would be read without training."""
    config = replace(registry.WORLDS["grammar"].settings, updates=1, device="cpu")
    run_experiment(world, config, tmp_path)
    others = {"reward": replace(world, reward=world.judges["gold"])}
    others["prompts"] = replace(world, prompts=world.prompts.select(range(8)))
    for named, other in others.items():
        with pytest.raises(ValueError, match=f"holds another run, it differs in {named}"):
            run_experiment(other, config, tmp_path)
    assert run_experiment(world, config, tmp_path).rows


def test_training_starts_from_the_references_own_value_in_the_precision_asked_for(
    world, grammar, tmp_path, monkeypatch
):
    """The exact mean where there is a tree, else that of the samples before; those are in the same precision."""
    seen, sampled = [], []
    given, table = replace(world, reference_samples={}), samples(0.0, 0.7)

    def stop(policy, *_, **more):
        seen.append((policy.dtype, policy.value_is_set, policy.value_head.bias.item()))
        raise ZeroDivisionError

    monkeypatch.setattr(experiment, "train", stop)
    monkeypatch.setattr(experiment, "held_out_samples", lambda world, policy, _: sampled.append(policy.dtype) or table)
    config = replace(registry.WORLDS["grammar"].settings, device="cpu", dtype="bfloat16")
    tasks = [(given, config), (replace(grammar, reference_samples={}), config)]
    tasks += [(replace(given, reference_samples={}), replace(config, centre="batch"))]
    for i, (task, settings) in enumerate(tasks):
        with pytest.raises(ZeroDivisionError):
            run_experiment(task, settings, tmp_path / str(i))
    assert sampled == [torch.bfloat16] * 3 and seen == [
        (torch.bfloat16, True, pytest.approx(0.7)), (torch.bfloat16, True, pytest.approx(0, abs=1e-6)),
        (torch.bfloat16, False, 0.0),
    ]  # fmt: skip


def test_held_out_prompts_are_sampled_as_those_in_training(monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "collect", lambda *_, **settings: asked.append(settings))
    monkeypatch.setattr(experiment, "judged", lambda world, rollout, rows: pd.DataFrame(rows))
    prompts = Dataset.from_dict({"prompt": ["p"], "bonus": [1]})
    world = SimpleNamespace(test_prompts=prompts, samples_per_prompt=1, tokenizer=None, constraint="rules")
    experiment.held_out_samples(world, None, TrainConfig(temperature=0.7, max_new_tokens=9))
    (settings,) = asked
    assert settings | {"generator": None} == {
        "max_new_tokens": 9, "temperature": 0.7, "constraint": "rules", "generator": None
    }  # fmt: skip


def test_so_many_seeds_at_a_time_each_in_the_folder_of_its_world(world, tmp_path, monkeypatch):
    def refuse(calls, jobs, *_):
        raise RuntimeError(f"{len(calls)} seeds, {jobs} at a time in {calls[0][-1].relative_to(tmp_path)}")

    monkeypatch.setattr(sweep, "in_parallel", refuse)
    config = CompareConfig("grammar", seeds=5, jobs=3, out=tmp_path / "out", runs=tmp_path / "runs")
    with pytest.raises(RuntimeError, match="5 seeds, 3 at a time in runs/grammar"):
        run_compare(config)
