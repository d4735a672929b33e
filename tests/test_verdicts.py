"""Verdicts of judges on held-out samples: who is compared with whom, and which way each judge leans."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from klq_edu.app import comparison, report
from klq_edu.app.demo import DemoConfig, run_demo
from klq_edu.app.experiment import SAMPLES_FILE, Result
from klq_edu.core.tree import TokenTree
from klq_edu.figures import frontier
from klq_edu.rlhf.judge import copied

PROMPTS = ["the cat sat on the mat", "one two three four"]


def samples(completions, reward, judged, length):
    table = {"prompt": PROMPTS * 2, "completion": completions, "reward": reward, "kl": 0.0, "length": length}
    shares = list(map(copied, completions, PROMPTS * 2))
    return pd.DataFrame(table | {"ended": True, "copied": shares, "judge": judged})


def result(name, seed, after):
    before = samples(["a", "b", "c", "d"], [0.0, 1.0, 0.0, 1.0], [0.0] * 4, [1, 1, 1, 1])
    settings = {"algorithm": name, "whiten": False, "tau": 0.1, "seed": seed, "updates": 9}
    return Result(settings, [{"attained": 1.0}], {0: before, 9: after})


def trained(name, seed, after):
    """A result with what the report's tables read of training."""
    made = result(name, seed, after)
    made.rows[0] |= {"reward": 0.25, "kl": 0.5, "seconds": 7.0}
    return made


WORLD = SimpleNamespace(tables={})
LAST = ["test KL [nats]", "tokens", "share ended", "share copied", "reward*", "KL* [nats]", "attained", "time [s]"]
KLQ = samples(["the cat sat on", "b", "c", "one two three x"], [1.0, 1.0, 0.0, 4.0], [1, -2, 0, 1], [4, 1, 1, 4])
PPO = samples(["a", "b", "c c", "d"], [1.0, 0.0, 2.0, 1.0], [0, 0, 0, 0], [1, 1, 2, 1])
RESULTS = [result("klq", 0, KLQ), result("ppo_clip", 0, PPO)]


def row(table, a, b, judge):
    return table[(table["a"] == a) & (table["b"] == b) & (table["judge"] == judge)].iloc[0]


def test_verdicts_average_over_a_prompts_samples_and_pair_them():
    table = comparison.verdicts(RESULTS)
    assert len(table) == 2 * 3  # reward and judge; KLQ, PPO-clip against the reference, KLQ against PPO-clip
    # rewards per sample KLQ 1 1 0 4, reference 0 1 0 1: of the cat's samples 1 and ½ are won, of the numbers' ½ and 1
    first = row(table, "KLQ", "reference", "reward")
    assert first["rate"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4) and first["gain"] == pytest.approx(
        (1 + 0 + 0 + 3) / 4
    )
    assert first["n"] == 2 and first["seeds"] == 1
    assert first["gain_low"] == pytest.approx(0.5) and first["gain_high"] == pytest.approx(
        1.5
    )  # the prompts' own means
    rival = row(table, "KLQ", "PPO-clip", "reward")
    assert rival["rate"] == pytest.approx((0.5 + 1 + 0 + 1) / 4) and rival["gain"] == pytest.approx((0 + 1 - 2 + 3) / 4)


def test_seeds_are_paired_with_themselves_and_missing_ones_left_out():
    swapped = [result("klq", 1, PPO), result("ppo_clip", 1, KLQ), result("klq", 2, KLQ)]
    rival = row(comparison.verdicts(RESULTS + swapped), "KLQ", "PPO-clip", "reward")
    assert rival["seeds"] == 2 and rival["rate"] == pytest.approx(0.5) and rival["gain"] == pytest.approx(0)
    assert rival["gain_low"] < 0 < rival["gain_high"]
    alone = row(comparison.verdicts(RESULTS + swapped), "KLQ", "reference", "reward")
    assert alone["seeds"] == 3


