"""The `torch` backend on logits: the definitions of `reference` in blocks of rows that stay in cache, on any device.

Every function works on flat rows: tokens, mask and statistics [N], logits [..., V] with as many rows. Masked rows are
never read. The arithmetic is float32, or float64 for float64 inputs.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import reference
from klq_kernels.reference import INF, LambdaReturns

BLOCK_BYTES = 1 << 20
SMALL_KL = 0.05  # below this Σ p log(p/q) loses digits, so the Bregman sum is taken
FAR = -60.0  # log(p/q) below which e^(−d) is near overflow


class Statistics(NamedTuple):
    """What a forward pass leaves, each [N]; log p(v) = (z_v − shift)/temperature − norm. Empty without a reference."""

    logprob: Tensor
    entropy: Tensor
    ref_logprob: Tensor
    kl: Tensor
    shift: Tensor
    norm: Tensor
    ref_shift: Tensor
    ref_norm: Tensor


def empty_statistics(tokens: Tensor, dtype: torch.dtype, with_ref: bool) -> Statistics:
    """Zeros for each of the tokens [N]."""
    counts = (tokens.shape[0], tokens.shape[0] if with_ref else 0)
    own, ref = (torch.zeros(n, dtype=dtype, device=tokens.device) for n in counts)
    return Statistics(*(x.clone() for x in (own, own, ref, ref, own, own, ref, ref)))


def logits_stats(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    mask: Tensor,
) -> Statistics:
    """`reference.token_stats` in one pass over blocks of rows; zeros where masked."""
    dtype = reference.result_dtype(logits, ref_logits)
    out = empty_statistics(tokens, dtype, ref_logits is not None)
    for rows in row_blocks(mask, logits.shape[-1] * dtype.itemsize):
        chosen = tokens[rows].long().unsqueeze(1)
        logp, out.shift[rows], out.norm[rows] = _normalise(take_rows(logits, rows, dtype), temperature)
        p = logp.exp()
        out.logprob[rows] = logp.gather(1, chosen).squeeze(1)
        out.entropy[rows] = _entropy(p, logp)
        if ref_logits is not None:
            logq, out.ref_shift[rows], out.ref_norm[rows] = _normalise(take_rows(ref_logits, rows, dtype), temperature)
            out.ref_logprob[rows] = logq.gather(1, chosen).squeeze(1)
            out.kl[rows] = _kl(p, logp, logq)
    return out


def exponentiate(
    z: Tensor, tokens: Tensor, tiles: Iterable[tuple[slice, Tensor | None]], temperature: float
) -> Statistics:
    """Statistics of logits z [N, V], which become e^y, y = (z − max z)/T, and of a reference whose logits r come in
    tiles (columns, r [N, columns] or None), which are overwritten too.

    With S = Σ e^y and x = (r − shift)/T: H = log S − Σ e^y y / S, KL = Σ e^y (y − x) / S − log S + log Σ e^x, one visit
    to each tile, and an absolute error of about 1e-6.
    """
    shift, ref_shift = _finite(z.amax(1)), torch.zeros_like(z[:, 0])
    token_y = (_choose(z, tokens) - shift) / temperature
    sums, moments, cross, token_x = (torch.zeros_like(shift) for _ in range(4))
    ref_norm, scratch, ref = torch.full_like(shift, -INF), None, None
    for columns, r in tiles:
        if (ref := r) is not None:
            if columns.start == 0:
                ref_shift = _finite(r.amax(1))
            here = (tokens >= columns.start) & (tokens < columns.stop)
            chosen = _choose(r, torch.where(here, tokens - columns.start, 0))
            token_x = torch.where(here, (chosen - ref_shift) / temperature, token_x)
        for rows in row_blocks(torch.ones_like(tokens, dtype=torch.bool), z[0, columns].nbytes):
            e = z[rows, columns]
            scratch = torch.empty_like(e, memory_format=torch.contiguous_format) if scratch is None else scratch
            y = scratch.view(-1)[: e.numel()].view(e.shape)
            _scaled_gap(e, shift[rows], temperature, out=y)
            torch.exp(y, out=e)
            mass = e.sum(1)
            sums[rows] += mass
            moments[rows] += _cross(e, y)
            if r is not None:
                top = _finite(r[rows].amax(1))
                lift = (top - ref_shift[rows]) / temperature
                x = _scaled_gap(r[rows], top, temperature, out=r[rows])
                cross[rows] += _cross(e, y.sub_(x)) - lift * mass
                ref_norm[rows] = torch.logaddexp(ref_norm[rows], lift + x.exp_().sum(1).log())
    norm = sums.log()
    own, none = (token_y - norm, norm - moments / sums), norm[:0]
    if ref is None:
        return Statistics(*own, none, none, shift, norm, none, none)
    kl = (cross / sums - norm + ref_norm).clamp_(min=0)
    return Statistics(*own, token_x - ref_norm, kl, shift, norm, ref_shift, ref_norm)


def logprob_grad(e: Tensor, tokens: Tensor, temperature: float, stats: Statistics, a: Tensor) -> Tensor:
    """Turn the e^y that `exponentiate` left into dL/dz = (a/T) (1[v = token] − p_v), a = dL/dlogprob."""
    e.mul_((-a / temperature * (-stats.norm).exp()).unsqueeze(1))
    return e.scatter_add_(1, tokens.long().unsqueeze(1), (a / temperature).unsqueeze(1))


def logits_grad(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    mask: Tensor,
    stats: Statistics,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: Tensor,
) -> Tensor:
    """Write the gradient in `logits` for upstream gradients (a, b, c) of log-prob, entropy and KL into `out` [N, V]:

        dL/dz_v = (1/T) {a 1[v = token] + p_v [−a − b (log p_v + H) + c (log p_v − log q_v − KL)]}

    `out` may be the logits themselves. Masked rows become zero.
    """
    if not mask.all():
        out[~mask] = 0
    for rows in row_blocks(mask, logits.shape[-1] * stats.norm.element_size()):
        a, b, c = (torch.zeros_like(stats.norm[rows]) if x is None else x[rows] for x in upstream)
        logp = _logp(take_rows(logits, rows, a.dtype), temperature, stats.shift[rows], stats.norm[rows])
        grad = logp.exp()
        if upstream[1] is None and upstream[2] is None:
            grad.mul_(-a.unsqueeze(1))
        else:
            kl, constant = stats.kl[rows] if upstream[2] is not None else c, -a - b * stats.entropy[rows]
            c = torch.where(kl < INF, c, 0.0)  # an infinite KL passes no gradient
            weights = _finite(logp).mul_((c - b).unsqueeze(1)).add_((constant - c * kl.clamp(max=1e30)).unsqueeze(1))
            if upstream[2] is not None:
                z = take_rows(ref_logits, rows, a.dtype)
                logq = _finite(_logp(z, temperature, stats.ref_shift[rows], stats.ref_norm[rows]))
                weights.addcmul_(logq, c.unsqueeze(1), value=-1)
            grad.mul_(weights)
        if upstream[0] is not None:
            chosen = tokens[rows].long()
            here = (chosen >= 0) & (chosen < grad.shape[1])  # in a tile of the vocabulary it may be elsewhere
            grad.scatter_add_(1, torch.where(here, chosen, 0).unsqueeze(1), torch.where(here, a, 0.0).unsqueeze(1))
        out[rows] = (grad if temperature == 1 else grad.div_(temperature)).to(out.dtype)
    return out


def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    tau: float, gamma: float, lam: float, alpha: float,
) -> LambdaReturns:  # fmt: skip
    """`reference.lambda_returns` without a loop over time."""
    given = (rewards, values, logprobs, ref_logprobs, *([] if trace_weights is None else [trace_weights]))
    r, v, logp, logq, *weights = reference.clean(mask, *given)
    q = reference.q_values(logp, logq, v, tau)
    td_errors = r.add_(reference.shift_left(v), alpha=gamma).sub_(q)  # v, q and r are 0 where masked
    if trace_weights is None:
        advantages = discounted_sums(td_errors, gamma * lam)
    else:
        advantages = decaying_sums(td_errors, gamma * lam * reference.shift_left(weights[0]))
    return LambdaReturns(torch.add(q, advantages, alpha=alpha), advantages, td_errors)


def discounted_sums(x: Tensor, g: float, block: int = 64) -> Tensor:
    """Σ_k g^k x_{t+k} along the last axis of x [B, T], as two triangular matrix products: in blocks, then over blocks.

    >>> discounted_sums(torch.ones(1, 3), 0.5)
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    steps = x.shape[1]
    local = torch.nn.functional.pad(x, (0, -steps % block)).unflatten(1, (-1, block)) @ _powers(
        block, g, x.dtype, x.device
    )
    later = local[:, :, 0] @ _powers(
        local.shape[1], g**block, x.dtype, x.device
    )  # the sum from each block's start to the row's end
    to_next = g ** torch.arange(block, 0, -1, dtype=x.dtype, device=x.device)
    return (local + reference.shift_left(later).unsqueeze(2) * to_next).flatten(1)[:, :steps].contiguous()


