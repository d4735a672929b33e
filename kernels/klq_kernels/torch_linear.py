"""The `torch` backend from hidden states: chunks of rows or tiles of the vocabulary, whose logits live in a workspace
of bounded size, never all; and the fused loss of both backends. `torch_logits` works on the logits, torch multiplies.
"""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from klq_kernels import torch_logits
from klq_kernels.loss import klq_terms
from klq_kernels.torch_logits import row_blocks
from klq_kernels.types import Gradients, Head, LossInputs, LossSettings, Residuals, Rows, Upstream, result_dtype, select

WORKSPACE_BYTES = 1 << 26  # 64 MiB: 524 rows of 32,000 tokens, 458 beside a reference, whose tiles get an eighth
REF_SHARE = 8
ALIGNED = 64  # columns: rows of a tile start at whole cache lines
TALLEST = 2048  # rows of a tile; beyond that a product gains nothing


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """`reference.linear_token_stats` tile by tile, as in Cut Cross-Entropy (Wijmans et al. 2024): hidden [N, H], weight
    [V, H], tokens and mask [N] -> residuals [N], zero where masked."""
    policy, ref = _workable(policy), ref and _workable(ref)
    out = Residuals.zeros(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    for rows in tall_blocks(mask, policy, ref, workspace):
        whole, chosen = None, tokens[rows]
        for columns, (z, r) in logit_tiles((policy.take(rows), ref and ref.take(rows)), workspace):
            inside = chosen - columns.start
            tile = torch_logits.softmax_stats(z, inside, r, temperature)
            whole = torch_logits.join(whole, tile, inside >= 0, temperature)
        out.store(rows, torch_logits.finished(whole, out.lse.dtype))
    return out


def linear_grad(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, stats: Residuals,
    upstream: Upstream, needed: tuple[bool, bool, bool], workspace: int,
) -> Gradients:  # fmt: skip
    """Gradients [N, H], [V, H], [V] of what `linear_stats` returned: the logits are computed once more (Wijmans et al.
    2024), the reference's only if the KL has an upstream gradient."""
    grads, given = _start(policy, needed, mask), policy
    policy, ref = _workable(policy), None if upstream.kl is None else _workable(ref)
    for index, rows in enumerate(tall_blocks(mask, policy, ref, workspace)):
        some, ups, mine, chosen = select(stats, rows), select(upstream, rows), policy.take(rows), tokens[rows]
        for columns, (z, r) in logit_tiles((mine, ref and ref.take(rows)), workspace):
            torch_logits.logits_grad(z, chosen - columns.start, r, temperature, mask[rows], some, ups, z)
            _add(grads, mine.take(columns=columns), rows, columns, z, None, first=index == 0)
    return grads.like(given)


def linear_klq(
    kernels: ModuleType, policy: Head, tokens: Tensor, ref: Head | None, temperature: float, inputs: LossInputs,
    settings: LossSettings, needed: tuple[bool, bool, bool], workspace: int,
) -> tuple[Tensor, Residuals, Gradients, Tensor]:  # fmt: skip
    """KLQ's loss, the residuals, and all gradients (hidden, weight, bias; values) from one pass over the vocabulary.

    Within a chunk the log-probs are known as soon as its logits are, hence the loss and its gradient: nothing is
    computed twice. Matrix products: one for the logits, one for the reference's, one per gradient. `kernels` works on a
    chunk's logits. Shapes: hidden [N, H], weight [V, H]; tokens and inputs [N]. Source: arXiv 2508.17000, eq. (6), in
    the chunks of Liger (Hsu et al. 2024).
    """
    grads, count, given = _start(policy, needed, inputs.mask), inputs.mask.sum().clamp(min=1), policy
    policy, ref = _workable(policy), ref and _workable(ref)
    stats = Residuals.zeros(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    dvalues = torch.zeros_like(inputs.values, dtype=result_dtype(inputs.values, stats.logprob))
    total = dvalues.new_zeros(())
    for index, (rows, z) in enumerate(logit_chunks(policy, inputs.mask, workspace, shared=ref is not None)):
        x, chosen = select(inputs, rows), tokens[rows]
        part = kernels.chunk_stats(z, chosen, ref and ref.take(rows), temperature, x.mask, workspace)
        stats.store(rows, part)
        x = x._replace(logprobs=part.logprob, ref_logprobs=part.ref_logprob if ref else x.ref_logprobs)
        loss, a, dvalues[rows] = klq_terms(x, settings)
        total = total + loss
        if any(needed):
            dz, scale = kernels.chunk_grad(z, chosen, temperature, x.mask, part, a / count)
            _add(grads, policy.take(rows), rows, slice(None), dz, scale, first=index == 0)
    return total / count, stats, grads.like(given), dvalues / count


def chunk_stats(
    z: Tensor, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """Residuals [n] of a chunk whose policy logits are z [n, V], in whose place their softmax is left; the reference's
    logits come tile by tile (Dao et al. 2022) and take a share of the workspace."""
    whole, parts = None, []
    alone = [(slice(0, z.shape[1]), [None])]
    for columns, (r,) in alone if ref is None else logit_tiles((ref,), workspace // REF_SHARE):
        inside = tokens - columns.start
        tile = torch_logits.softmax_stats(z[:, columns], inside, r, temperature)
        whole = torch_logits.join(whole, tile, inside >= 0, temperature)
        parts.append((columns, tile))
    if len(parts) > 1:
        for columns, tile in parts:
            share = ((tile.shift - whole.shift) / temperature + tile.lse - whole.lse).exp_()
            z[:, columns].mul_(share.to(z.dtype).unsqueeze(1))
    return torch_logits.finished(whole, z.dtype)


def chunk_grad(
    z: Tensor, tokens: Tensor, temperature: float, mask: Tensor, stats: Residuals, a: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logit gradients [n, V] for upstream gradients a [n] of the log-probs, in place of what `chunk_stats` left, and a
    factor [n] still to be applied (None: none): dL/dz_v = −(a/T) (p_v − 1[v = token]). Source: Hsu et al. 2024."""
    index = tokens.long().unsqueeze(1)
    return z.scatter_add_(1, index, z.new_full((1, 1), -1.0).expand_as(index)), -a / temperature


def logit_chunks(policy: Head, mask: Tensor, workspace: int, shared: bool) -> Iterator[tuple[Rows, Tensor]]:
    """(rows, logits [n, V]) of unmasked rows in chunks that fit the workspace (or one row), which is allocated once and
    overwritten (Hsu et al. 2024). If it is shared, what the reference's tiles need is left free."""
    size, dtype = workspace * (REF_SHARE - 1) // REF_SHARE if shared else workspace, result_dtype(policy.weight)
    buffer = None
    for rows in row_blocks(mask, len(policy.weight) * dtype.itemsize, size):
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        if buffer is None:  # the first chunk is the largest
            buffer = policy.weight.new_empty((count, len(policy.weight)), dtype=dtype)
        yield rows, head_logits(policy.take(rows), buffer[:count])


def tall_blocks(mask: Tensor, policy: Head, ref: Head | None, workspace: int) -> Iterator[Rows]:
    """Unmasked rows of mask [N] in blocks so tall that square tiles of both models' logits fill the workspace, within
    reason."""
    itemsize = result_dtype(policy.weight).itemsize * (1 if ref is None else 2)
    return row_blocks(mask, 1, min(TALLEST, math.isqrt(workspace // itemsize)))


def logit_tiles(heads: tuple[Head | None, ...], workspace: int) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """(columns, each head's logits [n, v] there or None) over the whole vocabulary (Wijmans et al. 2024), in tiles that
    fit the workspace together; each overwrites the last. Tiles, not fewer rows: a product of few rows is slow."""
    count, vocab = next((len(h.hidden), len(h.weight)) for h in heads if h)
    dtypes = [head and result_dtype(head.weight) for head in heads]
    width = max(1, workspace // (count * sum(dtype.itemsize for dtype in dtypes if dtype)))
    even = math.ceil(vocab / math.ceil(vocab / width))
    width = min(width, ALIGNED * math.ceil(even / ALIGNED))
    buffers = [h and h.weight.new_empty(count * width, dtype=dtype) for h, dtype in zip(heads, dtypes, strict=True)]
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        out = (None if x is None else x[: count * (columns.stop - start)].view(count, -1) for x in buffers)
        yield columns, [h and head_logits(h.take(columns=columns), x) for h, x in zip(heads, out, strict=True)]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, [n, k] and [k, v] -> [n, v], accumulated and returned in the working dtype (in `out` if given)."""
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
    """total [n, v] += a @ b, or total = a @ b the first time."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    else:
        ab = torch.mm(a, b) if native(a.dtype) and a.dtype == b.dtype and not a.is_cuda else product(a, b)
        total.copy_(ab) if first else total.add_(ab)


def _workable(head: Head) -> Head:
    """The head itself, or in float32 where the CPU has no fast products of its 16-bit type."""
    if head.weight.is_cuda or native(head.weight.dtype):
        return head
    dtype = result_dtype(head.weight)
    return Head(*(x if x is None else x.to(dtype) for x in head))


def head_logits(head: Head, out: Tensor) -> Tensor:
    """All logits [n, V] of a head in the working dtype, written to `out`."""
    if head.bias is not None and native(head.weight.dtype) and not head.weight.is_cuda:
        return out.copy_(torch.addmm(head.bias, head.hidden, head.weight.t()))
    z = product(head.hidden, head.weight.t(), out)
    return z if head.bias is None else z.add_(head.bias)


def _start(head: Head, needed: tuple[bool, bool, bool], mask: Tensor) -> Gradients:
    """Accumulators in the working dtype, zero but for the weight's, which the first rows overwrite if any come."""
    dtype = result_dtype(head.weight)
    weight = torch.empty_like if mask.any() else torch.zeros_like
    made = (torch.zeros_like, weight, torch.zeros_like)
    return Gradients(*(f(x, dtype=dtype) if need else None for f, x, need in zip(made, head, needed, strict=True)))


def _add(
    grads: Gradients, part: Head, rows: Rows, columns: slice, dz: Tensor, scale: Tensor | None, first: bool
) -> None:
    """Add what logit gradients dz [n, v] of these rows and columns contribute, if given times scale [n]; `part` is the
    head of these, `first` says that these are the first rows.

    In float32 the scale costs no visit to dz: it is put on the hidden states and on their gradients.
    """
    if scale is not None and dz.dtype != part.hidden.dtype:
        dz, scale = dz.mul_(scale.unsqueeze(1)), None
    dz, hidden = dz.to(part.hidden.dtype), part.hidden
    if scale is not None:
        hidden = hidden * scale.unsqueeze(1)
    if grads.hidden is not None:
        dh = product(dz, part.weight)
        grads.hidden[rows] += dh if scale is None else dh.mul_(scale.unsqueeze(1))
    if grads.weight is not None:
        add_product(grads.weight[columns], dz.t(), hidden, first)
    if grads.bias is not None:
        grads.bias[columns] += dz.sum(0, dtype=grads.bias.dtype) if scale is None else scale @ dz
