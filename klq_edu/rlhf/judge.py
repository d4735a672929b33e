"""Comparing policies before a judge: win-rates with intervals, and what a judge may lean to.

A judge is a callable f(prompts, first, second) -> preferences for the first, in [0, 1]. It is asked in both orders.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Judge = Callable[[list[str], list[str], list[str]], Sequence[float]]
RESAMPLES = 10_000  # of a bootstrap


class WinRate(NamedTuple):
    """Of n comparisons: the share won, a tie counting half, its interval, and the counts."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int


def win_rate(
    prompts: list[str], a: list[str], b: list[str], judge: Judge, *, seed: int = 0, level: float = 0.95
) -> WinRate:  # fmt: skip
    """How often completions `a` beat `b` after the same prompts: (wins + ½ ties)/n, with a percentile bootstrap over
    prompts.

    Each pair is judged in both orders and the preferences for `a` are averaged: above ½ is a win, ½ a tie. The interval
    is conditional on the two policies that wrote a and b: it says nothing of other seeds (see `win_rate_of_seeds`).
    Raises ValueError for lists of other lengths or empty ones, and for preferences that are not n numbers in [0, 1].

    >>> longer = lambda prompts, first, second: [float(len(x) > len(y)) for x, y in zip(first, second)]
    >>> win_rate(["p"] * 4, ["long", "long", "x", "y"], ["s", "s", "long", "longer"], longer)[:1]
    (0.5,)
    """
    outcome = outcomes(prompts, a, b, judge)
    low, high = bootstrap_interval(outcome, seed=seed, level=level)
    wins, ties = int((outcome == 1).sum()), int((outcome == 0.5).sum())
    return WinRate(outcome.mean().item(), low, high, wins, ties, len(outcome) - wins - ties, len(outcome))


def win_rate_of_seeds(
    by_seed: Sequence[Sequence[float]], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean win-rate over seeds of training and its interval (rate, low, high): seeds are resampled, then prompts.

    `by_seed` holds the `outcomes` of every seed, [seeds, n], on the same n prompts, which therefore are drawn for all
    seeds together. The interval is widened by √(S/(S−1)), by which a bootstrap of S seeds is too narrow. ValueError for
    fewer than two seeds or other than equal numbers of outcomes.
    """
    if len(by_seed) < 2 or len({len(o) for o in by_seed}) > 1 or not len(by_seed[0]):
        raise ValueError(
            f"by_seed must hold equally many outcomes of at least 2 seeds, got {[len(o) for o in by_seed]}"
        )
    found, rng = np.asarray([list(o) for o in by_seed], dtype=float), np.random.default_rng(seed)
    seeds, n = found.shape
    shares = (rng.multinomial(count, [1 / count] * count, size=RESAMPLES) / count for count in (seeds, n))
    rates = np.einsum("rs,sn,rn->r", next(shares), found, next(shares), optimize=True)
    rate, widened = found.mean(), (seeds / (seeds - 1)) ** 0.5
    return float(rate), *(float(rate + widened * (x - rate)) for x in _interval(rates, level))


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values."""
    return _interval(_resampled(np.asarray(values, dtype=float), np.random.default_rng(seed)), level)


def outcomes(prompts: list[str], a: list[str], b: list[str], judge: Judge) -> np.ndarray:
    """1 where `a` wins, ½ for a tie, 0 where `b` does, [n]; see `win_rate`."""
    if not len(prompts) == len(a) == len(b) or not len(prompts):
        found = f"{len(prompts)}, {len(a)} and {len(b)}"
        raise ValueError(f"prompts, a and b must be as long as each other and not empty, got {found}")
    first, second = (_preferences(judge, prompts, *pair) for pair in ((a, b), (b, a)))
    return np.where(first > second, 1.0, np.where(first < second, 0.0, 0.5))


def _preferences(judge: Judge, prompts: list[str], first: list[str], second: list[str]) -> np.ndarray:
    answer = judge(list(prompts), list(first), list(second))
    try:
        answer = list(answer)
        found = np.asarray(answer, dtype=float)
    except (TypeError, ValueError):
        found = np.array(np.nan)  # no list, or not of numbers
    if found.shape != (len(prompts),) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"the judge must return {len(prompts)} numbers in [0, 1], got {answer!s:.100}")
    return found


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples: how often each value is drawn is multinomial."""
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct / len(values)


def _interval(samples: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    return tuple(np.quantile(samples, [(1 - level) / 2, (1 + level) / 2]).tolist())


def by_score(score: Callable[[list[str], list[str]], Sequence[float]]) -> Judge:
    """The judge that prefers what score(prompts, completions) rates higher."""

    def judge(prompts, first, second):
        """1, ½ or 0, as the first scores higher, the same or lower."""
        x, y = (np.asarray(score(prompts, texts), dtype=float) for texts in (first, second))
        return preferred(x, y).tolist()  # NaN where a score is none, which is refused

    return judge


def preferred(x, y):
    """1 where x > y, ½ where they are equal, 0 where x < y, NaN where one is; arrays or columns of scores."""
    return (np.sign(x - y) + 1) / 2


def copied(completion: str, source: str) -> float:
    """The share of its word triples that stand in the source, in [0, 1].

    >>> copied("A cat sat on it.", "the cat sat on the mat")
    0.3333333333333333
    """
    said, known = (list(zip(w, w[1:], w[2:])) for w in (words_of(completion), words_of(source)))
    return sum(map(set(known).__contains__, said)) / max(len(said), 1)


def words_of(text: str) -> list[str]:
    """Its words in lower case."""
    return re.findall(r"[a-z0-9']+", text.lower())
