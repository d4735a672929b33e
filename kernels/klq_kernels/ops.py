"""The public operations: checks, choice of backend, autograd. What they compute is defined in `reference`."""

import torch
from torch import Tensor

from klq_kernels import autograd, checks, reference
from klq_kernels.reference import LambdaReturns, TokenStats, narrow
from klq_kernels.torch_linear import WORKSPACE_BYTES


def token_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None = None, *, temperature: float = 1.0,
    mask: Tensor | None = None, backend: str | None = None,
) -> TokenStats:  # fmt: skip
    """Log-probability of each token, entropy, and exact KL(policy ‖ reference) of the distribution it was drawn from.

    With z = logits/temperature and p = softmax(z), q = softmax(ref_logits/temperature):

        logprob = log p(token)    entropy = −Σ_v p_v log p_v    kl = Σ_v p_v log(p_v/q_v) ≥ 0        (2)

    Shapes: logits and ref_logits [..., V]; tokens and mask [...]. All results are in nats, shaped like tokens, and
    differentiable in `logits`; no gradient flows to `ref_logits`. A logit of −inf is a forbidden token: p = 0
    contributes nothing, p > 0 with q = 0 makes the KL +inf (and such a row passes no gradient through it).

    Raises ValueError or TypeError for shapes that disagree, temperature ≤ 0, a mask that is not boolean, or an
    unmasked token outside the vocabulary (on a GPU the last is asserted on the device, without waiting for it).
    Source: arXiv 2508.17000, eq. (2).

    >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), torch.zeros(1, 4))
    >>> [round(x.item(), 4) for x in stats]
    [-1.3863, 1.3863, -1.3863, 0.0]
    """
    checks.positive(temperature=temperature)
    checks.logits(logits, tokens, ref_logits, mask)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    backend, model = _prepare(backend, tokens, mask, logits=logits, ref_logits=ref_logits)
    if backend == "reference":
        return reference.token_stats(tokens=tokens, **model, temperature=temperature, mask=mask)
    logits, ref = model["logits"], None if ref_logits is None else model["ref_logits"].detach()
    out = autograd.token_stats(logits, _flat(tokens.long()), ref, temperature, _flat(mask), backend)
    return _shaped(out, tokens, ref_logits is not None)


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, *, bias: Tensor | None = None, ref_bias: Tensor | None = None,
    temperature: float = 1.0, mask: Tensor | None = None, workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> TokenStats:  # fmt: skip
    """`token_stats` of logits = hidden weightᵀ + bias, without the [..., V] logits of either model ever existing.

    Shapes: hidden [..., H], weight [V, H], bias [V]; ref_hidden [..., H'], ref_weight [V, H'] (the same tensor as
    `weight` where the head is shared), ref_bias [V]; tokens and mask [...]. Differentiable in hidden, weight and bias
    for any upstream gradients; what does not require a gradient costs none; masked rows cost nothing. At most
    `workspace_bytes` of logits exist at a time (but at least one row or tile); the result does not depend on it
    beyond rounding. From hidden states the KL's error floor is that of the logits' own rounding, about 1e-7 in
    float32; it is never negative.

    Raises ValueError or TypeError as `token_stats` does, and for a reference given by halves or dtypes that disagree.

    >>> stats = linear_token_stats(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]))
    >>> round(stats.logprob.item(), 4), round(stats.entropy.item(), 4), stats.kl
    (-1.3863, 1.3863, None)
    """
    checks.positive(temperature=temperature, workspace_bytes=workspace_bytes)
    checks.heads(hidden, weight, tokens, ref_hidden, ref_weight, bias, ref_bias, mask)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    model = dict(hidden=hidden, weight=weight, bias=bias)
    model |= dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    backend, model = _prepare(backend, tokens, mask, **model)
    if backend == "reference":
        return reference.linear_token_stats(tokens=tokens, **model, temperature=temperature, mask=mask)
    hidden, weight, bias, *ref = model.values()
    flat = _flat(tokens.long()), *_reference(*ref), temperature, _flat(mask)
    out = autograd.linear_token_stats(_rows(hidden), weight, bias, *flat, workspace_bytes, backend)
    return _shaped(out, tokens, ref_hidden is not None)


