"""Win-rates and their intervals; how many seeds and pairs a comparison needs, against simulated comparisons."""

import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest

from klq_edu.rlhf import judge as judge_module
from klq_edu.rlhf.endpoint import endpoint_judge
from klq_edu.rlhf.judge import (
    WinRate,
    bootstrap_interval,
    by_score,
    win_rate,
    win_rate_of_seeds,
)
from klq_edu.rlhf.power import pairs_needed, seeds_needed, t_quantile


def power_of(effect, seed_sd, pairs, seeds, rng, runs=4000):
    """Share of simulated experiments whose |t| exceeds what 95 % of those without an effect reach."""

    def t(mean):
        p = np.clip(rng.normal(mean, seed_sd, (runs, seeds)), 0, 1)
        rates = rng.binomial(pairs, p) / pairs
        return abs(rates.mean(1) - 0.5) / (rates.std(1, ddof=1) / math.sqrt(seeds))

    return (t(0.5 + effect) > np.quantile(t(0.5), 0.95)).mean()


@pytest.mark.parametrize(
    "effect, seed_sd, pairs", [(0.05, 0.05, 256), (0.1, 0.05, 64), (0.03, 0.0, 512), (0.05, 0.1, 64)]
)
def test_so_many_seeds_have_the_power_that_was_asked_for(effect, seed_sd, pairs):
    rng, seeds = np.random.default_rng(0), seeds_needed(effect, seed_sd, pairs)
    assert power_of(effect, seed_sd, pairs, seeds, rng) > 0.77
    assert power_of(effect, seed_sd, pairs, max(2, round(0.7 * seeds)), rng) < 0.77


def test_so_many_pairs_have_the_power_that_was_asked_for():
    rng = np.random.default_rng(0)
    n = round(pairs_needed(0.1))
    wins = rng.binomial(n, 0.6, 20_000) / n
    assert (abs(wins - 0.5) > 1.96 * 0.5 / math.sqrt(n)).mean() == pytest.approx(0.8, abs=0.03)


