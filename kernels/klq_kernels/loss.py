"""Q, the KLQ loss that fits it, and the one table of that loss's variants.

`VARIANTS` says which errors compete, what is made of the worst, and what a caller must give. The loss (`klq_loss`,
differentiable) and its derivatives in closed form (`klq_terms`, for fused passes) read it: a new variant is one entry.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import checks
from klq_kernels.types import LossInputs, LossSettings, Residuals, TokenStats, cast, clean, zero_unless


def q_values(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, tau: float) -> Tensor:
    """Q(s,a) = τ log(π(a|s)/π_b(a|s)) + V(s): a language model and a value head *are* an action-value function (13).

    All of one shape [...]; τ > 0 in units of reward per nat. Source: arXiv 2508.17000, eq. (13).

    >>> q_values(torch.tensor(-1.0), torch.tensor(-1.5), torch.tensor(2.0), tau=0.2)
    tensor(2.1000)
    """
    checks.positive(tau=tau)
    checks.alike(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    logprobs, ref_logprobs, values = cast(logprobs, ref_logprobs, values)
    return tau * (logprobs - ref_logprobs) + values


def q_of(stats: TokenStats | Residuals, values: Tensor | None, tau: float, mask: Tensor) -> Tensor | None:
    """Q (13) [...] of statistics that are 0 where masked, as Q then is; None without values."""
    return None if values is None else q_values(stats.logprob, stats.ref_logprob, zero_unless(mask, values), tau)


def add_q(stats: Residuals, values: Tensor | None, tau: float, mask: Tensor) -> Residuals:
    """The residuals [N] with Q (13), 0 where masked, if there are values [N]."""
    return stats if values is None else stats._replace(q=q_of(stats, values, tau, mask))


def klq_loss(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, targets: Tensor, mask: Tensor, *, tau: float,
    loss: str = "l2", clip: float | None = None, log_ratio_clip: float | None = None, delta: float | None = None,
    old_logprobs: Tensor | None = None, old_values: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The KLQ regression loss ½(Q_θ − Ĝ)² and its robust and clipped variants, averaged over unmasked tokens.

    With ℓ = logprob − ref_logprob, Q = τℓ + V, e = Q − Ĝ and, from the old policy, ℓ_old and Q_old = τℓ_old + V_old:

        l2              ½ e²                                                                        (6)
        huber           ½ e² if |e| ≤ delta, else delta (|e| − ½ delta)
        value_clipped   ½ max[e², (clamp(Q, Q_old ± clip) − Ĝ)²]
        ratio_clipped   ½ max[e², (V + τ clamp(ℓ, ℓ_old ± log_ratio_clip) − Ĝ)²]
        double_clipped  the maximum of all three

    Shapes: every tensor alike ([B, T] or [N]). Ranges: τ, clip, log_ratio_clip, delta > 0. Gradients flow through
    `logprobs` and `values` only. reduction "mean" gives the masked mean (0 if nothing is unmasked), "none" the
    per-token losses, zero where masked.

    Raises ValueError naming the argument for an unknown variant, a missing or non-positive threshold, a missing old
    quantity, or shapes that disagree. Source: arXiv 2508.17000, eq. (6); variants as in the authors' code, each with ½.

    >>> t = lambda *xs: torch.tensor([xs])
    >>> klq_loss(t(-1., -2.), t(-1., -1.), t(.5, .5), t(1., 1.), t(True, True), tau=0.5)
    tensor(0.3125)
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    inputs = LossInputs(logprobs, ref_logprobs, values, targets, mask, old_logprobs, old_values)
    settings = LossSettings(tau, loss, clip, log_ratio_clip, delta)
    check_settings(settings, inputs)
    old = checks.optional(old_logprobs=old_logprobs, old_values=old_values)
    checks.alike(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, targets=targets, mask=mask, **old)
    error = _worst(inputs, settings).error  # Q − Ĝ, or what clipping makes of it where that is worse
    terms = VARIANTS[loss].value(error, settings)  # ½ error², but for huber
    return masked_mean(terms, mask) if reduction == "mean" else terms


def klq_terms(inputs: LossInputs, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of `klq_loss`, and its derivatives in each log-prob and value: f'(e) ∂e/∂log π and f'(e) ∂e/∂V,
    where e is the worst of the variant's errors and f what the variant makes of it.

    Shapes: inputs [N] -> [], [N], [N]; zero where masked. Source: arXiv 2508.17000, eq. (6), differentiated.
    """
    worst, variant = _worst(inputs, settings), VARIANTS[settings.loss]
    slope = variant.slope(worst.error, settings)
    return variant.value(worst.error, settings).sum(), slope * worst.dlogprob, slope * worst.dvalue


class Candidate(NamedTuple):
    """An error e that competes in a loss, with ∂e/∂log π and ∂e/∂V: nothing passes a clamp that binds."""

    error: Tensor
    dlogprob: Tensor
    dvalue: Tensor