def decaying_sums(x: Tensor, decay: Tensor) -> Tensor:
    """S_t = x_t + decay_t S_{t+1} along the last axis by doubling: after round k, (decay, S)_t covers 2^k steps."""
    total, step = x.clone(), 1
    while step < x.shape[1]:
        total[:, :-step] += decay[:, :-step] * total[:, step:].clone()
        decay = decay * reference.shift_left(decay, step)
        step *= 2
    return total


@functools.lru_cache(maxsize=8)
def _powers(size: int, g: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size] with g^(j−i) at [j, i], j ≥ i, and 0 elsewhere."""
    gap = torch.arange(size, dtype=dtype, device=device)
    gap = gap.unsqueeze(1) - gap
    return torch.where(gap >= 0, g ** gap.clamp(min=0), 0.0)


def row_blocks(mask: Tensor, bytes_per_row: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice | Tensor]:
    """Unmasked rows in equal blocks of at most `block_bytes` (or one row): slices where nothing is masked, else
    index tensors."""
    most = max(1, block_bytes // max(1, bytes_per_row))
    count = int(mask.sum())
    size = math.ceil(max(1, count) / math.ceil(max(1, count) / most))
    if count == len(mask):
        yield from (slice(start, min(start + size, len(mask))) for start in range(0, len(mask), size))
    else:
        yield from mask.nonzero().squeeze(1).split(size) if count else ()


def take_rows(x: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """These rows of x [..., V] as [n, V] in this dtype, for reading only; a strided x is never copied as a whole."""
    if x.dim() == 2 or x.is_contiguous():
        return x.reshape(-1, x.shape[-1])[rows].to(dtype)
    x = x.flatten(0, -3) if x.dim() > 3 else x
    index = torch.arange(rows.start, rows.stop, device=x.device) if isinstance(rows, slice) else rows
    return x[index // x.shape[1], index % x.shape[1]].to(dtype)


def _normalise(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log softmax(z/temperature), shift, norm) of each row of z."""
    shift = z.amax(1)
    logp = torch.log_softmax(z if temperature == 1 else (z - shift.unsqueeze(1)).mul_(1 / temperature), 1)
    return logp, shift, -logp.amax(1)


