"""The public operations: checks, choice of backend, autograd. What they compute is defined in `reference`."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from klq_kernels import autograd, checks, reference
from klq_kernels.loss import check_settings, klq_loss, q_of
from klq_kernels.torch_linear import WORKSPACE_BYTES
from klq_kernels.types import LambdaReturns, LossInputs, LossSettings, TokenStats, narrow

MODEL = {"logits", "ref_logits", "weight", "ref_weight", "bias", "ref_bias"}  # not per token
LEARN = {"logits", "hidden", "weight", "bias", "values"}
HEADS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


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
    return _statistics(dict(logits=logits, ref_logits=ref_logits), tokens, mask, temperature, backend)[0]


def token_q(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor, values: Tensor, *, tau: float, temperature: float = 1.0,
    mask: Tensor | None = None, backend: str | None = None,
) -> tuple[TokenStats, Tensor]:  # fmt: skip
    """`token_stats` (2) and, in the same pass, the action-value of each token:

        Q_t = τ (logprob_t − ref_logprob_t) + V_t                                                  (13)

    Shapes: values [...] like tokens; else as in `token_stats`, whose statistics and gradients these are. Q is shaped
    like tokens, 0 where masked, and differentiable in `logits` and `values`; τ > 0 in units of reward per nat.

    Raises as `token_stats` does, ValueError for τ ≤ 0, and TypeError where the reference or the values are missing.
    Source: arXiv 2508.17000, eqs. (2) and (13).

    >>> logits, token, value = torch.zeros(1, 2), torch.tensor([1]), torch.ones(1)
    >>> stats, q = token_q(logits, token, torch.tensor([[1.0, 0.0]]), value, tau=0.5)
    >>> round((stats.logprob - stats.ref_logprob).item(), 4), round(q.item(), 4)
    (0.6201, 1.3101)
    """
    checks.positive(tau=tau)
    checks.tensors(ref_logits=ref_logits, values=values)
    model = dict(logits=logits, ref_logits=ref_logits)
    return _statistics(model, tokens, mask, temperature, backend, values=values, tau=tau)


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, *, bias: Tensor | None = None, ref_bias: Tensor | None = None,
    temperature: float = 1.0, mask: Tensor | None = None, workspace_bytes: int | None = None,
    backend: str | None = None,
) -> TokenStats:  # fmt: skip
    """`token_stats` (2) of logits = hidden weightᵀ + bias, without the [..., V] logits of either model ever existing.

    Shapes: hidden [..., H], weight [V, H], bias [V]; ref_hidden [..., H'], ref_weight [V, H'] (the same tensor as
    `weight` where the head is shared), ref_bias [V]; tokens and mask [...]. Differentiable in hidden, weight and bias
    for any upstream gradients; what does not require a gradient costs none, masked rows nothing on a CPU. At most
    `workspace_bytes` of logits exist at a time (but at least one row or tile; None: 512 MiB on a GPU, 64 MiB on a
    CPU); the result does not depend on it beyond rounding.

    Raises ValueError or TypeError as `token_stats` does, and for a reference given by halves or dtypes that disagree.

    >>> stats = linear_token_stats(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]))
    >>> round(stats.logprob.item(), 4), round(stats.entropy.item(), 4), stats.kl
    (-1.3863, 1.3863, None)
    """
    model = dict(zip(HEADS, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)))
    return _statistics(model, tokens, mask, temperature, backend, workspace_bytes)[0]


def linear_token_q(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_hidden: Tensor, ref_weight: Tensor, values: Tensor, *,
    tau: float, bias: Tensor | None = None, ref_bias: Tensor | None = None, temperature: float = 1.0,
    mask: Tensor | None = None, workspace_bytes: int | None = None, backend: str | None = None,
) -> tuple[TokenStats, Tensor]:  # fmt: skip
    """`token_q` (13) from hidden states: `linear_token_stats` and Q in the same pass.

    Shapes: values [...] like tokens; else as in `linear_token_stats`. Q is shaped like tokens, 0 where masked, and
    differentiable in hidden, weight, bias and values. Raises as `linear_token_stats` and `token_q` do.

    >>> hidden, weight = torch.zeros(1, 2), torch.ones(4, 2)
    >>> linear_token_q(hidden, weight, torch.tensor([2]), hidden, weight, torch.ones(1), tau=0.5)[1]
    tensor([1.])
    """
    checks.positive(tau=tau)
    checks.tensors(ref_hidden=ref_hidden, ref_weight=ref_weight, values=values)
    model = dict(zip(HEADS, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)))
    return _statistics(model, tokens, mask, temperature, backend, workspace_bytes, values, tau)


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
    coefficients = dict(tau=tau, gamma=gamma, lam=lam, alpha=alpha)
    checks.returns(mask=mask, trace_weights=trace_weights, **coefficients, **given)
    backend, given = _prepare(backend, None, mask, **given, trace_weights=trace_weights)
    if backend == "reference":
        return reference.lambda_returns(**given, **coefficients)
    given = {name: x if x is None else x.detach() for name, x in given.items()}
    return LambdaReturns(*autograd.lambda_returns(**given, **coefficients, backend=backend))


def logits_klq_loss(
    logits: Tensor, tokens: Tensor, ref_logprobs: Tensor, values: Tensor, targets: Tensor, mask: Tensor, *,
    tau: float, temperature: float = 1.0, loss: str = "l2", clip: float | None = None,
    log_ratio_clip: float | None = None, delta: float | None = None, old_logprobs: Tensor | None = None,
    old_values: Tensor | None = None, inplace: bool = False, return_stats: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """Masked mean of the KLQ loss (arXiv 2508.17000, eq. (6); variants as in `klq_loss`) from logits [..., V].

    Loss and gradients, for logits and values, come from one visit to each row. With `inplace` the gradient overwrites
    `logits`, so that no second [..., V] tensor exists; nothing else may then need them (autograd says so if it does).
    All other tensors are shaped like tokens [...]. With `return_stats` the result is (loss, TokenStats) with log-prob
    and entropy, detached. Raises as `token_stats` and `klq_loss` do.

    >>> one = torch.ones(1)
    >>> logits_klq_loss(torch.zeros(1, 4), torch.tensor([2]), -one, one, one, one.bool(), tau=0.5)
    tensor(0.0187)
    """
    checks.tensors(ref_logprobs=ref_logprobs)
    settings = LossSettings(tau, loss, clip, log_ratio_clip, delta)
    inputs = LossInputs(None, ref_logprobs, values, targets, mask, old_logprobs, old_values)
    out, *stats = _loss(dict(logits=logits), tokens, inputs, settings, temperature, backend, inplace=inplace)()
    return (out, _shaped(stats, tokens, False).detached()) if return_stats else out


def linear_klq_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ref_logprobs: Tensor | None, values: Tensor, targets: Tensor,
    mask: Tensor, *, tau: float, bias: Tensor | None = None, temperature: float = 1.0, loss: str = "l2",
    clip: float | None = None, log_ratio_clip: float | None = None, delta: float | None = None,
    old_logprobs: Tensor | None = None, old_values: Tensor | None = None, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, return_stats: bool = False,
    workspace_bytes: int | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """Masked mean of the KLQ loss (arXiv 2508.17000, eq. (6); variants as in `klq_loss`) from hidden [..., H].

    Loss and gradients, for hidden, weight, bias and values, come from one pass over the vocabulary. Give either
    ref_logprobs, shaped like tokens (three matrix products), or ref_hidden and ref_weight with ref_logprobs=None (four;
    exact KL and entropy ride along). Shapes as in `linear_token_stats`. With `return_stats` the result is
    (loss, TokenStats), the statistics detached. Raises as `linear_token_stats` and `klq_loss` do.

    >>> one = torch.ones(1)
    >>> linear_klq_loss(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]), -one, one, one, one.bool(), tau=0.5)
    tensor(0.0187)
    """
    if (ref_logprobs is None) == (ref_hidden is None):
        given = "both" if ref_logprobs is not None else "neither"
        raise ValueError(f"give either ref_logprobs or ref_hidden (with ref_weight), got {given}")
    model = dict(zip(HEADS, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)))
    settings = LossSettings(tau, loss, clip, log_ratio_clip, delta)
    inputs = LossInputs(None, ref_logprobs, values, targets, mask, old_logprobs, old_values)
    out, *stats = _loss(model, tokens, inputs, settings, temperature, backend, workspace_bytes)()
    return (out, _shaped(stats, tokens, ref_hidden is not None).detached()) if return_stats else out


def _prepare(backend: str | None, tokens: Tensor | None, mask: Tensor | None, **floats: Tensor | None):
    """The backend for these tensors, and what it gets by name: floats in the dtypes it wants, tokens if there are any,
    the mask (a full one for None)."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    checks.common_device(**floats, tokens=tokens, mask=mask)
    backend = checks.pick_backend(backend, **floats)
    return backend, dict(zip(floats, narrow(*floats.values())), **checks.optional(tokens=tokens, mask=mask))


