"""The `torch` backend on logits: the definitions of `reference` in blocks of rows that stay in cache, on any device.

Every function works on flat rows: tokens, mask and residuals [N], logits [..., V] with as many rows. Masked rows are
never read. The arithmetic is float32, or float64 for float64 inputs.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from klq_kernels import reference
from klq_kernels.loss import add_q
from klq_kernels.types import INF, LambdaReturns, Residuals, Rows, Upstream, result_dtype

BLOCK_BYTES = 1 << 21  # of float32 or float64 that are worked on at a time
LOG2E = math.log2(math.e)
FAR = 30.0  # log(q/p) above which q may sit where p is rounded to 0
LOWEST = -1e30  # stands for −inf where it is multiplied by 0


def logits_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor,
    values: Tensor | None = None, tau: float = 0.0,
) -> Residuals:  # fmt: skip
    """`reference.token_stats` (arXiv 2508.17000, eq. (2)) in one pass over blocks of rows: logits and ref_logits
    [..., V]; tokens, mask and, for Q, values [N] -> residuals [N], zero where masked."""
    dtype = result_dtype(logits, ref_logits)
    out = Residuals.zeros(tokens, torch.float64, ref_logits is not None)
    for rows in row_blocks(mask, logits.shape[-1] * dtype.itemsize):
        z, r = (None if x is None else _read_rows(x, rows, dtype) for x in (logits, ref_logits))
        out.store(rows, block_stats(z, tokens[rows].long(), r, temperature))
    return add_q(finished(out, temperature, mask, dtype), values, tau, mask)


def softmax_stats(z: Tensor, tokens: Tensor, r: Tensor | None, temperature: float) -> Residuals:
    """`logits_stats` of a tile of the vocabulary as if there were no more; where the token is elsewhere, the log-probs
    mean nothing. The logits z [n, v] become the tile's softmax, the reference's r are used up; the residuals are
    float64, as `join` wants them. Source: arXiv 2508.17000, eq. (2), on a tile as in Dao et al. 2022 (FlashAttention).
    """
    out, buffers, inside = Residuals.zeros(tokens, torch.float64, r is not None), {}, tokens.clamp(0, z.shape[1] - 1)
    dtype = result_dtype(z, r)
    for rows in blocks(len(z), BLOCK_BYTES // max(1, z.shape[1] * dtype.itemsize)):
        p, q = z[rows].to(dtype), None if r is None else r[rows].to(dtype)
        out.store(rows, block_stats(p, inside[rows], q, temperature, _scratch(buffers, "logp", p)))
        if p.dtype != z.dtype:
            z[rows] = p
    return out


def join(left: Residuals | None, right: Residuals, here: Tensor) -> Residuals:
    """Residuals over two tiles of the vocabulary by the chain rules, w and u the tiles' shares of p and q:

        H = Σ_i w_i (H_i − log w_i)        KL = D(w ‖ u) + Σ_i w_i KL_i

    `here` [n] says which tokens are in the right tile. In float64, so that many tiles round no more than one; no term
    of the KL is negative, so that none is lost. Source: the chain rules of Cover and Thomas 2006, theorems 2.2.1 and
    2.5.3, for (tile, token in it).
    """
    if left is None:
        return right
    lse, ref_lse = (
        torch.logaddexp(*x).clamp_(min=LOWEST) for x in ((left.lse, right.lse), (left.ref_lse, right.ref_lse))
    )
    sides, log_w = (left, right), (left.lse - lse, right.lse - lse)
    w = [x.exp() for x in log_w]
    logprob = torch.where(here, right.logprob + log_w[1], left.logprob + log_w[0])
    entropy = sum(_weighted(wi, s.entropy - lw) for wi, lw, s in zip(w, log_w, sides, strict=True))
    out = left._replace(logprob=logprob, entropy=entropy, lse=lse)
    if not len(left.kl):
        return out
    log_u = left.ref_lse - ref_lse, right.ref_lse - ref_lse
    ref_logprob = torch.where(here, right.ref_logprob + log_u[1], left.ref_logprob + log_u[0])
    kl = reference.kl_divergence(torch.stack(log_w, 1), torch.stack(log_u, 1))
    kl = kl + sum(_weighted(wi, s.kl) for wi, s in zip(w, sides, strict=True))
    return out._replace(ref_logprob=ref_logprob, kl=kl, ref_lse=ref_lse)


def finished(stats: Residuals, temperature: float, mask: Tensor, dtype: torch.dtype) -> Residuals:
    """Float64 residuals [n] in this dtype, 0 where masked, NaN where all of a row's logits are −inf: they are no
    distribution. The shift takes what it can of the lse, of which a KL's gradient needs more digits than float32 has.
    """
    lost, ref_lost = (torch.where(x <= LOWEST, torch.nan, 0.0) for x in (stats.lse, stats.ref_lse))
    stats = stats._replace(ref_logprob=stats.ref_logprob + ref_lost, kl=stats.kl + ref_lost)
    shift, ref_shift = ((x * temperature).to(dtype).double() for x in (stats.lse, stats.ref_lse))
    lse, ref_lse = stats.lse - shift / temperature, stats.ref_lse - ref_shift / temperature
    stats = stats._replace(shift=shift, lse=lse, ref_shift=ref_shift, ref_lse=ref_lse)
    return Residuals(*(reference.zero_unless(mask, x + lost).to(dtype) if len(x) else x.to(dtype) for x in stats))


def logits_grad(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor, stats: Residuals,
    upstream: Upstream, out: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradient in `logits` for upstream gradients (a, b, c) of log-prob, entropy and KL into `out` [N, V]:

        dL/dz_v = (1/T) {a 1[v = token] + p_v [−a − b (log p_v + H) + c (log p_v − log q_v − KL)]}

    `out` may be the logits [..., V] themselves. Masked rows become zero. Source: eq. (2), differentiated.
    """
    if not mask.all():
        out[~mask] = 0
    buffers = {}
    for rows in row_blocks(mask, logits.shape[-1] * stats.lse.element_size()):
        a, b, c = (torch.zeros_like(stats.lse[rows]) if x is None else x[rows] / temperature for x in upstream)
        x = _shifted(_read_rows(logits, rows, a.dtype), temperature, stats.shift[rows], buffers, "x")
        lse, weights = stats.lse[rows], -a.unsqueeze(1)
        grad = torch.sub(x, lse.unsqueeze(1), out=_scratch(buffers, "grad", x)).mul_(LOG2E).exp2_()  # faster than exp_
        direct = isinstance(rows, slice) and out.dtype == grad.dtype
        if upstream.kl is not None:
            kl = stats.kl[rows]
            c = torch.where(kl < INF, c, 0.0)  # an infinite KL passes no gradient
            y = _shifted(_read_rows(ref_logits, rows, a.dtype), temperature, stats.ref_shift[rows], buffers, "y")
            d = torch.sub(x, y, out=y)  # small numbers first: log-probs would round it
            constant = c * (stats.ref_lse[rows] - lse - kl.clamp(max=-LOWEST))
            weights = d.mul_(c.unsqueeze(1)).add_(weights + constant.unsqueeze(1))
        if upstream.entropy is not None:
            weights = x.mul_(-b.unsqueeze(1)).add_(weights).sub_((b * (stats.entropy[rows] - lse)).unsqueeze(1))
        grad = torch.mul(grad, weights, out=out[rows] if direct else grad)
        if upstream.logprob is not None:
            chosen = tokens[rows].long()
            here = (chosen >= 0) & (chosen < grad.shape[1])  # in a tile of the vocabulary it may be elsewhere
            grad.scatter_add_(1, torch.where(here, chosen, 0).unsqueeze(1), torch.where(here, a, 0.0).unsqueeze(1))
        if not direct:
            out[rows] = grad.to(out.dtype)
    return out


