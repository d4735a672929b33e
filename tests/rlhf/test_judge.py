"""How many seeds and pairs a comparison needs, against simulated comparisons."""

import math

import numpy as np
import pytest

from klq_edu.rlhf.judge import pairs_needed, seeds_needed, t_quantile


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
