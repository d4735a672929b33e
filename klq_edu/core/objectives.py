"""Losses per token, then ONE masked mean: KLQ, PPO-clip, PPO-penalty and the value loss PPO adds.

`klq_loss` is defined beside the kernels that compute it and re-exported here. Tensors are [B, T] or [N]; gradients
flow through `logprobs`, `values` and `kl` only. Masked entries may be NaN. ValueError for shapes that disagree, a
threshold or coefficient ≤ 0.
"""

import torch
from torch import Tensor

from klq_kernels import checks
from klq_kernels.loss import LOSSES
from klq_kernels.reference import clamp_around, clean, klq_loss, masked_mean

__all__ = ["LOSSES", "klq_loss", "masked_mean", "ppo_clip_loss", "ppo_penalty_loss", "value_loss"]


def ppo_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> Tensor:
    """PPO-clip: −E[min(ρÂ, clamp(ρ, 1 ± clip) Â)], ρ = π/π_old (Schulman et al. 2017, eq. 7).

    >>> one = torch.ones(1, 1)
    >>> ppo_clip_loss(0 * one, -one, one, one.bool(), clip=0.2)
    tensor(-1.2000)
    """
    checks.positive(clip=clip)
    ratio, _, gain = _ratio(logprobs, old_logprobs, advantages, mask)
    return masked_mean(-torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain), mask)


def ppo_penalty_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, coef: float, kl: Tensor | None = None
) -> Tensor:
    """PPO-penalty: −E[ρÂ] + coef · KL(π ‖ π_old). KLQ's counterpart has coef = τ + β = τ/α, *not* β.

    `kl` is the exact per-token D(π ‖ π_old)(s_t) where it is at hand (from `token_stats` against the old policy);
    without it, samples a ~ π_old estimate it by ρ log ρ − ρ + 1: never negative, and unbiased in value and gradient.
    Source: Schulman et al. 2017, eq. 8; arXiv 2508.17000 (18).

    >>> one = torch.ones(1, 1)
    >>> ppo_penalty_loss(0 * one, 0 * one, one, one.bool(), coef=0.25)
    tensor(-1.)
    """
    checks.positive(coef=coef)
    ratio, log_ratio, gain, *kl = _ratio(logprobs, old_logprobs, advantages, mask, **checks.optional(kl=kl))
    (kl,) = kl or (ratio * log_ratio - torch.expm1(log_ratio),)
    return masked_mean(coef * kl - ratio * gain, mask)


def value_loss(
    values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None, old_values: Tensor | None = None
) -> Tensor:
    """½E(V − G)², G = V_old + Â; with `clip`, PPO's pessimistic ½E max[(V − G)², (clamp(V, V_old ± clip) − G)²].

    >>> value_loss(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([True]))
    tensor(2.)
    """
    checks.alike(values=values, returns=returns, mask=mask, **checks.optional(old_values=old_values))
    old_values = values if old_values is None and clip is None else old_values
    if old_values is None:
        raise ValueError("value_loss with clip needs old_values, got None")
    values, returns, centre = clean(mask, values, returns.detach(), old_values.detach())
    squares = (values - returns) ** 2
    if clip is not None:
        checks.positive(clip=clip)
        squares = torch.maximum(squares, (clamp_around(values, centre, clip) - returns) ** 2)
    return masked_mean(0.5 * squares, mask)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **more: Tensor) -> list[Tensor]:
    """ρ = π/π_old, log ρ, Â (1, 0 and 0 where masked) and any more per-token tensors, after checking shapes."""
    checks.alike(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, **more)
    new, old, *rest = clean(mask, logprobs, old_logprobs.detach(), advantages.detach(), *more.values())
    return [(new - old).exp(), new - old, *rest]