def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    tau: float, gamma: float, lam: float, alpha: float,
) -> LambdaReturns:  # fmt: skip
    """`reference.lambda_returns` without a loop over time; all [B, T] (arXiv 2508.17000, eqs. (7), (14))."""
    v, r, logp, logq = reference.cast(values, rewards, logprobs, ref_logprobs)
    q = reference.zero_unless(mask, reference.q_values(logp, logq, v, tau))
    later = reference.shift_left(reference.zero_unless(mask, v))
    td_errors = reference.zero_unless(mask, torch.add(r, later, alpha=gamma).sub_(q))
    if trace_weights is None:
        advantages = _discounted_sums(td_errors, gamma * lam)
    else:
        c = reference.zero_unless(mask, trace_weights.to(v.dtype))
        decay, advantages, step = gamma * lam * reference.shift_left(c), td_errors.clone(), 1
        while step < mask.shape[1]:  # after round k, (decay, Δ)_t covers 2^k steps (Hillis and Steele 1986)
            advantages[:, :-step] += decay[:, :-step] * advantages[:, step:].clone()
            decay = decay * reference.shift_left(decay, step)
            step *= 2
    return LambdaReturns(torch.add(q, advantages, alpha=alpha), advantages, td_errors)


def _discounted_sums(x: Tensor, g: float, block: int = 64) -> Tensor:
    """Σ_k g^k x_{t+k} along the last axis of x [B, T], as two triangular matrix products: in blocks, then over blocks
    (Dakkak et al. 2019).

    >>> _discounted_sums(torch.ones(1, 3), 0.5)
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    steps = x.shape[1]
    blocks, kind = torch.nn.functional.pad(x, (0, -steps % block)).unflatten(1, (-1, block)), (x.dtype, x.device)
    local = blocks @ _powers(block, g, *kind)
    later = local[:, :, 0] @ _powers(local.shape[1], g**block, *kind)  # from each block's start to the row's end
    to_next = g ** torch.arange(block, 0, -1, dtype=x.dtype, device=x.device)
    return (local + reference.shift_left(later).unsqueeze(2) * to_next).flatten(1)[:, :steps].contiguous()


@functools.lru_cache(maxsize=8)
def _powers(size: int, g: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size] with g^(j−i) at [j, i], j ≥ i, and 0 elsewhere."""
    gap = torch.arange(size, dtype=dtype, device=device)
    gap = gap.unsqueeze(1) - gap
    return torch.where(gap >= 0, g ** gap.clamp(min=0), 0.0)


