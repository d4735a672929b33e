"""From hidden states, in tiles of the vocabulary or chunks of rows, whose logits live in a workspace of bounded size.

The statistics are the `torch` backend's. Gradients and fused loss serve both backends: their matrix products are
torch's, and what happens to the logits between them is the business of a backend's module `kernels`.
"""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from klq_kernels import reference, torch_logits
from klq_kernels.loss import add_q, klq_terms
from klq_kernels.torch_logits import BLOCK_BYTES, blocks
from klq_kernels.types import Head, LossInputs, LossSettings, Residuals, Rows, Upstream, result_dtype, select

WORKSPACE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}  # 1,048 and 8,388 rows of 32,000 tokens in 16 bits
TALLEST = {"cpu": 2048, "cuda": 8192}  # rows of a tile; beyond that a product gains nothing
REF_SHARE = 1 / 3  # of the workspace, for the reference's logits
ALIGNED = 64  # columns: rows of a tile start at whole cache lines
LARGEST = 64.0  # that float16 gradients are scaled to: 2¹⁰ below overflow, and a p of 1e−6 remains a normal number


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int,
    values: Tensor | None = None, tau: float = 0.0,
) -> Residuals:  # fmt: skip
    """`reference.linear_token_stats` tile by tile, as in Cut Cross-Entropy (Wijmans et al. 2024): hidden [N, H], weight
    [V, H]; tokens, mask and, for Q, values [N] -> residuals [N], zero where masked."""
    out = Residuals.zeros(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    rows, tokens, policy, ref = _live(mask, tokens, policy, ref)
    some, live = Residuals.zeros(tokens, out.lse.dtype, ref is not None), mask[rows]
    for block in blocks(len(tokens), _height((policy, ref), workspace)):
        whole, chosen = None, tokens[block]
        for columns, _, (z, r) in logit_tiles((policy.take(block), ref and ref.take(block)), workspace):
            inside = chosen - columns.start
            tile = torch_logits.softmax_stats(z, inside, r, temperature)
            whole = torch_logits.join(whole, tile, inside >= 0)
        some.store(block, torch_logits.finished(whole, temperature, live[block], out.lse.dtype))
    out.store(rows, some)
    return add_q(out, values, tau, mask)


def linear_grad(
    kernels: ModuleType, policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor,
    stats: Residuals, upstream: Upstream, needed: tuple[bool, bool, bool], workspace: int,
) -> Head:  # fmt: skip
    """Gradients [N, H], [V, H], [V] of what `linear_stats` returned. Slab by slab of the vocabulary the logits are
    computed once more (Wijmans et al. 2024), the reference's only if the KL has an upstream gradient; `kernels` (on
    logits) turns them into their gradients, and two products these into those of hidden and weight."""
    given = policy
    rows, tokens, policy, ref = _live(mask, tokens, policy, None if upstream.kl is None else ref)
    mask, stats, upstream = mask[rows], select(stats, rows), select(upstream, rows)
    working, exact, buffer = policy.weight.dtype, kernels is not torch_logits, None
    factor, rest = _common_factor(working, _largest(mask, *upstream) / temperature)
    upstream = Upstream(*(x if x is None else x * factor for x in upstream))
    sums, height = HeadSums(policy, needed, rest, given.weight.dtype), _height((policy, ref), workspace, exact)
    for columns, block, (z, r) in logit_tiles((policy, ref), workspace, height, exact, working.itemsize):
        buffer = z.new_empty(z.numel(), dtype=working) if buffer is None else buffer  # the first tile is the largest
        dz = z if z.dtype == working else buffer[: z.numel()].view(z.shape)
        some, ups = select(stats, block), select(upstream, block)
        kernels.logits_grad(z, tokens[block] - columns.start, r, temperature, mask[block], some, ups, dz)
        sums.add(columns, block, dz)
    return sums.gradients(rows, len(given.hidden))


def linear_klq(
    kernels: ModuleType, policy: Head, tokens: Tensor, ref: Head | None, temperature: float, inputs: LossInputs,
    settings: LossSettings, needed: tuple[bool, bool, bool], workspace: int,
) -> tuple[Tensor, Residuals, Head, Tensor]:  # fmt: skip
    """KLQ's loss, the residuals, and all gradients (hidden, weight, bias; values) from one pass over the vocabulary.

    Within a chunk the log-probs are known as soon as its logits are, hence the loss and its gradient: nothing is
    computed twice. Matrix products: one for the logits, one for the reference's, one per gradient. `kernels` works on a
    chunk's logits. Shapes: hidden [N, H], weight [V, H]; tokens and inputs [N]. Source: arXiv 2508.17000, eq. (6), in
    the chunks of Liger (Hsu et al. 2024).
    """
    given, stats = policy, Residuals.zeros(tokens, result_dtype(policy.weight, ref and ref.weight), ref is not None)
    dvalues = torch.zeros_like(inputs.values, dtype=result_dtype(inputs.values, stats.lse))
    rows, tokens, policy, ref = _live(inputs.mask, tokens, policy, ref)
    every, working = select(inputs, rows), policy.weight.dtype
    room = workspace if ref is None else int(workspace * (1 - kernels.REF_SHARE))
    some, dv, total = Residuals.zeros(tokens, stats.lse.dtype, ref is not None), dvalues[rows], dvalues.new_zeros(())
    count = inputs.mask.sum().clamp(min=1).to(total.dtype)
    slope = settings.tau * (_largest(every.mask, every.values - every.targets) + settings.tau)  # some τ for log-ratios
    factor, rest = _common_factor(working, slope / temperature, count)
    sums = HeadSums(policy, needed, rest, kept_dtype(given.weight.dtype))
    for chunk, z in chunks(policy, working, room):
        x = select(every, chunk)
        part = kernels.chunk_stats(z, tokens[chunk], ref and ref.take(chunk), temperature, x.mask, workspace)
        some.store(chunk, part)
        x = x._replace(logprobs=part.logprob, ref_logprobs=part.ref_logprob if ref else x.ref_logprobs)
        loss, a, dv[chunk] = klq_terms(x, settings)
        total = total + loss
        if any(needed):
            dz, scale = kernels.chunk_grad(z, tokens[chunk], temperature, x.mask, part, a * factor)
            sums.add(slice(0, len(policy.weight)), chunk, dz, scale)
    stats.store(rows, some)
    dvalues[rows] = dv / count
    return total / count, stats, sums.gradients(rows, len(given.hidden)), dvalues


def chunks(policy: Head, dtype: torch.dtype, room: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [n, V] in this dtype, which the next overwrite): as many rows as the room has bytes for.
    Chunks of rows as in Liger Kernel's fused linear losses (Hsu et al. 2024)."""
    vocab, buffer = len(policy.weight), None
    for rows in blocks(len(policy.hidden), room // (vocab * dtype.itemsize)):
        buffer = policy.weight.new_empty(rows.stop, vocab, dtype=dtype) if buffer is None else buffer
        yield rows, head_logits(policy.take(rows), buffer[: rows.stop - rows.start])


def chunk_stats(
    z: Tensor, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """Residuals of a chunk whose policy logits are z [n, V], in whose place their softmax is left; the reference's
    logits take their share of the workspace."""
    dtype = result_dtype(z, ref and ref.weight)
    out = Residuals.zeros(tokens, torch.float64, ref is not None)
    alone, room = [(slice(0, len(z)), None)], int(workspace * REF_SHARE)
    for rows, r in alone if ref is None else chunks(ref, _tile_dtype(ref.weight, exact=False), room):
        out.store(rows, torch_logits.softmax_stats(z[rows], tokens[rows], r, temperature))
    return torch_logits.finished(out, temperature, mask, dtype)


def chunk_grad(
    z: Tensor, tokens: Tensor, temperature: float, mask: Tensor, stats: Residuals, a: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logit gradients [n, V] for upstream gradients a [n] of the log-probs, in place of what `chunk_stats` left, and a
    factor [n] still to be applied (None: none): dL/dz_v = −(a/T) (p_v − 1[v = token]), where p − 1 of the token comes
    from its log-prob and not from a p that 16 bits have rounded to 1. Source: Hsu et al. 2024."""
    z[torch.arange(len(z), device=z.device), tokens.long()] = torch.expm1(stats.logprob).to(z.dtype)
    return z, -a / temperature


def logit_tiles(
    heads: tuple[Head | None, ...], workspace: int, height: int = 1 << 30, exact: bool = False, room: int = 0
) -> Iterator[tuple[slice, slice, list[Tensor | None]]]:
    """(columns, rows, each head's logits [n, v] there or None): the vocabulary (Wijmans et al. 2024) in slabs, each in
    blocks of rows at most `height` high, which fit the workspace together, with `room` more bytes per logit where they
    are wider than that; each tile overwrites the last. Tiles, not fewer rows: a product of few rows is slow."""
    count, vocab = next((len(h.hidden), len(h.weight)) for h in heads if h)
    rows, dtypes = [*blocks(count, height)], [h and _tile_dtype(h.weight, exact) for h in heads]
    sizes = [dtype.itemsize for dtype in dtypes if dtype]
    height = rows[0].stop if rows else 1
    width = max(1, workspace // (height * (sum(sizes) + (room if room < max(sizes) else 0))))
    even = math.ceil(vocab / math.ceil(vocab / width))
    width = min(width, ALIGNED * math.ceil(even / ALIGNED))
    buffers = [h and h.weight.new_empty(height * width, dtype=dtype) for h, dtype in zip(heads, dtypes, strict=True)]
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        for block in rows:
            shape = block.stop - block.start, columns.stop - columns.start
            out = (None if x is None else x[: math.prod(shape)].view(shape) for x in buffers)
            logits = [h and head_logits(h.take(block, columns), x) for h, x in zip(heads, out, strict=True)]
            yield columns, block, logits


def working_dtype(weight: Tensor) -> torch.dtype:
    """In which products are made, a chunk's logits kept and gradients of logits written: that of the weight, or
    float32 on a CPU without fast products of it."""
    return weight.dtype if weight.is_cuda or native(weight.dtype) else result_dtype(weight)


def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this 16-bit type faster than their float32 copies."""
    return dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def head_logits(head: Head, out: Tensor) -> Tensor:
    """All logits [n, V] of a head, written to `out` in its dtype."""
    if head.bias is not None and head.bias.dtype == out.dtype and out.element_size() == 2:  # rounded once
        return torch.addmm(head.bias, head.hidden, head.weight.t(), out=out)
    add_product(out, out, head.hidden, head.weight.t())
    return out if head.bias is None else out.add_(head.bias)


def add_product(
    out: Tensor, total: Tensor, a: Tensor, b: Tensor, first: bool = True, last: bool = True, factor=None
) -> None:
    """The sum of a @ b over calls from the first to the last, times the factor, in `out` [n, v]; until then in `total`,
    which is `out` itself or as large in float32, in which 16-bit products are summed too."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:  # into itself: torch's bug #154086 is about a first argument that has to be expanded
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == out.dtype and native(a.dtype):  # few rows at a time, whose products stay in cache
        for rows in blocks(len(out), BLOCK_BYTES // max(1, out[:1].nbytes)):
            ab = torch.mm(a[rows], b, out=out[rows])
            total[rows].copy_(ab) if first else total[rows].add_(ab)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)
    if last and factor is not None:
        torch.mul(total, factor, out=out)
    elif last and total.dtype != out.dtype:
        out.copy_(total)


def every_row(mask: Tensor) -> bool:
    """Whether masked rows [N] are computed too: on a GPU, where the host would wait for a count of the others."""
    return mask.is_cuda


def _live(mask: Tensor, tokens: Tensor, policy: Head, ref: Head | None) -> tuple[Rows, Tensor, Head, Head | None]:
    """(rows that are worked on, their tokens, their heads in the working dtype): the unmasked ones or all, of which the
    masked ones' tokens and hidden states are then 0, so that a NaN can't reach the weight as 0 · NaN."""
    if every_row(mask):
        rows, tokens = slice(None), reference.zero_unless(mask, tokens)
        policy = policy._replace(hidden=torch.where(mask.unsqueeze(1), policy.hidden, 0))
    else:
        rows = slice(None) if mask.all() else mask.nonzero().squeeze(1)
        tokens, policy, ref = tokens[rows], policy.take(rows), ref and ref.take(rows)
    heads = (h and Head(*(x if x is None else x.to(working_dtype(h.weight)) for x in h)) for h in (policy, ref))
    return rows, tokens, *heads


def _height(heads: tuple[Head | None, ...], workspace: int, exact: bool = False) -> int:
    """Rows of a block so tall that square tiles of all heads' logits fill the workspace, within reason."""
    weights = [h.weight for h in heads if h]
    most = TALLEST["cuda" if weights[0].is_cuda else "cpu"]
    return min(most, math.isqrt(workspace // sum(_tile_dtype(w, exact).itemsize for w in weights)))


def _tile_dtype(weight: Tensor, exact: bool) -> torch.dtype:
    """Of a tile's logits: float32, unless the statistics came from logits that a CPU's products had rounded to 16 bits
    (not if they were exact)."""
    rounded = native(weight.dtype) and not (exact or weight.is_cuda)
    return weight.dtype if rounded else result_dtype(weight)


def _largest(mask: Tensor, *tensors: Tensor | None) -> Tensor:
    """The largest |entry| [] of any of the tensors [N] where not masked."""
    given = [reference.zero_unless(mask, x).abs() for x in tensors if x is not None]
    return torch.cat([mask.new_zeros(1, dtype=torch.float32), *(x.float() for x in given)]).amax()


def _common_factor(dtype: torch.dtype, largest: Tensor, count: Tensor | int = 1) -> tuple[Tensor, Tensor | None]:
    """What upstream gradients of this size [] are multiplied by before the products, and these after them (None:
    nothing), to be divided by the count. In float16, where most gradients of a mean over tokens would underflow, the
    first is a power of two that makes them about `LARGEST`."""
    if dtype != torch.float16:
        return 1 / count, None
    largest = largest.clamp(1e-30, 1e30)
    factor = LARGEST * (torch.frexp(largest).mantissa / largest)
    return factor, 1 / factor / count


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that a fused loss keeps for the backward pass: float32 for float16, which would round most of a mean
    over tokens to 0 before a GradScaler's factor arrives (Micikevicius et al. 2018)."""
    return torch.float32 if dtype == torch.float16 else dtype


class HeadSums:
    """Gradients of a head from those of its logits, tile by tile, 16-bit products summed in float32."""

    def __init__(self, head: Head, needed: tuple[bool, bool, bool], rest: Tensor | None, dtype: torch.dtype):
        """Of a head in the dtype of the products; results in `dtype`, times the rest []."""
        self.head, self.rest, self.dtype, self.partial = head, rest, dtype, {}
        hidden, weight, bias = head
        make = weight.new_empty if len(hidden) else weight.new_zeros
        self.hidden = make(hidden.shape, dtype=dtype) if needed[0] else None
        self.weight = make(weight.shape, dtype=dtype) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=result_dtype(bias)) if needed[2] else None

    def add(self, columns: slice, rows: slice, dz: Tensor, scale: Tensor | None = None) -> None:
        """A tile's dz [n, v] times scale [n]: slabs of columns from the left, the blocks of each from the top."""
        (hidden, weight, _), factor = self.head.take(rows, columns), self.rest
        if scale is not None:  # costs no visit to dz on the hidden states and on their gradients
            hidden = (hidden * scale.unsqueeze(1)).to(dz.dtype)
            factor = scale.unsqueeze(1) if factor is None else scale.unsqueeze(1) * factor
        if self.hidden is not None:
            ends = columns.start == 0, columns.stop == len(self.head.weight)
            self._add_product(self.hidden[rows], ("hidden", rows.start), dz, weight, *ends, factor)
        if self.weight is not None:
            ends = rows.start == 0, rows.stop == len(self.head.hidden)
            self._add_product(self.weight[columns], "weight", dz.t(), hidden, *ends, self.rest)
        if self.bias is not None and scale is None:
            self.bias[columns] += dz.sum(0, dtype=self.bias.dtype)
        elif self.bias is not None:
            for few in blocks(len(dz), BLOCK_BYTES // dz[:1].nbytes):
                self.bias[columns] += scale[few] @ dz[few].to(scale.dtype)

    def _add_product(self, out: Tensor, name, a: Tensor, b: Tensor, first: bool, last: bool, factor) -> None:
        """`add_product`, summed in `out` if that is float32 or if one product of bfloat16 completes it (float16 would
        overflow before the factor is applied), else in float32 from the first product to the last."""
        if first:
            here = out.dtype == result_dtype(out) or (last and out.dtype == a.dtype == torch.bfloat16)
            self.partial[name] = out if here else torch.empty_like(out, dtype=result_dtype(out))
        add_product(out, self.partial[name], a, b, first, last, factor)
        if last:
            del self.partial[name]

    def gradients(self, rows: Rows, count: int) -> Head:
        """The gradients, None where not needed, hidden states' in their places among `count` rows."""
        hidden, bias = self.hidden, self.bias
        if hidden is not None and isinstance(rows, Tensor):
            hidden = hidden.new_zeros(count, hidden.shape[1]).index_copy_(0, rows, hidden)
        if bias is not None:
            bias = (bias if self.rest is None else bias * self.rest).to(self.dtype)
        return Head(hidden, self.weight, bias)
