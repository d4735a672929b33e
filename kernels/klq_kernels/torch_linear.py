"""Operations from hidden states in chunks of rows: a chunk's logits live in a workspace of bounded size, never all.

The work on logits is done by a backend's `logits_stats` and `logits_grad`; the matrix products are torch's. `Head` is
the policy's (or the reference's) hidden states with the matrix and the bias that make logits of them.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import reference, torch_logits
from klq_kernels.reference import clean, result_dtype
from klq_kernels.torch_logits import Statistics, empty_statistics, row_blocks

WORKSPACE_BYTES = 1 << 26  # 64 MiB: 524 rows of 32,000 tokens, 458 beside a reference, whose tiles get an eighth
REF_SHARE = 8
ALIGNED = 64  # columns: rows of a tile start at whole cache lines
TALLEST = 2048  # rows of a tile; beyond that a product gains nothing


class Head(NamedTuple):
    """hidden [N, H], weight [V, H], bias [V] or None: logits = hidden weightᵀ + bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def workable(self) -> "Head":
        """Itself, or in float32 where the CPU has no fast products of its 16-bit type."""
        if self.weight.is_cuda or native(self.weight.dtype):
            return self
        dtype = result_dtype(self.weight)
        return Head(*(x if x is None else x.to(dtype) for x in self))

    def take(self, rows: slice | Tensor = slice(None), columns: slice = slice(None)) -> "Head":
        """The head of these rows for these columns of the vocabulary."""
        return Head(self.hidden[rows], self.weight[columns], None if self.bias is None else self.bias[columns])

    def logits(self, out: Tensor) -> Tensor:
        """All logits in the working dtype, written to `out`."""
        if self.bias is not None and native(self.weight.dtype) and not self.weight.is_cuda:
            return out.copy_(torch.addmm(self.bias, self.hidden, self.weight.t()))
        z = product(self.hidden, self.weight.t(), out)
        return z if self.bias is None else z.add_(self.bias)


class Gradients(NamedTuple):
    """Gradients of a head's hidden states, weight and bias; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def start(cls, head: Head, needed: tuple[bool, bool, bool], mask: Tensor) -> "Gradients":
        """Accumulators in the working dtype, zero but for the weight's, which the first rows overwrite if any come."""
        dtype = result_dtype(head.weight)
        weight = torch.empty_like if mask.any() else torch.zeros_like
        made = (torch.zeros_like, weight, torch.zeros_like)
        return cls(*(f(x, dtype=dtype) if need else None for f, x, need in zip(made, head, needed, strict=True)))

    def add(
        self, part: Head, rows: slice | Tensor, columns: slice, dz: Tensor, scale: Tensor | None, first: bool
    ) -> None:
        """Add what logit gradients dz [n, v] of these rows and columns contribute, if given times scale [n]; `part` is
        the head of these, `first` says that these are the first rows.

        In float32 the scale costs no visit to dz: it is put on the hidden states and on their gradients.
        """
        if scale is not None and dz.dtype != part.hidden.dtype:
            dz, scale = dz.mul_(scale.unsqueeze(1)), None
        dz, hidden = dz.to(part.hidden.dtype), part.hidden
        if scale is not None:
            hidden = hidden * scale.unsqueeze(1)
        if self.hidden is not None:
            dh = product(dz, part.weight)
            self.hidden[rows] += dh if scale is None else dh.mul_(scale.unsqueeze(1))
        if self.weight is not None:
            add_product(self.weight[columns], dz.t(), hidden, first)
        if self.bias is not None:
            self.bias[columns] += dz.sum(0, dtype=self.bias.dtype) if scale is None else scale @ dz

    def like(self, head: Head) -> "Gradients":
        """In the dtypes of what they are gradients of."""
        return Gradients(*(None if g is None else g.to(x.dtype) for g, x in zip(self, head, strict=True)))


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Statistics:
    """`reference.linear_token_stats`, tile by tile."""
    policy, ref = policy.workable(), ref and ref.workable()
    out = empty_statistics(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    for rows in tall_blocks(mask, policy, ref, workspace):
        whole, chosen = None, tokens[rows]
        for columns, (z, r) in logit_tiles((policy.take(rows), ref and ref.take(rows)), workspace):
            inside = chosen - columns.start
            tile = torch_logits.softmax_stats(z, inside, r, temperature)
            whole = torch_logits.join(whole, tile, inside >= 0, temperature)
        store(out, rows, torch_logits.finished(whole, out.norm.dtype))
    return out


def linear_grad(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, stats: Statistics,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None], needed: tuple[bool, bool, bool], workspace: int,
) -> Gradients:  # fmt: skip
    """Gradients of what `linear_stats` returned: the logits are computed once more, the reference's only if the KL
    has an upstream gradient."""
    grads, given = Gradients.start(policy, needed, mask), policy
    policy, ref = policy.workable(), None if upstream[2] is None else ref.workable()
    for index, rows in enumerate(tall_blocks(mask, policy, ref, workspace)):
        some = Statistics(*(x[rows] if len(x) else x for x in stats))
        ups = tuple(None if x is None else x[rows] for x in upstream)
        mine, chosen, real = policy.take(rows), tokens[rows], mask[rows]
        for columns, (z, r) in logit_tiles((mine, ref and ref.take(rows)), workspace):
            torch_logits.logits_grad(z, chosen - columns.start, r, temperature, real, some, ups, z)
            grads.add(mine.take(columns=columns), rows, columns, z, None, first=index == 0)
    return grads.like(given)


