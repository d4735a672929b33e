"""The one definition of every formula that a kernel computes: naive PyTorch, any device, any floating dtype.

Everything here follows the conventions of KLQ (arXiv 2508.17000): index t holds the action a_t = y_{t+1}, the value
V(s_t) and the reward r_{t+1}; the mask is True on real completion tokens. Masked entries may be NaN, inf or any
integer: they are replaced before any arithmetic, so they reach neither a result nor a gradient. Results are float64
when every floating-point input is float64, else float32; tensors have one shape, nothing broadcasts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import checks

INF = float("inf")


class TokenStats(NamedTuple):
    """Per-token statistics, each of the shape of `tokens`; the last two are None without a reference model."""

    logprob: Tensor
    entropy: Tensor
    ref_logprob: Tensor | None
    kl: Tensor | None


class LambdaReturns(NamedTuple):
    """λ-return targets Ĝ, their advantages Δ and one-step TD errors δ, each [B, T], zero where masked."""

    targets: Tensor
    advantages: Tensor
    td_errors: Tensor


def token_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None = None, *, temperature: float = 1.0,
    mask: Tensor | None = None,
) -> TokenStats:  # fmt: skip
    """`klq_kernels.token_stats` by its formulas, with every [..., V] tensor spelled out."""
    checks.positive(temperature=temperature)
    checks.logits(logits, tokens, ref_logits, mask)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    checks.token_ids(tokens, mask, logits.shape[-1])
    tokens = torch.where(mask, tokens, 0).long()

    dtype = result_dtype(logits, ref_logits)
    logp = _log_softmax(logits.to(dtype), temperature, mask)
    logprob, entropy = _pick(logp, tokens, mask), zero_unless(mask, _entropy(logp))
    if ref_logits is None:
        return TokenStats(logprob, entropy, None, None)
    logq = _log_softmax(ref_logits.detach().to(dtype), temperature, mask)
    return TokenStats(logprob, entropy, _pick(logq, tokens, mask), zero_unless(mask, kl_divergence(logp, logq)))


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, *, bias: Tensor | None = None, ref_bias: Tensor | None = None,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> TokenStats:  # fmt: skip
    """`klq_kernels.linear_token_stats` with both [..., V] logits in memory."""
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

    Shapes: [..., V], [..., V] -> [...]. Units: nats.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(kl_divergence(p.log(), q.log()).item(), 4)
    0.1438
    """
    checks.alike(logp=logp, logq=logq)
    logp, logq = cast(logp, logq)
    p, q = logp.exp(), logq.exp()
    d = torch.where((p > 0) & (logq > -INF), logp - logq, 0.0)
    near = (d.abs() < 1) & (p > 0)
    d_near = torch.where(near, d, 0.0)
    terms = torch.where(near, p * (torch.expm1(-d_near) + d_near).clamp_min(0), q - p + p * d)
    return torch.where(((p > 0) & (logq == -INF)).any(-1), INF, terms.sum(-1))


def q_values(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, tau: float) -> Tensor:
    """Q(s,a) = τ log(π(a|s)/π_b(a|s)) + V(s): a language model and a value head *are* an action-value function (13).

    All of one shape; τ > 0 in units of reward per nat.

    >>> q_values(torch.tensor(-1.0), torch.tensor(-1.5), torch.tensor(2.0), tau=0.2)
    tensor(2.1000)
    """
    checks.positive(tau=tau)
    checks.alike(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    logprobs, ref_logprobs, values = cast(logprobs, ref_logprobs, values)
    return tau * (logprobs - ref_logprobs) + values


@torch.no_grad()
def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, tau: float,
    gamma: float = 1.0, lam: float = 0.95, alpha: float = 1.0, trace_weights: Tensor | None = None,
) -> LambdaReturns:  # fmt: skip
    """`klq_kernels.lambda_returns` by its recursion, a Python loop over time."""
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
    checks.loss_variant(loss, tau, clip, log_ratio_clip, delta, old_logprobs, old_values)
    old = checks.optional(old_logprobs=old_logprobs, old_values=old_values)
    checks.alike(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, targets=targets, mask=mask, **old)
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    old_values = values if old_values is None else old_values
    fixed = (x.detach() for x in (ref_logprobs, targets, old_logprobs, old_values))
    logp, v, logq, target, old_logp, old_v = clean(mask, logprobs, values, *fixed)

    error = q_values(logp, logq, v, tau) - target
    squares = [error**2]  # each candidate's squared error; the clipped variants take the worst
    if loss in ("value_clipped", "double_clipped"):
        q_old = q_values(old_logp, logq, old_v, tau)
        squares.append((clamp_around(error + target, q_old, clip) - target) ** 2)
    if loss in ("ratio_clipped", "double_clipped"):
        near = clamp_around(logp, old_logp, log_ratio_clip)
        squares.append((q_values(near, logq, v, tau) - target) ** 2)
    terms = 0.5 * torch.stack(squares).amax(0)
    if loss == "huber":
        terms = torch.where(error.abs() <= delta, terms, delta * (error.abs() - 0.5 * delta))
    return masked_mean(terms, mask) if reduction == "mean" else terms


