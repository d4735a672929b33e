"""Comparing two policies before a judge: how many pairs and seeds it takes to see a difference that is really there."""

import math
from statistics import NormalDist

from klq_kernels import checks


def pairs_needed(effect: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """Independent pairs after which a win-rate of ½ + effect is told from ½, for two fixed policies: z² / (4 effect²)
    with z = z_{(1+level)/2} + z_power. Infinity for an effect of 0; a number of pairs, not rounded.

    >>> round(pairs_needed(0.05)), round(pairs_needed(0.02))
    (785, 4906)
    """
    _, z = _quantiles(level, power)
    return math.inf if effect == 0 else z**2 / (4 * effect**2)


def seeds_needed(
    effect: float, seed_sd: float, pairs: int, *, level: float = 0.95, power: float = 0.8
) -> float:  # fmt: skip
    """Seeds of training with which a mean win-rate of ½ + effect is told from ½, each judged on so many pairs.

    The win-rates of single seeds scatter by √(seed_sd² + 1/(4 pairs)); Guenther's correction for a t-test at small
    numbers (1981) is added. Infinity for an effect of 0, otherwise a whole number. ValueError unless 0 ≤ seed_sd and
    pairs ≥ 1.

    >>> seeds_needed(0.05, seed_sd=0.05, pairs=256)
    13
    """
    checks.non_negative(seed_sd=seed_sd)
    checks.positive(pairs=pairs)
    critical, z = _quantiles(level, power)
    if effect == 0:
        return math.inf
    return math.ceil((z / effect) ** 2 * (seed_sd**2 + 1 / (4 * pairs)) + critical**2 / 2)


def _quantiles(level: float, power: float) -> tuple[float, float]:
    """z of a two-sided test at this level, and that plus z of the power; ValueError unless both lie in (0, 1)."""
    for name, x in {"level": level, "power": power}.items():
        if not 0 < x < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {x}")
    critical = NormalDist().inv_cdf((1 + level) / 2)
    return critical, critical + NormalDist().inv_cdf(power)