def plain_error(x: LossInputs, s: LossSettings) -> Candidate:
    """e = Q − Ĝ of tensors [...]. Source: arXiv 2508.17000, eqs. (6), (13)."""
    q = q_values(x.logprobs, x.ref_logprobs, x.values, s.tau)
    one = torch.ones_like(q)
    return Candidate(q - x.targets, s.tau * one, one)


def value_clipped_error(x: LossInputs, s: LossSettings) -> Candidate:
    """e = clamp(Q, Q_old ± clip) − Ĝ of tensors [...]: Q moves only so far per update. Source: the authors' code."""
    q = q_values(x.logprobs, x.ref_logprobs, x.values, s.tau)
    near = clamp_around(q, q_values(x.old_logprobs, x.ref_logprobs, x.old_values, s.tau), s.clip)
    free = (near == q).to(q.dtype)
    return Candidate(near - x.targets, s.tau * free, free)


def ratio_clipped_error(x: LossInputs, s: LossSettings) -> Candidate:
    """e = V + τ clamp(ℓ, ℓ_old ± log_ratio_clip) − Ĝ of tensors [...]: as PPO's ratio. Source: the authors' code."""
    near = clamp_around(x.logprobs, x.old_logprobs, s.log_ratio_clip)
    free = (near == x.logprobs).to(near.dtype)
    error = q_values(near, x.ref_logprobs, x.values, s.tau) - x.targets
    return Candidate(error, s.tau * free, torch.ones_like(free))


def _huber(e: Tensor, s: LossSettings) -> Tensor:
    """½ e² if |e| ≤ delta, else delta (|e| − ½ delta)."""
    return torch.where(e.abs() <= s.delta, 0.5 * e**2, s.delta * (e.abs() - 0.5 * s.delta))


class Variant(NamedTuple):
    """Errors of which the worst counts, thresholds and old quantities that they need, what is made of it: f and f'."""

    candidates: tuple[Callable[[LossInputs, LossSettings], Candidate], ...]
    thresholds: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    value: Callable[[Tensor, LossSettings], Tensor] = lambda e, s: 0.5 * e**2
    slope: Callable[[Tensor, LossSettings], Tensor] = lambda e, s: e


OLD_Q = ("old_logprobs", "old_values")
VARIANTS = {
    "l2": Variant((plain_error,)),
    "huber": Variant((plain_error,), ("delta",), (), _huber, lambda e, s: e.clamp(-s.delta, s.delta)),
    "value_clipped": Variant((plain_error, value_clipped_error), ("clip",), OLD_Q),
    "ratio_clipped": Variant((plain_error, ratio_clipped_error), ("log_ratio_clip",), ("old_logprobs",)),
    "double_clipped": Variant(
        (plain_error, value_clipped_error, ratio_clipped_error), ("clip", "log_ratio_clip"), OLD_Q
    ),
}
LOSSES = tuple(VARIANTS)


def check_settings(settings: LossSettings, inputs: LossInputs) -> None:
    """Every variant gets the thresholds and old quantities (of any shape) that it needs, or an error names what is
    missing: ValueError for an unknown variant and for what is None, as `checks.positive` for τ and thresholds."""
    if settings.loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {settings.loss!r}")
    thresholds = dict(clip=settings.clip, log_ratio_clip=settings.log_ratio_clip, delta=settings.delta)
    checks.positive(tau=settings.tau, **checks.optional(**thresholds))
    given, variant = thresholds | inputs._asdict(), VARIANTS[settings.loss]
    for name in variant.thresholds + variant.old:
        if given[name] is None:
            raise ValueError(f"loss={settings.loss!r} needs {name}, got None")


def _worst(inputs: LossInputs, settings: LossSettings) -> Candidate:
    """Of each token's candidates that of the largest |e|, of equals the first: an idle clamp changes nothing.
    Masked tokens count as zeros, and only the new log-probs and values keep their graph."""
    given = checks.optional(**inputs._replace(mask=None)._asdict())
    given = {name: x if name in ("logprobs", "values") else x.detach() for name, x in given.items()}
    inputs = inputs._replace(**dict(zip(given, clean(inputs.mask, *given.values()), strict=True)))
    worst, *others = (make(inputs, settings) for make in VARIANTS[settings.loss].candidates)
    for other in others:
        worse = other.error.abs() > worst.error.abs()
        worst = Candidate(*(torch.where(worse, x, y) for x, y in zip(other, worst, strict=True)))
    return worst


def clamp_around(x: Tensor, centre: Tensor, radius: float) -> Tensor:
    """x, but at most `radius` away from `centre`. Shapes: [...], [...] -> [...].

    Source: the value clipping of PPO implementations (Engstrom et al. 2020, "Implementation matters").
    """
    checks.positive(radius=radius)
    checks.alike(x=x, centre=centre)
    x, centre = cast(x, centre)
    return torch.minimum(torch.maximum(x, centre - radius), centre + radius)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [...] over entries where mask, of x's shape, is True; 0 (with zero gradient) where there are none.

    >>> masked_mean(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(2.)
    """
    checks.alike(x=x, mask=mask)
    return clean(mask, x)[0].sum() / mask.sum().clamp(min=1)