def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, tau: float,
    gamma: float = 1.0, lam: float = 0.95, alpha: float = 1.0, trace_weights: Tensor | None = None,
    backend: str | None = None,
) -> LambdaReturns:  # fmt: skip
    """KLQ's regression targets: one backward recursion over the tokens of each completion.

        Q_t = τ (logprob_t − ref_logprob_t) + V_t
        δ_t = r_{t+1} + γ V_{t+1} − Q_t,   V = 0 after the last real token                         (14)
        Δ_t = δ_t + γ λ c_{t+1} Δ_{t+1},   c = 1 unless trace_weights are given (Retrace)
        Ĝ_t = Q_t + α Δ_t                                                                           (7)

    Shapes: every tensor [B, T]; `mask` boolean and right-padded, empty rows allowed. Ranges: τ > 0; γ, λ in [0, 1];
    α in (0, 1]. Masked entries of any argument are ignored; results are zero there and carry no gradient.

    Raises ValueError or TypeError naming the argument for shapes that disagree, a mask with holes (asserted on the
    device where that is a GPU), or a coefficient out of range. Source: arXiv 2508.17000, eqs. (7) and (14); Retrace:
    Munos et al. 2016.

    >>> one = torch.ones(1, 2)
    >>> out = lambda_returns(torch.tensor([[0., 1.]]), 0 * one, -one, -one, one.bool(), tau=0.1, lam=1.0)
    >>> out.targets
    tensor([[1., 1.]])
    """
    given = dict(rewards=rewards, values=values, logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.returns(mask=mask, trace_weights=trace_weights, tau=tau, gamma=gamma, lam=lam, alpha=alpha, **given)
    backend, given = _prepare(backend, None, mask, **given, trace_weights=trace_weights)
    if backend == "reference":
        return reference.lambda_returns(**given, mask=mask, tau=tau, gamma=gamma, lam=lam, alpha=alpha)
    *tensors, weights = (x if x is None else x.detach() for x in given.values())
    return LambdaReturns(*autograd.lambda_returns(*tensors, mask, weights, tau, gamma, lam, alpha, backend))


def logits_klq_loss(
    logits: Tensor, tokens: Tensor, ref_logprobs: Tensor, values: Tensor, targets: Tensor, mask: Tensor, *,
    tau: float, temperature: float = 1.0, loss: str = "l2", clip: float | None = None,
    log_ratio_clip: float | None = None, delta: float | None = None, old_logprobs: Tensor | None = None,
    old_values: Tensor | None = None, inplace: bool = False, return_stats: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """Masked mean of the KLQ loss (see `klq_kernels.reference.klq_loss` for its variants) from logits [..., V].

    Loss and gradients, for logits and values, come from one visit to each row. With `inplace` the gradient overwrites
    `logits`, so that no second [..., V] tensor exists; nothing else may then need them (autograd says so if it does).
    All other tensors are shaped like tokens [...]. With `return_stats` the result is (loss, TokenStats) with log-prob
    and entropy, detached. Raises as `token_stats` and `klq_loss` do.

    >>> one = torch.ones(1)
    >>> logits_klq_loss(torch.zeros(1, 4), torch.tensor([2]), -one, one, one, one.bool(), tau=0.5)
    tensor(0.0187)
    """
    checks.positive(temperature=temperature)
    checks.logits(logits, tokens, None, mask)
    checks.tensors(ref_logprobs=ref_logprobs)
    variant = dict(tau=tau, loss=loss, clip=clip, log_ratio_clip=log_ratio_clip, delta=delta)
    per_token = dict(ref_logprobs=ref_logprobs, values=values, targets=targets)
    old = dict(old_logprobs=old_logprobs, old_values=old_values)
    backend, given, flat = _prepare_loss(backend, tokens, mask, variant, dict(logits=logits), per_token, old)
    if backend == "reference":
        out, stats = reference.logits_klq_loss(tokens=tokens, mask=mask, **given, temperature=temperature, **variant)
        return (out, stats) if return_stats else out
    args = given["logits"], *flat, temperature, *variant.values(), backend
    out, *stats = (autograd.InplaceLoss.apply if inplace else autograd.logits_klq_loss)(*args)
    return (out, _shaped([x.detach() for x in stats], tokens, with_ref=False)) if return_stats else out


def linear_klq_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_logprobs: Tensor | None, values: Tensor, targets: Tensor,
    mask: Tensor, *, tau: float, bias: Tensor | None = None, temperature: float = 1.0, loss: str = "l2",
    clip: float | None = None, log_ratio_clip: float | None = None, delta: float | None = None,
    old_logprobs: Tensor | None = None, old_values: Tensor | None = None, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, return_stats: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES, backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """Masked mean of the KLQ loss from hidden states: loss and gradients in one pass over the vocabulary.

    Give either ref_logprobs, shaped like tokens (three matrix products), or ref_hidden and ref_weight, with
    ref_logprobs=None (four; exact KL and entropy ride along). Gradients flow to hidden, weight, bias and values. Shapes
    as in `linear_token_stats`, variants as in `klq_kernels.reference.klq_loss`. With `return_stats` the result is
    (loss, TokenStats), the statistics detached. Raises as those functions do.

    >>> one = torch.ones(1)
    >>> linear_klq_loss(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]), -one, one, one, one.bool(), tau=0.5)
    tensor(0.0187)
    """
    checks.positive(temperature=temperature, workspace_bytes=workspace_bytes)
    if (ref_logprobs is None) == (ref_hidden is None):
        given = "both" if ref_logprobs is not None else "neither"
        raise ValueError(f"give either ref_logprobs or ref_hidden (with ref_weight), got {given}")
    variant = dict(tau=tau, loss=loss, clip=clip, log_ratio_clip=log_ratio_clip, delta=delta)
    old = dict(old_logprobs=old_logprobs, old_values=old_values)
    per_token = dict(ref_logprobs=ref_logprobs, values=values, targets=targets)
    model = dict(hidden=hidden, weight=weight, bias=bias)
    model |= dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    checks.heads(tokens=tokens, **model, mask=mask)
    backend, given, flat = _prepare_loss(backend, tokens, mask, variant, model, per_token, old)
    if backend == "reference":
        out, stats = reference.linear_klq_loss(tokens=tokens, mask=mask, **given, temperature=temperature, **variant)
        return (out, stats) if return_stats else out
    hidden, weight, bias, *ref = (given[name] for name in model)
    needed = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    out, *stats = autograd.linear_klq_loss(
        _rows(hidden), weight, bias, *flat, *_reference(*ref), temperature, *variant.values(), needed,
        workspace_bytes, backend,
    )[:5]  # fmt: skip
    return (out, _shaped(tuple(x.detach() for x in stats), tokens, ref_hidden is not None)) if return_stats else out


def _prepare(backend: str | None, tokens: Tensor | None, mask: Tensor, **floats: Tensor | None) -> tuple[str, dict]:
    """The backend for these tensors, and the tensors in the dtypes it gets them in."""
    checks.common_device(**floats, tokens=tokens, mask=mask)
    return checks.pick_backend(backend, **floats), dict(zip(floats, narrow(*floats.values())))


def _prepare_loss(
    backend: str | None, tokens: Tensor, mask: Tensor, variant: dict, model: dict, per_token: dict, old: dict
) -> tuple[str, dict, list]:
    """What `_prepare` returns after the checks of either loss, and flat tensors as its custom op takes them."""
    checks.loss_variant(**variant, **old)
    checks.tensors(values=per_token["values"], targets=per_token["targets"])
    checks.alike(tokens=tokens, mask=mask, **checks.optional(**per_token, **old))
    backend, given = _prepare(backend, tokens, mask, **model, **per_token, **old)
    fixed = (given[name] for name in ("ref_logprobs", "targets", *old))
    return backend, given, [_flat(tokens.long()), given["values"].reshape(-1), *map(_flat, fixed), _flat(mask)]


def _flat(x: Tensor | None) -> Tensor | None:
    """x as [N], contiguous (an expanded mask has stride 0) and without its graph."""
    return None if x is None else x.detach().reshape(-1).contiguous()


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _reference(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple:
    """The reference head, flat and detached, or three Nones."""
    return tuple(None if x is None else x.detach() for x in (hidden if hidden is None else _rows(hidden), weight, bias))


def _shaped(out: tuple[Tensor, ...], tokens: Tensor, with_ref: bool) -> TokenStats:
    """TokenStats shaped like tokens from flat results; the reference's log-prob is no function of the policy."""
    logprob, entropy, *ref = (x.reshape(tokens.shape) for x in out[: 4 if with_ref else 2])
    return TokenStats(logprob, entropy, *((ref[0].detach(), ref[1]) if ref else (None, None)))