def linear_klq(
    kernels: ModuleType, policy: Head, tokens: Tensor, ref: Head | None, values: Tensor, temperature: float,
    mask: Tensor, fixed: tuple, variant: tuple, needed: tuple[bool, bool, bool], workspace: int,
) -> tuple[Tensor, Statistics, Gradients, Tensor]:  # fmt: skip
    """KLQ's loss, the statistics, and all gradients (hidden, weight, bias; values) from one pass over the vocabulary.

    Within a chunk the log-probs are known as soon as its logits are, hence the loss and its gradient: nothing is
    computed twice. Matrix products: one for the logits, one for the reference's, one per gradient. `fixed` holds
    `klq_terms`'s tensors without gradient, `variant` its settings; `kernels` works on logits.
    """
    grads, count, given_policy = Gradients.start(policy, needed, mask), mask.sum().clamp(min=1), policy
    policy, ref = policy.workable(), ref and ref.workable()
    stats = empty_statistics(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    dvalues = torch.zeros_like(values, dtype=result_dtype(values, stats.logprob))
    total = dvalues.new_zeros(())
    for index, (rows, z) in enumerate(logit_chunks(policy, mask, workspace, shared=ref is not None)):
        part = chunk_stats(kernels, z, tokens[rows], ref, rows, temperature, mask[rows], workspace)
        store(stats, rows, part)
        logq, *given = (None if x is None else x[rows] for x in fixed)
        logq = part.ref_logprob if ref else logq
        loss, a, dvalues[rows] = klq_terms(part.logprob, values[rows], mask[rows], logq, *given, *variant)
        total = total + loss
        if any(needed):
            dz, scale = chunk_grad(kernels, z, tokens[rows], temperature, mask[rows], part, a / count)
            grads.add(policy.take(rows), rows, slice(None), dz, scale, first=index == 0)
    return total / count, stats, grads.like(given_policy), dvalues / count


def klq_terms(
    logprobs: Tensor, values: Tensor, mask: Tensor, ref_logprobs: Tensor, targets: Tensor, old_logprobs: Tensor | None,
    old_values: Tensor | None, tau: float, loss: str, clip: float | None, log_ratio_clip: float | None,
    delta: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of `reference.klq_loss` over tokens, and its derivatives in each log-prob and value, as autograd has them.

    A clipped candidate that is worse than ½e² is out of its clamp's range: no gradient passes what is clamped.
    """
    terms = reference.klq_loss(
        logprobs, ref_logprobs, values, targets, mask, tau=tau, loss=loss, clip=clip, log_ratio_clip=log_ratio_clip,
        delta=delta, old_logprobs=old_logprobs, old_values=old_values, reduction="none",
    )  # fmt: skip
    old = (x if x is not None else y for x, y in ((old_logprobs, logprobs), (old_values, values)))
    logp, v, logq, target, old_logp, old_v = clean(mask, logprobs, values, ref_logprobs, targets, *old)
    error = reference.q_values(logp, logq, v, tau) - target
    dv = error.clamp(-delta, delta) if loss == "huber" else error
    dlogp, worst = tau * dv, error.abs()
    if loss in ("value_clipped", "double_clipped"):
        q_old = reference.q_values(old_logp, logq, old_v, tau)
        clamped = (reference.clamp_around(error + target, q_old, clip) - target).abs()
        dlogp, dv = (x.masked_fill(clamped > worst, 0.0) for x in (dlogp, dv))
        worst = torch.maximum(worst, clamped)
    if loss in ("ratio_clipped", "double_clipped"):
        near = reference.clamp_around(logp, old_logp, log_ratio_clip)
        clamped = reference.q_values(near, logq, v, tau) - target
        dlogp = dlogp.masked_fill(clamped.abs() > worst, 0.0)
        dv = torch.where(clamped.abs() > worst, clamped, dv)
    return terms.sum(), dlogp, dv


def logit_chunks(policy: Head, mask: Tensor, workspace: int, shared: bool) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(rows, logits) of unmasked rows in chunks that fit the workspace (at least one row), which is allocated once and
    overwritten by each. If it is shared, what the reference's tiles need is left free."""
    size, dtype = workspace * (REF_SHARE - 1) // REF_SHARE if shared else workspace, result_dtype(policy.weight)
    buffer = None
    for rows in row_blocks(mask, len(policy.weight) * dtype.itemsize, size):
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        if buffer is None:  # the first chunk is the largest
            buffer = policy.weight.new_empty((count, len(policy.weight)), dtype=dtype)
        yield rows, policy.take(rows).logits(buffer[:count])


def tall_blocks(mask: Tensor, policy: Head, ref: Head | None, workspace: int) -> Iterator[slice | Tensor]:
    """Unmasked rows in blocks so tall that square tiles of the models' logits fill the workspace, within reason."""
    itemsize = result_dtype(policy.weight).itemsize * (1 if ref is None else 2)
    return row_blocks(mask, 1, min(TALLEST, math.isqrt(workspace // itemsize)))


def logit_tiles(heads: tuple[Head | None, ...], workspace: int) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """(columns, each head's logits there or None) over the whole vocabulary, in tiles that fit the workspace together;
    each tile overwrites the last. Tiles, not fewer rows: a product of few rows is slow."""
    count, vocab = next((len(h.hidden), len(h.weight)) for h in heads if h)
    dtypes = [head and result_dtype(head.weight) for head in heads]
    width = max(1, workspace // (count * sum(dtype.itemsize for dtype in dtypes if dtype)))
    even = math.ceil(vocab / math.ceil(vocab / width))
    width = min(width, ALIGNED * math.ceil(even / ALIGNED))
    buffers = [h and h.weight.new_empty(count * width, dtype=dtype) for h, dtype in zip(heads, dtypes, strict=True)]
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        out = (None if x is None else x[: count * (columns.stop - start)].view(count, -1) for x in buffers)
        yield columns, [h and h.take(columns=columns).logits(x) for h, x in zip(heads, out, strict=True)]


def chunk_stats(
    kernels: ModuleType, z: Tensor, tokens: Tensor, ref: Head | None, rows: slice | Tensor, temperature: float,
    mask: Tensor, workspace: int,
) -> Statistics:  # fmt: skip
    """Statistics of a chunk whose policy logits are z. `torch_logits` leaves their softmax in z and takes the
    reference's logits tile by tile; others keep z and visit both rows together (then another workspace is needed)."""
    if kernels is not torch_logits:
        r = None if ref is None else ref.take(rows).logits(torch.empty_like(z))
        return kernels.logits_stats(z, tokens, r, temperature, mask)
    whole, parts = None, []
    alone = [(slice(0, z.shape[1]), [None])]
    for columns, (r,) in alone if ref is None else logit_tiles((ref.take(rows),), workspace // REF_SHARE):
        inside = tokens - columns.start
        tile = torch_logits.softmax_stats(z[:, columns], inside, r, temperature)
        whole = torch_logits.join(whole, tile, inside >= 0, temperature)
        parts.append((columns, tile))
    if len(parts) > 1:
        for columns, tile in parts:
            z[:, columns].mul_(torch_logits.shares(tile, whole, temperature).to(z.dtype).unsqueeze(1))
    return torch_logits.finished(whole, z.dtype)


def chunk_grad(
    kernels: ModuleType, z: Tensor, tokens: Tensor, temperature: float, mask: Tensor, stats: Statistics, a: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logit gradients for upstream gradients a of the log-probs, in place of what `chunk_stats` left, and a factor per
    row that is still to be applied: dL/dz = −(a/T) (p_v − 1[v = token])."""
    if kernels is torch_logits:
        index = tokens.long().unsqueeze(1)
        return z.scatter_add_(1, index, z.new_full((1, 1), -1.0).expand_as(index)), -a / temperature
    return kernels.logits_grad(z, tokens, None, temperature, mask, stats, (a, None, None), z), None


def store(out: Statistics, rows: slice | Tensor, part: Statistics) -> None:
    """Write a chunk's statistics into their rows."""
    for whole, piece in zip(out, part, strict=True):
        if len(whole):
            whole[rows] = piece


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in the working dtype (in `out` if given)."""
    dtype = result_dtype(a, b)
    if a.is_cuda and a.dtype == b.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    if native(a.dtype) and a.dtype == b.dtype:
        narrow = torch.mm(a, b)
        return narrow.to(dtype) if out is None else out.copy_(narrow)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this 16-bit type faster than their float32 copies."""
    return dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, or total = a @ b the first time."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    else:
        ab = torch.mm(a, b) if native(a.dtype) and a.dtype == b.dtype and not a.is_cuda else product(a, b)
        total.copy_(ab) if first else total.add_(ab)