def _options(model: dict, tokens: Tensor, mask: Tensor | None, temperature: float, workspace_bytes: int | None) -> dict:
    """What an op on this model (logits or heads, by name) is told, after checks of all these."""
    checks.positive(temperature=temperature, **checks.optional(workspace_bytes=workspace_bytes))
    if "logits" in model:
        checks.logits(tokens=tokens, mask=mask, **model)
        return dict(temperature=temperature, workspace=0)
    checks.heads(tokens=tokens, mask=mask, **model)
    default = WORKSPACE_BYTES["cuda" if model["weight"].is_cuda else "cpu"]
    return dict(temperature=temperature, workspace=int(default if workspace_bytes is None else workspace_bytes))


def _by_definition(model: dict, given: dict, temperature: float) -> TokenStats:
    """The reference's statistics of this model from prepared tensors."""
    op = autograd.exact(reference.token_stats if "logits" in model else reference.linear_token_stats)
    return op(**{name: given[name] for name in (*model, "tokens", "mask")}, temperature=temperature)


def _statistics(
    model: dict, tokens: Tensor, mask: Tensor | None, temperature: float, backend: str | None,
    workspace_bytes: int | None = None, values: Tensor | None = None, tau: float = 0.0,
) -> tuple[TokenStats, Tensor | None]:  # fmt: skip
    """The statistics, and Q if there are values."""
    options = _options(model, tokens, mask, temperature, workspace_bytes)
    checks.alike(tokens=tokens, **checks.optional(values=values))
    backend, given = _prepare(backend, tokens, mask, **model, values=values)
    if backend == "reference":
        stats = _by_definition(model, given, temperature)
        return stats, q_of(stats, given["values"], tau, given["mask"])
    *out, q = autograd.token_stats(**_flat(given), **options, tau=tau, backend=backend)
    with_ref = model.get("ref_logits", model.get("ref_hidden")) is not None
    return _shaped(out, tokens, with_ref), None if values is None else q.reshape(tokens.shape)