def blocks(count: int, most: int) -> Iterator[slice]:
    """Indices 0 … count − 1 in slices of nearly equal length, at most `most` (or one)."""
    size = math.ceil(max(1, count) / math.ceil(max(1, count) / max(1, most)))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def row_blocks(mask: Tensor, bytes_per_row: int) -> Iterator[Rows]:
    """Unmasked rows of mask [N] in equal blocks of at most `BLOCK_BYTES` (or one row): slices where nothing is masked,
    else index tensors [n]."""
    count = int(mask.sum())
    index = None if count == len(mask) else mask.nonzero().squeeze(1)
    return (rows if index is None else index[rows] for rows in blocks(count, BLOCK_BYTES // max(1, bytes_per_row)))


def _read_rows(x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """These rows of x [..., V] as [n, V] in this dtype, for reading only; a strided x is never copied as a whole."""
    if x.dim() == 2 or x.is_contiguous():
        return x.reshape(-1, x.shape[-1])[rows].to(dtype)
    x = x.flatten(0, -3) if x.dim() > 3 else x
    index = torch.arange(rows.start, rows.stop, device=x.device) if isinstance(rows, slice) else rows
    return x[index // x.shape[1], index % x.shape[1]].to(dtype)


def block_stats(z: Tensor, tokens: Tensor, r: Tensor | None, temperature: float, scratch=None) -> Residuals:
    """Residuals [n], in float64 and with shifts of 0, of rows with logits z and r [n, v] (arXiv 2508.17000, eq. (2)).
    With a scratch like z, p overwrites z and r is used up."""
    p, y = (None, None) if scratch is None else (z, r)
    x, shift = _below_top(z, temperature, scratch)
    p = torch.softmax(x, 1, out=p)
    lse = -p.amax(1).double().log()
    logprob, entropy = x.gather(1, tokens.unsqueeze(1)).squeeze(1) - lse, lse - _cross(p, x)
    ref_logprob = kl = ref_lse = nothing = lse.new_empty(0)
    if r is not None:
        y, ref_shift = _below_top(r, temperature, y)
        token_y = y.gather(1, tokens.unsqueeze(1)).squeeze(1)
        kl, ref_lse = _kl(p, x, y, lse)
        ref_logprob, ref_lse = token_y - ref_lse, ref_lse + ref_shift.double() / temperature
    shift, lse = torch.zeros_like(lse), lse + shift.double() / temperature
    return Residuals(logprob, entropy, ref_logprob, kl, shift, lse, torch.zeros_like(ref_lse), ref_lse, nothing)


def _below_top(z: Tensor, temperature: float, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """(z − shift)/temperature and the shift, each row's maximum; a row of −inf has shift −inf and becomes zeros."""
    shift = z.amax(1)
    if (shift == -INF).any():
        z = z.masked_fill((shift == -INF).unsqueeze(1), 0.0)
    x = torch.sub(z, shift.masked_fill(shift == -INF, 0.0).unsqueeze(1), out=out)
    return x if temperature == 1 else x.mul_(1 / temperature), shift


def _weighted(w: Tensor, x: Tensor) -> Tensor:
    """w x, and 0 where w = 0 whatever x is."""
    return (w * x).masked_fill_(w == 0, 0.0)


def _shifted(z: Tensor, temperature: float, shift: Tensor, buffers: dict, name: str) -> Tensor:
    """(z − shift)/temperature, finite, in a buffer; subtracting first keeps a common offset from rounding."""
    x = torch.sub(z, shift.unsqueeze(1), out=_scratch(buffers, name, z)).clamp_min_(LOWEST)
    return x if temperature == 1 else x.mul_(1 / temperature)


def _scratch(buffers: dict, name: str, like: Tensor) -> Tensor:
    """A buffer of this name for as many rows as `like` has; the first asked for is the largest."""
    if name not in buffers:
        buffers[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return buffers[name][: len(like)]


def _cross(p: Tensor, d: Tensor) -> Tensor:
    """Σ p d of each row, where p = 0 contributes 0 whatever d is."""
    sums = torch.linalg.vecdot(p, d)
    return torch.linalg.vecdot(p, d.masked_fill(p == 0, 0.0)) if sums.isnan().any() else sums


def _kl(p: Tensor, x: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(D(p ‖ q), log Σ e^y) of each row for p = e^(x − lse) and q ∝ e^y; x and y are used up.

    With u = y − x and u' = u − E_p u, log Σ e^y = lse + log E_p e^u and KL = log E_p e^u − E_p u = log(1 + A) for
    A = E_p (e^u' − 1 − u'): no term is negative, and whatever rounds E_p u changes A to second order only.
    """
    u = torch.sub(y, x, out=x)
    mean = torch.linalg.vecdot(p, u)
    if not (u.amax(1) - mean < FAR).all():  # or NaN: of −inf
        known = (u.abs() < FAR) | (p < torch.finfo(p.dtype).tiny)  # by x: a larger u has rounded it, a larger p has it
        x, y = torch.where((y > -INF) & known, y.double() - u, p.double().log() + lse.unsqueeze(1)), y.double()
        return reference.kl_divergence(x.log_softmax(1), y.log_softmax(1)), y.logsumexp(1)
    a = torch.linalg.vecdot(p, torch.expm1(u.sub_(mean.unsqueeze(1)), out=y).sub_(u))
    kl = a.clamp_(min=0).double().log1p()
    return kl, lse + mean + kl
