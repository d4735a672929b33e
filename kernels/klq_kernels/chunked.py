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

from klq_kernels import reference, tiled
from klq_kernels.reference import clean, result_dtype
from klq_kernels.tiled import Statistics, empty_statistics, row_blocks

WORKSPACE_BYTES = 1 << 26  # 64 MiB: 458 rows of 32,000 tokens, and an eighth of it for the reference's tiles
REF_SHARE = 8


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

    def logits(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        """Logits of these rows in the working dtype, written to `out`."""
        z = product(self.hidden[rows], self.weight.t(), out)
        return z if self.bias is None else z.add_(self.bias)


class Gradients(NamedTuple):
    """Gradients of a head's hidden states, weight and bias; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, head: Head, needed: tuple[bool, bool, bool]) -> "Gradients":
        """Zero accumulators: the weight's in the working dtype, since many chunks add to it."""
        dtype = result_dtype(head.weight)
        made = (torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip(head, needed, strict=True))
        return cls(*made)

    def add(self, head: Head, rows: slice | Tensor, dz: Tensor) -> None:
        """Add what logit gradients dz [n, V] of these rows contribute."""
        dz = dz.to(head.hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = product(dz, head.weight)
        if self.weight is not None:
            add_product(self.weight, dz.t(), head.hidden[rows])
        if self.bias is not None:
            self.bias.add_(dz.sum(0, dtype=self.bias.dtype))

    def like(self, head: Head) -> "Gradients":
        """In the dtypes of what they are gradients of."""
        return Gradients(*(None if g is None else g.to(x.dtype) for g, x in zip(self, head, strict=True)))


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Statistics:
    """`reference.linear_token_stats`, chunk by chunk."""
    policy, ref = policy.workable(), ref and ref.workable()
    out = empty_statistics(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    for rows, z in logit_chunks(policy, mask, workspace, shared=ref is not None):
        store(out, rows, chunk_stats(tiled, z, tokens[rows], ref, rows, temperature, mask[rows], workspace))
    return out


def linear_grad(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, stats: Statistics,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None], needed: tuple[bool, bool, bool], workspace: int,
) -> Gradients:  # fmt: skip
    """Gradients of what `linear_stats` returned: the logits are computed once more, the reference's only if the KL
    has an upstream gradient."""
    grads, given = Gradients.zeros(policy, needed), policy
    policy, ref = policy.workable(), None if upstream[2] is None else ref.workable()
    for rows, z in logit_chunks(policy, mask, workspace, shared=ref is not None):
        some = Statistics(*(x[rows] if len(x) else x for x in stats))
        ups = tuple(None if x is None else x[rows] for x in upstream)
        for columns, r in reference_tiles(ref, rows, z, workspace):
            part, inside = z[:, columns], tokens[rows] - columns.start
            tiled.logits_grad(part, inside, r, temperature, mask[rows], some, ups, part)
        grads.add(policy, rows, z)
    return grads.like(given)


def linear_klq(
    kernels: ModuleType, policy: Head, tokens: Tensor, ref: Head | None, values: Tensor, temperature: float,
    mask: Tensor, fixed: dict, variant: dict, needed: tuple[bool, bool, bool], workspace: int,
) -> tuple[Tensor, Statistics, Gradients, Tensor]:  # fmt: skip
    """KLQ's loss, the statistics, and all gradients (hidden, weight, bias; values) from one pass over the vocabulary.

    Within a chunk the log-probs are known as soon as its logits are, hence the loss and its gradient: nothing is
    computed twice. Matrix products: one for the logits, one for the reference's, one per gradient. `fixed` holds
    klq_loss's tensors without gradient, `variant` its settings; `kernels` works on logits.
    """
    grads, count, given_policy = Gradients.zeros(policy, needed), mask.sum().clamp(min=1), policy
    policy, ref = policy.workable(), ref and ref.workable()
    stats = empty_statistics(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    dvalues = torch.zeros_like(values, dtype=result_dtype(values, stats.logprob))
    total = dvalues.new_zeros(())
    for rows, z in logit_chunks(policy, mask, workspace, shared=ref is not None):
        part = chunk_stats(kernels, z, tokens[rows], ref, rows, temperature, mask[rows], workspace)
        store(stats, rows, part)
        given = {name: None if x is None else x[rows] for name, x in fixed.items()}
        given["ref_logprobs"] = part.ref_logprob if ref else given["ref_logprobs"]
        loss, a, dvalues[rows] = klq_terms(part.logprob, values[rows], mask[rows], **given, **variant)
        total = total + loss
        if any(needed):
            grads.add(policy, rows, chunk_grad(kernels, z, tokens[rows], temperature, mask[rows], part, a / count))
    return total / count, stats, grads.like(given_policy), dvalues / count


def klq_terms(
    logprobs: Tensor, values: Tensor, mask: Tensor, *, ref_logprobs: Tensor, targets: Tensor, tau: float,
    loss: str = "l2", clip: float | None = None, log_ratio_clip: float | None = None, delta: float | None = None,
    old_logprobs: Tensor | None = None, old_values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of `reference.klq_loss` over tokens, and its derivatives in each log-prob and value, as autograd has them.

    A clipped candidate that is worse than ½e² is out of its clamp's range: no gradient passes what is clamped.
    """
    thresholds = dict(clip=clip, log_ratio_clip=log_ratio_clip, delta=delta)
    old = dict(old_logprobs=old_logprobs, old_values=old_values)
    terms = reference.klq_loss(
        logprobs, ref_logprobs, values, targets, mask, tau=tau, loss=loss, **thresholds, **old, reduction="none"
    )
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
    overwritten by each. If it is shared, what `reference_tiles` needs is left free."""
    size, dtype = workspace * (REF_SHARE - 1) // REF_SHARE if shared else workspace, result_dtype(policy.weight)
    buffer = None
    for rows in row_blocks(mask, len(policy.weight) * dtype.itemsize, size):
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        if buffer is None:  # the first chunk is the largest
            buffer = policy.weight.new_empty((count, len(policy.weight)), dtype=dtype)
        yield rows, policy.logits(rows, buffer[:count])


def reference_tiles(
    ref: Head | None, rows: slice | Tensor, z: Tensor, workspace: int
) -> Iterator[tuple[slice, Tensor | None]]:
    """(columns, the reference's logits there) for these rows, over the whole vocabulary; without a reference, one tile
    with no logits. Tiles, not rows: a product of few rows is slow."""
    vocab = z.shape[1]
    if ref is None:
        yield slice(0, vocab), None
        return
    dtype = result_dtype(ref.weight)
    width = max(1, workspace // REF_SHARE // (dtype.itemsize * len(z)))
    width = math.ceil(vocab / math.ceil(vocab / width))
    hidden, buffer = ref.hidden[rows], ref.weight.new_empty(len(z) * width, dtype=dtype)
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        tile = Head(hidden, ref.weight[columns], None if ref.bias is None else ref.bias[columns])
        out = buffer[: len(z) * (columns.stop - start)].view(len(z), -1)
        yield columns, tile.logits(slice(None), out)


def chunk_stats(
    kernels: ModuleType, z: Tensor, tokens: Tensor, ref: Head | None, rows: slice | Tensor, temperature: float,
    mask: Tensor, workspace: int,
) -> Statistics:  # fmt: skip
    """Statistics of a chunk whose policy logits are z. `tiled` exponentiates z and needs the reference's logits tile by
    tile; other kernels keep z and visit both rows together (then another workspace is needed)."""
    if kernels is tiled:
        return tiled.exponentiate(z, tokens, reference_tiles(ref, rows, z, workspace), temperature)
    r = None if ref is None else ref.logits(rows, torch.empty_like(z))
    return kernels.logits_stats(z, tokens, r, temperature, mask)


def chunk_grad(
    kernels: ModuleType, z: Tensor, tokens: Tensor, temperature: float, mask: Tensor, stats: Statistics, a: Tensor
) -> Tensor:
    """Logit gradients of a chunk for upstream gradients a of its log-probs, in place of what `chunk_stats` left."""
    if kernels is tiled:
        return tiled.logprob_grad(z, tokens, temperature, stats, a)
    return kernels.logits_grad(z, tokens, None, temperature, mask, stats, (a, None, None), z)


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


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))