def _logp(z: Tensor, temperature: float, shift: Tensor, norm: Tensor) -> Tensor:
    """(z − shift)/temperature − norm; subtracting first keeps a common offset from rounding."""
    x = z - shift.unsqueeze(1)
    return (x if temperature == 1 else x.mul_(1 / temperature)).sub_(norm.unsqueeze(1))


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    """−Σ p log p of each row, with 0 log 0 = 0."""
    return -_cross(p, logp)


def _kl(p: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """D(p ‖ q) of each row: Σ p d, d = log(p/q), or where that is small Σ p (e^(−d) − 1 + d), whose terms are ≥ 0."""
    d = logp - logq
    kl = torch.linalg.vecdot(p, d)
    if (kl > SMALL_KL).all():
        return kl
    low, high = d.aminmax()
    if not (low > FAR and high < INF):  # also where −inf − −inf made NaN
        return reference.kl_divergence(logp, logq)
    return torch.where(kl > SMALL_KL, kl, torch.linalg.vecdot(p, d.neg().expm1_().add_(d)))


def _choose(x: Tensor, tokens: Tensor) -> Tensor:
    """x[n, tokens[n]]."""
    return x.gather(1, tokens.long().unsqueeze(1)).squeeze(1)


def _scaled_gap(z: Tensor, shift: Tensor, temperature: float, out: Tensor) -> Tensor:
    """(z − shift)/temperature of each row; subtracting first keeps a common offset from rounding."""
    torch.sub(z, shift.unsqueeze(1), out=out)
    return out if temperature == 1 else out.mul_(1 / temperature)


def _cross(p: Tensor, d: Tensor) -> Tensor:
    """Σ p d of each row, where p = 0 contributes 0 whatever d is."""
    sums = torch.linalg.vecdot(p, d)
    return torch.linalg.vecdot(p, d.masked_fill(p == 0, 0.0)) if sums.isnan().any() else sums


def _finite(logp: Tensor) -> Tensor:
    """logp with −inf replaced by 0: wherever it is multiplied by p = 0 anyway."""
    return logp.masked_fill(logp == -INF, 0.0) if logp.amin() == -INF else logp