def test_no_effect_is_never_seen_and_bad_input_is_refused():
    assert pairs_needed(0) == seeds_needed(0, 0.1, 9) == math.inf
    assert seeds_needed(-0.05, 0.05, 256) == seeds_needed(0.05, 0.05, 256)
    for bad in ({"seed_sd": -1}, {"pairs": 0.5}, {"level": 1.0}, {"power": 0}, {"effect": 0.6}, {"effect": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            seeds_needed(**({"effect": 0.1, "seed_sd": 0.1, "pairs": 9} | bad))
    for bad in (3.0, math.nan):
        with pytest.raises(ValueError, match=r"effect, a win-rate less a half, must lie in \[-0.5, 0.5\], got"):
            pairs_needed(bad)
    assert pairs_needed(1e-200) == math.inf


@pytest.mark.parametrize("freedom, known", [(2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_students_quantile(freedom, known):
    assert t_quantile(0.975, freedom) == pytest.approx(known, rel=0.04 if freedom < 4 else 0.003)


def test_win_rates_count_both_orders_and_ties_half():
    asked = []

    def judge(prompts, first, second):
        asked.append((first, second))
        return [{"good": 0.9, "same": 0.6, "bad": 0.2}[x] if x != "b" else {"good": 0.3, "same": 0.6, "bad": 0.7}[y]
                for x, y in zip(first, second)]  # fmt: skip

    a = ["good"] * 5 + ["same"] * 3 + ["bad"] * 2  # "same" is preferred by whoever stands first
    found = win_rate(["p"] * 10, a, ["b"] * 10, judge)
    assert found == WinRate(0.65, found.low, found.high, 5, 3, 2, 10)
    assert asked == [(a, ["b"] * 10), (["b"] * 10, a)] and found.low < 0.65 < found.high
    mirrored = win_rate(["p"] * 10, ["b"] * 10, a, judge)
    assert (mirrored.rate, mirrored.wins, mirrored.losses) == (pytest.approx(0.35), 2, 5)


def test_one_order_alone_decides_nothing():
    first = win_rate(["p"] * 7, ["a"] * 7, ["b"] * 7, lambda prompts, first, second: [1.0] * 7)
    assert first == WinRate(0.5, 0.5, 0.5, 0, 7, 0, 7)


@pytest.mark.parametrize("prompts, a, b", [([], [], []), (["p"], ["a", "b"], ["c"]), (["p", "q"], ["a"], ["c"])])
def test_lists_that_do_not_match_are_refused(prompts, a, b):
    with pytest.raises(ValueError, match="as long as each other and not empty"):
        win_rate(prompts, a, b, lambda *_: [1.0] * len(prompts))


@pytest.mark.parametrize(
    "said", [[1.0], [0.5, math.nan], [0.5, 1.5], [-0.1, 0.5], [0.5] * 3, [[0.5, 0.5]], None, 0.5, ["a", "b"]]
)
def test_preferences_that_are_none_are_refused(said):
    with pytest.raises(ValueError, match=r"2 numbers in \[0, 1\]"):
        win_rate(["p"] * 2, ["a"] * 2, ["b"] * 2, lambda *_: said)


def coverage(draw, interval, repeats=400):
    """Share of data sets whose interval holds a half."""
    rng = np.random.default_rng(0)
    return np.mean([low <= 0.5 <= high for low, high in (interval(draw(rng), i) for i in range(repeats))])


def test_the_interval_of_one_pair_of_policies_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(judge_module, "RESAMPLES", 1000)
    draw = lambda rng: rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.4, 0.3], size=64)  # noqa: E731

    def said(outcome, seed):
        return win_rate(["p"] * 64, list(outcome), [0.5] * 64, by_score(lambda _, texts: texts), seed=seed)[1:3]

    assert 0.92 <= coverage(draw, said) <= 0.98


@pytest.mark.parametrize("seeds", [4, 8])
def test_the_interval_over_seeds_covers_where_seeds_differ(seeds, monkeypatch):
    """256 prompts, win-rates of seeds with a standard deviation of .05; of one seed's interval it covers far less."""
    monkeypatch.setattr(judge_module, "RESAMPLES", 1000)

    def draw(rng):
        rates = rng.normal(0.5, 0.05, size=seeds)
        return [(rng.random(256) < rate).astype(float) for rate in rates]

    both = coverage(draw, lambda found, seed: win_rate_of_seeds(found, seed=seed)[1:])
    prompts = coverage(draw, lambda found, seed: bootstrap_interval(np.concatenate(found), seed=seed))
    assert 0.92 <= both <= 0.98 and prompts < 0.8


def test_prompts_are_drawn_for_all_seeds_together(monkeypatch):
    """Some prompts are won by all seeds and others by none: eight seeds tell no more of that than one does."""
    monkeypatch.setattr(judge_module, "RESAMPLES", 1000)

    def draw(rng):
        easy = np.clip(rng.normal(0.5, 0.4, size=128), 0, 1)
        return [(rng.random(128) < easy).astype(float) for _ in range(8)]

    assert 0.92 <= coverage(draw, lambda found, seed: win_rate_of_seeds(found, seed=seed)[1:]) <= 0.99


def test_seeds_must_be_comparable():
    assert win_rate_of_seeds([[1.0] * 9, [0.0] * 9])[0] == 0.5
    for bad in ([[1.0]], [[1.0], [1.0, 0.0]], [[], []]):
        with pytest.raises(ValueError, match="equally many outcomes of at least 2 seeds"):
            win_rate_of_seeds(bad)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        win_rate(["p"] * 2, [1.0, math.nan], [0.5] * 2, by_score(lambda _, scores: scores))


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer answer, in the words of a chatty model."""

    heard: ClassVar[list] = []

    def do_POST(self):
        """One chat completion."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append((self.path, self.headers["Authorization"], asked["model"]))
        text = asked["messages"][0]["content"]
        a, b = text.split("Answer A:\n")[1].split("\n\nReply")[0].split("\n\nAnswer B:\n")
        better = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
        said = "no idea" if "?" in a else f'Sure!\n```json\n{{"better": "{better}"}}\n```'
        body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/"
    server.shutdown()
    server.server_close()


def test_a_language_model_behind_an_endpoint_judges(url):
    Endpoint.heard.clear()
    judge = endpoint_judge(url, "some-model", key="secret")
    found = win_rate(["p", "q {x}", "r"], ["long {y}", "s", "same"], ["x", "long", "also"], judge)
    assert found[3:] == (1, 1, 1, 3)
    assert set(Endpoint.heard) == {("/v1/chat/completions", "Bearer secret", "some-model")} and len(Endpoint.heard) == 6
    with pytest.raises(RuntimeError, match=r'"better": "A".*no idea'):
        judge(["p"], ["what?"], ["b"])
    with pytest.raises(OSError):
        endpoint_judge("http://127.0.0.1:9/v1", "m")(["p"], ["a"], ["b"])


def test_finished_runs_are_judged_from_the_command_line(url, tmp_path, monkeypatch, capsys):
    """Two prompts with two completions each: intervals are over prompts."""
    from klq_edu.app.judging import JudgeConfig, run_judge

    def save(name, updates=3, **texts):
        tables = {when: [{"prompt": "pq"[i // 2], "completion": t, "length": len(t)} for i, t in enumerate(found)]
                  for when, found in zip(("0", "3"), texts.values())}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_samples.json").write_text(json.dumps(tables))
        (tmp_path / name / "config.json").write_text(json.dumps({"updates": updates}))

    save("klq", before=["a", "bb", "c", "d"], after=["aaa", "bbb", "c", "ddd"])
    save("ppo", before=["a", "bb", "c", "d"], after=["aaaa", "b", "cc", "ddd"])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    run_judge(JudgeConfig(tmp_path / "klq", "some-model", url=url))
    said = capsys.readouterr().out
    assert "win-rate 0.875 [0.750, 1.000] (95 %, over 2 prompts)" in said and "wins 3, ties 1, losses 0" in said
    assert "the longer in 1.00" in said and Endpoint.heard[-1][1] == "Bearer secret"
    run_judge(JudgeConfig(tmp_path / "klq", "some-model", rival=tmp_path / "ppo", url=url))
    assert "klq against ppo, before some-model:\nwin-rate 0.375" in capsys.readouterr().out
    save("brief", before=["a", "b", "c", "d"], after=["b", "c", "d", "e"])
    run_judge(JudgeConfig(tmp_path / "brief", "some-model", url=url))
    said = capsys.readouterr().out
    assert "ties 4" in said and "the longer" not in said, "no two lengths differ"
    save("other", before=["a"], after=["a"])
    save("unfinished", updates=9, before=["a", "bb", "c", "d"], after=["aaaa", "b", "cc", "ddd"])
    for rival, message in (
        (tmp_path / "other", "same held-out prompts"),
        (tmp_path / "unfinished", "must be folders of finished runs"),  # tested after 3 of 9 updates so far
        (tmp_path / "nowhere", "has no test_samples"),
    ):
        with pytest.raises(ValueError, match=message):
            run_judge(JudgeConfig(tmp_path / "klq", "some-model", rival=rival, url=url))


def test_the_interval_over_seeds_is_wider_by_what_a_bootstrap_of_few_seeds_lacks():
    """Two seeds, one always wins and one never: resampled means reach from 0 to 1, widened by √2 about ½."""
    rate, low, high = win_rate_of_seeds([[1.0] * 4, [0.0] * 4])
    assert (rate, low, high) == pytest.approx((0.5, 0.5 - 0.5**0.5, 0.5 + 0.5**0.5))
    (low, high), (middle, upper) = bootstrap_interval(range(9)), bootstrap_interval(range(9), level=0.5)
    assert low < middle < 4 < upper < high, "… and narrower at a lower level"


def test_seed_level_and_power_are_those_asked_for():
    """At a level of 90 % with power 0.9: z = 1.645 + 1.282, and z² / (4 · 0.1²) = 214 pairs."""
    assert round(pairs_needed(0.1, level=0.9, power=0.9)) == 214
    assert seeds_needed(0.1, 0.3, 64, level=0.9, power=0.9) == math.ceil(8.564 / 0.01 * (0.09 + 1 / 256) + 1.353)
    outcome = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 64)
    higher = by_score(lambda _, scores: scores)
    ways = (
        lambda **given: win_rate(["p"] * 64, list(outcome), [0.5] * 64, higher, **given)[1:3],
        lambda **given: win_rate_of_seeds([outcome, outcome[::-1]], **given)[1:],
        lambda **given: bootstrap_interval(outcome, **given),
    )
    for interval in ways:
        assert interval(seed=1) == interval(seed=1) != interval(seed=2)
        (low, high), (inner, upper) = interval(), interval(level=0.5)
        assert low < inner < upper < high
