"""TD errors, λ-returns and GAE in the forms a reader meets them in; the recursion itself is `lambda_returns`.

Tensors are [B, T] with right-padded boolean masks, as in `klq_kernels.lambda_returns`; nothing broadcasts, results are
float64 if every tensor is. ValueError for shapes that disagree, a mask with holes, γ or λ outside [0, 1].
"""

import torch
from torch import Tensor

from klq_kernels import LambdaReturns, checks, lambda_returns
from klq_kernels.reference import cast, clean, masked_mean, q_values

__all__ = ["LambdaReturns", "lambda_returns", "gae", "kl_shaped_rewards", "forward_view", "retrace_weights", "whiten"]


def kl_shaped_rewards(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, tau: float) -> Tensor:
    """RLHF's reward with its KL penalty: r_{t+1} − τ log(π(a_t|s_t)/π_b(a_t|s_t))."""
    checks.alike(rewards=rewards, logprobs=logprobs, ref_logprobs=ref_logprobs)
    rewards, logprobs, ref_logprobs = cast(rewards, logprobs, ref_logprobs)
    return rewards - q_values(logprobs, ref_logprobs, torch.zeros_like(rewards), tau)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation as in Schulman et al. 2016, written from PPO's side.

    δ_t = r_{t+1} + γ V_{t+1} − V_t and Â_t = Σ_k (γλ)^k δ_{t+k}, V = 0 after the last real token. On KL-shaped rewards
    it *is* KLQ's Δ (claim 1 of the equivalence). [B, T] -> [B, T], zero where masked.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2).bool(), lam=1.0)
    tensor([[0.5000, 0.5000]])
    """
    checks.unit_interval(gamma=gamma, lam=lam)
    checks.alike(rewards=rewards, values=values, mask=mask)
    checks.right_padded(mask)
    rewards, values = clean(mask, rewards, values)
    advantages, tail, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        tail = delta + gamma * lam * tail
        advantages[:, t], next_value = tail, values[:, t]
    return advantages


def forward_view(td_errors: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Δ_t = Σ_{k≥0} (γλ)^k δ_{t+k}, written out: O(T²), independent of the recursion it must equal. [B, T] -> same."""
    checks.unit_interval(gamma=gamma, lam=lam)
    checks.alike(td_errors=td_errors, mask=mask)
    checks.right_padded(mask)
    (td_errors,) = clean(mask, td_errors)
    steps = torch.arange(td_errors.shape[1], device=td_errors.device)
    gap = steps[None, :] - steps[:, None]  # [t, t+k] -> k
    weights = torch.where(gap >= 0, (gamma * lam) ** gap.clamp(min=0).to(td_errors.dtype), 0.0)
    return torch.where(mask, td_errors @ weights.T, 0.0)


def retrace_weights(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """c_t = min(1, π(a_t|s_t)/μ(a_t|s_t)) for tokens drawn from an older policy μ (Retrace, Munos et al. 2016)."""
    checks.alike(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    logprobs, behaviour_logprobs = cast(logprobs, behaviour_logprobs)
    return (logprobs - behaviour_logprobs).exp().clamp(max=1.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and standard deviation 1 over unmasked entries, 0 elsewhere.

    A PPO habit offered here as an ablation: centring Δ breaks the equivalence of KLQ and PPO.
    """
    checks.alike(x=x, mask=mask)
    (x,) = clean(mask, x)
    centred = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return centred / (masked_mean(centred**2, mask).sqrt() + 1e-8)