def logits_klq_loss(
    logits: Tensor, tokens: Tensor, ref_logprobs: Tensor, values: Tensor, targets: Tensor, mask: Tensor, *,
    temperature: float = 1.0, **variant,
) -> tuple[Tensor, TokenStats]:  # fmt: skip
    """`klq_kernels.logits_klq_loss` as `token_stats`, then `klq_loss`: the loss and the detached statistics."""
    stats = token_stats(logits, tokens, temperature=temperature, mask=mask)
    return klq_loss(stats.logprob, ref_logprobs, values, targets, mask, **variant), _detached(stats)


def linear_klq_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_logprobs: Tensor | None, values: Tensor, targets: Tensor,
    mask: Tensor, *, bias: Tensor | None = None, ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None, temperature: float = 1.0, **variant,
) -> tuple[Tensor, TokenStats]:  # fmt: skip
    """`klq_kernels.linear_klq_loss` as `linear_token_stats`, then `klq_loss`: the loss and the detached statistics."""
    stats = linear_token_stats(
        hidden, weight, tokens, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, temperature=temperature, mask=mask
    )
    ref_logprobs = stats.ref_logprob if ref_logprobs is None else ref_logprobs
    return klq_loss(stats.logprob, ref_logprobs, values, targets, mask, **variant), _detached(stats)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over entries where mask, of x's shape, is True; 0 (with zero gradient) where there are none.

    >>> masked_mean(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(2.)
    """
    checks.alike(x=x, mask=mask)
    return clean(mask, x)[0].sum() / mask.sum().clamp(min=1)


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if every floating-point input is float64 (None is none), else float32."""
    given = checks.optional(**{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    checks.tensors(**given)
    dtypes = {x.dtype for x in given.values() if x.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def cast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their result dtype."""
    dtype = result_dtype(*tensors)
    return [x.to(dtype) for x in tensors]


def narrow(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, float64 ones in float32 if the result is; 16-bit ones stay, since kernels read them as they are."""
    dtype = result_dtype(*tensors)
    return [x.to(dtype) if x is not None and x.dtype == torch.float64 else x for x in tensors]


def zero_unless(mask: Tensor, x: Tensor) -> Tensor:
    """x, in its own dtype, where mask, else an exact 0 that passes no gradient, even where x is NaN or inf."""
    checks.alike(mask=mask, x=x)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def clean(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors, all of the mask's shape, in their result dtype with masked entries replaced by 0."""
    checks.alike(mask=mask, **{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    return [zero_unless(mask, x) for x in cast(*tensors)]


def _detached(stats: TokenStats) -> TokenStats:
    return TokenStats(*(x if x is None else x.detach() for x in stats))


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Logits [..., V] of hidden states whose masked rows are replaced by zeros."""
    return torch.nn.functional.linear(zero_unless(mask.unsqueeze(-1).expand_as(hidden), hidden), weight, bias)


def _log_softmax(logits: Tensor, temperature: float, mask: Tensor) -> Tensor:
    """log softmax(logits/temperature) with masked rows replaced by the uniform distribution."""
    z = zero_unless(mask.unsqueeze(-1).expand_as(logits), logits)
    if temperature != 1 and z.numel():
        z = (z - z.detach().amax(-1, keepdim=True)) / temperature  # dividing first would round a common offset
    return torch.log_softmax(z, dim=-1)


def _pick(logp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """logp of each token, 0 where masked."""
    return zero_unless(mask, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


def _entropy(logp: Tensor) -> Tensor:
    """−Σ p log p over the last axis, with 0 log 0 = 0 in value and gradient."""
    return -(logp.exp() * torch.where(logp > -INF, logp, 0.0)).sum(-1)


def shift_left(x: Tensor, steps: int = 1) -> Tensor:
    """x_{t+steps} along the last axis, 0 after the end. Rows are right-padded and zero where masked."""
    checks.tensors(x=x)
    return torch.nn.functional.pad(x, (0, steps))[..., steps:]


def clamp_around(x: Tensor, centre: Tensor, radius: float) -> Tensor:
    """x, but at most `radius` away from `centre`."""
    checks.positive(radius=radius)
    checks.alike(x=x, centre=centre)
    x, centre = cast(x, centre)
    return torch.minimum(torch.maximum(x, centre - radius), centre + radius)