def _loss(
    model: dict, tokens: Tensor, inputs: LossInputs, settings: LossSettings, temperature: float, backend: str | None,
    workspace_bytes: int | None = None, inplace: bool = False,
) -> Callable[[], Sequence[Tensor]]:  # fmt: skip
    """What computes the loss and the statistics, checked and prepared: to be called without arguments."""
    options = _options(model, tokens, inputs.mask, temperature, workspace_bytes)
    check_settings(settings, inputs)
    checks.tensors(values=inputs.values, targets=inputs.targets, mask=inputs.mask)
    rest = {name: x for name, x in inputs._asdict().items() if name != "logprobs"}
    checks.alike(tokens=tokens, **checks.optional(**rest))
    backend, given = _prepare(backend, tokens, **model, **rest)
    if backend == "reference":
        return partial(_loss_by_definition, model, given, rest, settings, temperature)
    flat = _flat(given)
    if inplace:
        leaves, others = (flat[k] for k in ("hidden", "values", "tokens")), {k: flat[k] for k in rest if k != "values"}
        return partial(autograd.InplaceLoss.apply, *leaves, others, settings, temperature, backend)
    head = (flat[k] for k in ("hidden", "weight", "bias"))
    learn = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in head]
    return partial(autograd.klq_loss, **flat, **settings._asdict(), **options, backend=backend, needed=learn)


def _loss_by_definition(
    model: dict, given: dict, names: Iterable[str], settings: LossSettings, temperature: float
) -> tuple[Tensor | None, ...]:
    """The loss and the reference's statistics, from prepared tensors."""
    stats, rest = _by_definition(model, given, temperature), {name: given[name] for name in names}
    rest["ref_logprobs"] = stats.ref_logprob if rest["ref_logprobs"] is None else rest["ref_logprobs"]
    return klq_loss(stats.logprob, **rest, **settings._asdict()), *stats


def _flat(given: dict) -> dict:
    """Tensors as a custom op takes them: per token [N] and contiguous (an expanded mask has stride 0), hidden states
    [N, H], heads as they are, and so logits, as hidden states without a head; only the policy and the values keep their
    graph."""
    out = dict.fromkeys(HEADS)
    for name, x in given.items():
        x = x if x is None or name in LEARN else x.detach()
        if name in ("hidden", "ref_hidden") and x is not None:
            x = x.reshape(-1, x.shape[-1])
        elif name not in MODEL and x is not None:
            x = x.reshape(-1).contiguous()
        out[name.replace("logits", "hidden")] = x.long() if name == "tokens" else x
    return out


def _shaped(stats: Sequence[Tensor], tokens: Tensor, with_ref: bool) -> TokenStats:
    """TokenStats shaped like tokens from flat results; the reference's log-prob is no function of the policy."""
    logprob, entropy, *ref = (x.reshape(tokens.shape) for x in stats[: 4 if with_ref else 2])
    return TokenStats(logprob, entropy, *((ref[0].detach(), ref[1]) if ref else (None, None)))
