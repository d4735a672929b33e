"""How many pairs of completions, and seeds of training, it takes to see a difference that is really there."""

import math
from statistics import NormalDist

from klq_kernels import checks


def pairs_needed(effect: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """Independent pairs after which a win-rate of ½ + effect is told from ½, for two fixed policies: z² / (4 effect²)
    with z = z_{(1+level)/2} + z_power. Not rounded; infinity for an effect of 0. ValueError beyond ±½.

    >>> round(pairs_needed(0.05)), round(pairs_needed(0.02))
    (785, 4906)
    """
    _, z = _quantiles(effect, level, power)
    return z**2 / 4 / effect**2 if abs(effect) > 1e-9 else math.inf


def seeds_needed(effect: float, seed_sd: float, pairs: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """Seeds of training with which a mean win-rate of ½ + effect is told from ½, each judged on so many pairs.

    The win-rates of single seeds scatter by √(seed_sd² + 1/(4 pairs)); Guenther's correction for a t-test at small
    numbers (1981) is added. A whole number; infinity for an effect of 0. ValueError unless −½ ≤ effect ≤ ½, seed_sd ≥ 0
    and pairs ≥ 1.

    >>> seeds_needed(0.05, seed_sd=0.05, pairs=256)
    13
    """
    checks.non_negative(seed_sd=seed_sd)
    if not pairs >= 1:
        raise ValueError(f"pairs must be >= 1, got {pairs}")
    critical, z = _quantiles(effect, level, power)
    if abs(effect) <= 1e-9:
        return math.inf
    return math.ceil((z / effect) ** 2 * (seed_sd**2 + 1 / (4 * pairs)) + critical**2 / 2)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t from the normal one, by Cornish and Fisher's expansion: to 0.1 % from 9 degrees of
    freedom on, to 3 % at 2.

    >>> round(t_quantile(0.975, 9), 2)
    2.26
    """
    z = NormalDist().inv_cdf(probability)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def _quantiles(effect: float, level: float, power: float) -> tuple[float, float]:
    """z of a two-sided test at this level, and that plus z of the power; ValueError for what is out of range."""
    if not abs(effect) <= 0.5:
        raise ValueError(f"effect, a win-rate less a half, must lie in [-0.5, 0.5], got {effect}")
    for name, x in {"level": level, "power": power}.items():
        if not 0 < x < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {x}")
    critical = NormalDist().inv_cdf((1 + level) / 2)
    return critical, critical + NormalDist().inv_cdf(power)
