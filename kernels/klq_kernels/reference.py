"""The one definition of every formula that a kernel computes: naive PyTorch, any device, any floating dtype.

Everything here follows the conventions of KLQ (arXiv 2508.17000): index t holds the action a_t = y_{t+1}, the value
V(s_t) and the reward r_{t+1}; the mask is True on real completion tokens. Tensors have one shape, nothing broadcasts;
`types` holds the rule for dtypes and masked entries, `loss` the loss. Both are to be had from here.
"""

import torch
from torch import Tensor

from klq_kernels import checks
from klq_kernels.loss import clamp_around, klq_loss, masked_mean, q_values  # noqa: F401
from klq_kernels.types import INF, LambdaReturns, TokenStats, cast, clean, narrow, result_dtype, zero_unless


def token_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None = None, *, temperature: float = 1.0,
    mask: Tensor | None = None,
) -> TokenStats:  # fmt: skip
    """`klq_kernels.token_stats` by its formulas, with every [..., V] tensor spelled out: softmax, log-prob, entropy and
    exact KL (source: arXiv 2508.17000, eq. (2))."""
    checks.positive(temperature=temperature)
    checks.logits(logits, tokens, mask, ref_logits)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    checks.token_ids(tokens, mask, logits.shape[-1])
    tokens = torch.where(mask, tokens, 0).long()

    dtype = result_dtype(logits, ref_logits)
    logp = _log_softmax(logits.to(dtype), temperature, mask)
    logprob = _pick(logp, tokens, mask)
    p = logp.exp()
    entropy = zero_unless(mask, -(p * torch.where(p == 0, 0.0, logp)).sum(-1))  # 0 log 0 = 0
    if ref_logits is None:
        return TokenStats(logprob, entropy, None, None)
    logq = _log_softmax(ref_logits.detach().to(dtype), temperature, mask)
    return TokenStats(logprob, entropy, _pick(logq, tokens, mask), zero_unless(mask, kl_divergence(logp, logq)))


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, *, bias: Tensor | None = None, ref_bias: Tensor | None = None,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> TokenStats:  # fmt: skip
    """`klq_kernels.linear_token_stats` with both [..., V] logits in memory (source: arXiv 2508.17000, eq. (2))."""
    checks.heads(hidden, weight, tokens, ref_hidden, ref_weight, bias, ref_bias, mask)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    hidden, weight, bias, *ref = narrow(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    logits = _project(hidden, weight, bias, mask)
    ref_logits = None if ref_hidden is None else _project(*ref, mask)
    return token_stats(logits, tokens, ref_logits, temperature=temperature, mask=mask)


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """Exact D(p ‖ q) over the last axis from normalised log-probabilities.

    Computed as the Bregman sum Σ_v [q_v − p_v + p_v log(p_v/q_v)] = Σ_v p_v (e^{−d_v} − 1 + d_v), d = log(p/q). Since
    Σp = Σq = 1 it equals Σ p log(p/q), but no term is negative and rounding errors in the normalisers cancel to first
    order: float32 keeps a KL of 1e−8 that Σ p log(p/q) loses entirely. A token with p > 0 = q makes the sum +inf, and
    such a row passes no gradient.

    Shapes: [..., V], [..., V] -> [...]. Units: nats. Source: arXiv 2508.17000, eq. (2); e^{−d} − 1 + d is the estimator
    k3 of Schulman 2020, "Approximating KL divergence".

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(kl_divergence(p.log(), q.log()).item(), 4)
    0.1438
    """
    checks.alike(logp=logp, logq=logq)
    logp, logq = cast(logp, logq)
    p, q = logp.exp(), logq.exp()
    d = torch.where((p > 0) & (logq != -INF), logp - logq, 0.0)  # and NaN stays
    near = (d.abs() < 1) & (p > 0)
    d_near = torch.where(near, d, 0.0)
    terms = torch.where(near, p * (torch.expm1(-d_near) + d_near).clamp_min(0), q - p + p * d)
    return torch.where(((p > 0) & (logq == -INF)).any(-1), INF, terms.sum(-1))


@torch.no_grad()
def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, tau: float,
    gamma: float = 1.0, lam: float = 0.95, alpha: float = 1.0, trace_weights: Tensor | None = None,
) -> LambdaReturns:  # fmt: skip
    """`klq_kernels.lambda_returns` by its recursion, a Python loop over time; all [B, T] (arXiv 2508.17000, eqs. (7),
    (14))."""
    given = dict(rewards=rewards, values=values, logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    checks.returns(**given, trace_weights=trace_weights, tau=tau, gamma=gamma, lam=lam, alpha=alpha)
    checks.right_padded(mask)
    weights = torch.ones_like(rewards) if trace_weights is None else trace_weights
    r, v, logp, logq, c = clean(mask, rewards, values, logprobs, ref_logprobs, weights)

    q = q_values(logp, logq, v, tau)
    td_errors = zero_unless(mask, r + gamma * shift_left(v) - q)
    decay = gamma * lam * shift_left(c)
    advantages = torch.zeros_like(td_errors)
    tail = td_errors.new_zeros(len(td_errors))
    for t in reversed(range(td_errors.shape[1])):
        tail = td_errors[:, t] + decay[:, t] * tail
        advantages[:, t] = tail
    return LambdaReturns(zero_unless(mask, q + alpha * advantages), advantages, td_errors)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Logits [..., V] of hidden states whose masked rows are replaced by zeros; a bias of another dtype is added behind
    the product."""
    hidden = zero_unless(mask.unsqueeze(-1).expand_as(hidden), hidden)
    if bias is None or bias.dtype == weight.dtype:
        return torch.nn.functional.linear(hidden, weight, bias)
    return hidden @ weight.t() + bias


def _log_softmax(logits: Tensor, temperature: float, mask: Tensor) -> Tensor:
    """log softmax(logits/temperature) with masked rows replaced by the uniform distribution."""
    z = zero_unless(mask.unsqueeze(-1).expand_as(logits), logits)
    if temperature != 1 and z.numel():
        z = (z - z.detach().amax(-1, keepdim=True)) / temperature  # dividing first would round a common offset
    return torch.log_softmax(z, dim=-1)


def _pick(logp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """logp of each token, 0 where masked."""
    return zero_unless(mask, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


def shift_left(x: Tensor, steps: int = 1) -> Tensor:
    """x_{t+steps} along the last axis of x [..., T], 0 after the end. Rows are right-padded and zero where masked."""
    checks.tensors(x=x)
    return torch.nn.functional.pad(x, (0, steps))[..., steps:]
