"""Verdicts of judges on held-out samples: who is compared with whom, and which way each judge leans."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from klq_edu.app import comparison, report
from klq_edu.app.experiment import SAMPLES_FILE, Result
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
    made.rows[0] |= {"reward": 0.0, "kl": 0.0, "seconds": 1.0}
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
    assert table.loc["judge", "KLQ"] == "0.00 → 0.00" and table.loc["reward*", "KLQ"] == "0.00"
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