def test_leanings_are_shares_of_the_pairs_that_differ():
    table = comparison.leanings(RESULTS).set_index("judge")
    # Longer than their rival: KLQ's samples 0 and 3 (against the reference and PPO-clip), PPO-clip's sample 2 (against
    # the reference, and against KLQ, which is the shorter). By reward the longer one wins +1 +1, ½ +1 (ties ½), +1, +1.
    assert table.loc["reward", "longer"] == pytest.approx((1 + 1 + 1 + 0.5 + 1 + 1) / 6)
    assert table.loc["judge", "longer"] == pytest.approx((1 + 1 + 1 + 1 + 0.5 + 0.5) / 6)
    # Word triples of the prompt: only KLQ's samples 0 and 3 have any.
    assert table.loc["reward", "copied"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    same = [result("klq", 0, RESULTS[0].before)]
    assert np.isnan(comparison.leanings(same).set_index("judge").loc["reward", "copied"])


def test_beside_the_verdicts_stands_which_way_each_judge_leans():
    one = [result("klq", 0, samples(["a", "b", "c", "d"], [1.0] * 4, [1.0] * 4, [1, 2, 1, 1]))]
    shown = {results: leanings_shown(runs) for results, runs in (("all", RESULTS), ("one", one))}
    assert shown["all"].loc["reward"].tolist() == ["0.92", "0.88"]
    assert shown["all"].loc["judge"].tolist() == ["0.83", "1.00"]
    assert shown["one"].loc["reward"].tolist() == ["0.50", "–"], "no pair differs in what is copied"


def leanings_shown(runs):
    *_, section = report.judged(WORLD, runs, comparison.verdicts(runs))
    return section.table.set_index("judge")


def test_where_the_gold_has_no_opinion_nobody_can_agree_with_it():
    pairs = pd.DataFrame({"prompt": list("aabb"), "gold": [0.0, 1.0, -1.0, 0.0], "proxy": [-1.0, 2.0, -2.0, 3.0]})
    row = report.agreement(pairs).iloc[0]
    assert row["95 % interval"] == "[0.50, 0.50]" and row["prompts"] == 2, "over prompts, whose means are the same"
    assert (
        row["with the gold"] == "1.00" and row["labels with the gold"] == "0.50" and row["agrees with labels"] == "0.50"
    )


def test_the_report_shows_the_trained_policy_and_the_whole_range_of_seeds():
    """Completions are those after training; "median [lowest, highest]" is that."""
    ((_, lines), *_) = report.samples_table(RESULTS)
    assert [line[:2] for line in lines][:2] == [("reference", "a"), ("KLQ", "the cat sat on")]
    runs = [trained("klq", seed, KLQ.assign(reward=float(x))) for seed, x in enumerate((1, 2, 9, 3, 4))]
    assert report.results_table(runs).set_index("").loc["test reward", "KLQ"] == "0.50 → 3.00 [1.00, 9.00]"


def test_length_finishing_and_copying_are_shown_before_and_after():
    """What a reward may have been gained by."""
    runs = [trained("klq", 0, KLQ.assign(ended=[True, True, True, False])), trained("ppo_clip", 0, PPO)]
    table = report.results_table(runs).set_index("")
    assert table.loc["tokens"].to_dict() == {"KLQ": "1.0 → 2.5", "PPO-clip": "1.0 → 1.2"}
    assert table.loc["share ended"].to_dict() == {"KLQ": "1.00 → 0.75", "PPO-clip": "1.00 → 1.00"}
    assert table.loc["share copied", "KLQ"] == f"0.00 → {KLQ['copied'].mean():.2f}"
    assert table.loc["judge", "KLQ"] == "0.00 → 0.00"
    assert table.loc[LAST[-4:], "KLQ"].tolist() == ["0.25", "0.50", "1.000", "7"]
    assert table.loc["test reward − τ KL", "KLQ"] == "0.50 → 1.50" and table.index[0] == "test reward − τ KL"
    assert list(table.index[1:]) == ["test reward", "judge", *LAST]
    console = Console(width=80, record=True)
    report.print_table(console, report.results_table(runs), "results", "[a caption]")
    printed = console.export_text()
    assert "test KL [nats]" in printed and "[a caption]" in printed, "brackets are no markup"


def test_verdicts_as_text_say_low_and_high_and_over_what():
    rates = comparison.verdicts(RESULTS)
    cell = report.by_judge(rates, "gain", "gain_low", "gain_high").set_index("pair").loc["KLQ against reference"]
    assert cell["reward"] == "1.00 [0.50, 1.50]"
    assert "over prompts" in report.spread_of(rates) and "over seeds" in report.spread_of(rates.assign(seeds=2))


def test_judging_anew_keeps_the_run(tmp_path):
    """`--from judge` costs no training: all that goes is what was sampled and judged after it."""
    for name in (SAMPLES_FILE, "checkpoint.pt"):
        (tmp_path / name).touch()
    report.forget(tmp_path, judged_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    report.forget(tmp_path, judged_only=False)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "stage, left", [(None, ["checkpoint.pt", SAMPLES_FILE]), ("judge", ["checkpoint.pt"]), ("rl", [])]
)
def test_from_a_stage_on_the_demo_forgets_what_comes_of_it(stage, left, tmp_path, monkeypatch):
    """`--from` reaches the world too, and the report is of what was run."""
    config, seen = DemoConfig(world="tldr", remake=stage, out=tmp_path, algorithms=("klq",), open=True), []
    (folder,) = (tmp_path / "tldr" / name for name in config.experiments())
    folder.mkdir(parents=True)
    for name in (SAMPLES_FILE, "checkpoint.pt"):
        (folder / name).touch()
    monkeypatch.setattr(report, "load", lambda name, remake: (name, remake))
    monkeypatch.setattr(report, "run_in", lambda world, runs: [sorted(p.name for p in f.glob("*")) for f in runs])
    monkeypatch.setattr(report, "write_report", lambda *given: seen.append(given) or given[0])
    monkeypatch.setattr("webbrowser.open", seen.append)
    run_demo(config)
    path = tmp_path / "tldr" / "report.html"
    assert seen == [(path, ("tldr", stage), [left]), path.as_uri()]


def test_the_completions_shown_are_the_first_seeds_with_their_own_rewards():
    (_, lines), *_ = report.samples_table([*RESULTS, result("klq", 1, PPO)])
    assert list(lines) == [("reference", "a", 0.0), ("KLQ", "the cat sat on", 1.0), ("PPO-clip", "a", 1.0)]
    (_, lines), *_ = report.samples_table([result("klq", 0, KLQ.assign(reward=7.0)), result("klq", 1, PPO)])
    assert list(lines) == [("reference", "a", 0.0), ("KLQ", "the cat sat on", 7.0)]


def test_the_scale_and_what_numbers_are_medians_of_are_said_as_they_are():
    runs = [result(name, seed, KLQ) for name in ("klq", "ppo_clip") for seed in (0, 1, 2)]
    for r in runs:
        r.settings |= {"tau_start": None, "batch_size": 8, "replay": 0, "epochs": 3}
    assert report.scale(runs) == "τ = 0.1, 9 updates of 8 completions, 3 epochs each"
    cooled = [Result(r.settings | {"tau_start": 0.4, "replay": 5}, r.rows, r.tests) for r in runs]
    assert report.scale(cooled) == (
        "τ = 0.1 (cooled from 0.4), 9 updates of 8 completions and 5 earlier ones, 3 epochs each"
    )
    flat = [Result(r.settings | {"tau_start": 0.05}, r.rows, r.tests) for r in runs]
    assert "cooled" not in report.scale(flat)
    assert report.seeds(runs) == "Median over 3 seeds [lowest, highest]" and report.seeds(runs[::3])[:8] == "One seed"


MADE = {
    "stages": pd.DataFrame({"stage": ["pairs", "reward"], "digest": ["aa", "bb"]}),
    "samples": pd.DataFrame({"prompt": ["p"] * 4 + ["q"] * 4}),
    "held_out_pairs": pd.DataFrame({"prompt": list("pq") * 20, "gold": 1.0, "proxy": np.linspace(-1, 3, 40)}),
    "loss": pd.DataFrame(
        {"epoch": [0, 1], "loss": [np.nan, 2.0], "held_out": [5.0, 4.0], "held_out_texts": [6, 6], "of": [9, 9]}
    ),
    "trials": pd.DataFrame(
        {"kind": ["reference", "reference", "long", "long"], "judge": ["gold", "reward"] * 2,
         "score": [3.0, 2.0, 1.0, 2.5], "loses": [0.0, 0.0, 0.9, 0.25]}
    ),
}  # fmt: skip


def test_what_the_reward_was_made_of_is_told_under_its_own_heading():
    world = SimpleNamespace(tables=MADE, prompts=[{"prompt": "p "}] * 7, test_prompts=[{"prompt": "q"}] * 3)
    data, stages, losses, pairs, trials = report.made_of(world)
    (row,) = data.table.to_dict("records")
    expected = {"prompts to train on": "7", "held out": "3", "samples of each": "4"}
    assert row == expected | {"pairs to test the reward model on": "40"} and "“p”" in data.remark
    assert stages.table["digest"].tolist() == ["aa", "bb"]
    assert losses.table.columns.tolist() == ["epoch", "loss", "held-out loss"] and "6 of 9" in losses.remark
    assert losses.table.to_numpy().tolist() == [["0", "", "5"], ["1", "2", "4"]]
    assert pairs.table["agrees with labels"].tolist() == [f"{(np.linspace(-1, 3, 40) > 0).mean():.2f}"]
    cells = trials.table.set_index("kind")
    assert cells.loc["long"].to_dict() == {"gold": "1.00 (90%)", "reward": "2.50 (25%)"}
    assert list(cells.index) == ["reference", "long"]


TREE = TokenTree.random(3, 2)
CURVES = {
    "reward": 1.0,
    "kl": 2.0,
    "attained": 3.0,
    "kl_old": 4.0,
    "kl_optimum": 5.0,
    "exact_kl": 6.0,
    "exact_reward": 7.0,
}


def travelled(name, seed):
    made = result(name, seed, KLQ if name == "klq" else PPO)
    made.rows = [
        {"update": u, "rollouts": 8 * u, "seconds": 1.0} | {k: u * x for k, x in CURVES.items()} for u in (1, 2)
    ]
    return made


def test_each_figure_of_training_shows_what_its_axis_says():
    runs = [travelled(name, 0) for name in ("klq", "ppo_clip", "ppo_penalty")]
    parts = {part.name: part for part in report.trained(SimpleNamespace(tree=TREE), runs) + report.theory(runs)}

    def ends(name):
        return {
            axis.get_ylabel().split(" per")[0]: axis.lines[0].get_ydata()[-1]
            for axis in parts[name].picture.figure.axes
        }

    assert ends("curves") == {"reward": 1.5, "KL(π ‖ reference) [nats]": 3.0}, "means over five updates, of two here"
    assert ends("optimum") == {"KL(π ‖ π*)": 10.0} and "optimum" in parts["optimum"].title
    assert ends("pair") == {"improvement attained (exact)": 6.0, "KL(π_old ‖ π)": 8.0}
    said = [text.get_text() for text in parts["pair"].picture.figure.axes[0].get_legend().get_texts()]
    assert said == ["KLQ", "PPO-penalty"], "these two alone"
    plane = parts["plane"].picture.figure.axes[0].lines
    assert len(plane[0].get_xdata()) == len(frontier(TREE)) and plane[1].get_xydata()[-1].tolist() == [12.0, 14.0]


def test_beside_the_report_lie_its_numbers_of_all_runs(tmp_path):
    runs = [travelled(name, seed) for name in ("klq", "ppo_clip") for seed in (0, 1)]
    for r in runs:
        r.settings |= {"world": "w", "device": "cpu", "tau_start": None, "batch_size": 8, "replay": 0, "epochs": 3}
    prompts = [{"prompt": "p"}]
    world = SimpleNamespace(
        name="w", description="A world.", prompts=prompts, test_prompts=list(prompts), tree=None, judges={"judge": 0},
        tables={"trials": MADE["trials"]}, metrics={"attained": "what was attained of all"},
    )  # fmt: skip
    page = report.write_report(tmp_path / "report.html", world, runs).read_text(encoding="utf-8")
    tables = {path.stem: pd.read_csv(path) for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"results", "trials", "win_rates", "leanings"}
    found = tables["results"][["algorithm", "seed", "reward_after"]].to_numpy().tolist()
    assert found == [["klq", 0, 1.5], ["klq", 1, 1.5], ["ppo_clip", 0, 1.0], ["ppo_clip", 1, 1.0]]
    pd.testing.assert_frame_equal(tables["win_rates"], comparison.verdicts(runs), check_dtype=False)
    pd.testing.assert_frame_equal(tables["leanings"], comparison.leanings(runs))
    about = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert about["settings of the first run"] == runs[0].settings and about["command"].startswith("klq")
    assert page.count("<h3>KLQ</h3>") == page.count("<h3>PPO-clip</h3>") == 1 and "what was attained of all" in page
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"curves", "plane", "gains", "judges", "theory"}
