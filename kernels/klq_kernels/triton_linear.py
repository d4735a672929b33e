"""The `triton` backend from hidden states: statistics without logits in memory, gradients by slabs of the vocabulary.

Forward, one launch: each program walks over the tiles of its span of the vocabulary, multiplies hidden states by the
weight tile in fp32 accumulators, and folds the tile into its rows' running statistics; `merge_kernel` joins the spans.
A shared head is loaded once for both models. Backward: the same tiles are computed again and turned into logit
gradients, a slab of the vocabulary at a time, which two matrix products per slab turn into those of hidden and weight.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import triton_logits
from klq_kernels.device import INF, accumulate, accumulate_ref, softmax_gradient
from klq_kernels.torch_linear import add_product, head_logits, product
from klq_kernels.triton_logits import PARTIALS, chosen, merge_kernel, upstream_flags, vocabulary_splits
from klq_kernels.types import Gradients, Head, Residuals, Upstream

INTERPRETED = triton.knobs.runtime.interpret
PROGRAMS = 264  # two waves of a 132-multiprocessor GPU: with fewer row tiles the vocabulary is split


class MatmulTile(NamedTuple):
    """Compile-time sizes of a tile: rows, vocabulary, hidden; warps and pipeline stages."""

    rows: int
    vocab: int
    hidden: int
    warps: int
    stages: int


# By bytes per element. The first is the default: it spills nowhere and fits all targets of `klq inspect`.
TILES = {
    2: [MatmulTile(64, 64, 64, 8, 3), MatmulTile(128, 64, 64, 8, 3), MatmulTile(64, 128, 64, 8, 3)],
    4: [MatmulTile(64, 32, 32, 8, 2), MatmulTile(64, 64, 32, 8, 2), MatmulTile(32, 64, 32, 8, 2)],
}


@triton.jit
def _multiply(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a b. The interpreter gets bfloat16 products wrong, so there the operands are converted first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _load_hidden(H, rows, live, d, D, h_row):
    """[rows, d] of hidden states, 0 for masked rows and beyond D."""
    return tl.load(H + rows[:, None] * h_row + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _logits_tiles(
    H, H2, W, BIAS, rows, live, columns, V, D, h_row, h2_row, w_row,
    HAS_BIAS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Logits [rows, columns] in fp32 of hidden states H and, if SHARED, of H2 with the same head, each weight tile
    loaded once; −inf beyond the vocabulary."""
    z = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    r = z
    for start in range(0, D, HIDDEN):
        d = start + tl.arange(0, HIDDEN)
        h = _load_hidden(H, rows, live, d, D, h_row)
        inside = (columns < V)[None, :] & (d < D)[:, None]
        w = tl.load(W + columns.to(tl.int64)[None, :] * w_row + d[:, None], mask=inside, other=0.0)  # transposed
        z = _multiply(h, w, z, PRECISION, UPCAST)
        if SHARED:
            r = _multiply(_load_hidden(H2, rows, live, d, D, h2_row), w, r, PRECISION, UPCAST)
    if HAS_BIAS:
        bias = tl.load(BIAS + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z, r = z + bias, r + bias
    known = (columns < V)[None, :]
    return tl.where(known, z, -INF), tl.where(known, r, -INF)


@triton.jit
def linear_stats_kernel(
    H, W, BIAS, H2, W2, BIAS2, TOKENS, MASK, OUT, TOKEN_Z, TOKEN_R, rows, V, D, D2, h_row, w_row, h2_row, w2_row,
    inv_temperature, row_tiles, span, splits,
    HAS_BIAS: tl.constexpr, HAS_REF: tl.constexpr, HAS_BIAS2: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Partial statistics of a tile of rows over one span of the vocabulary; OUT [6, splits, rows]. Row tiles vary
    fastest, so that programs running together share weight tiles in L2. Source: Cut Cross-Entropy (Wijmans et al.
    2024)."""
    split = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = tl.load(MASK + row, mask=row < rows, other=0) != 0
    if tl.sum(live.to(tl.int32), 0) == 0:
        return
    token = tl.load(TOKENS + row, mask=live, other=-1)
    m = tl.full([ROWS], -INF, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    h, n, t, w = s, m, s, s
    end = tl.minimum((split + 1) * span, V)
    for start in range(split * span, end, VOCAB):
        columns = start + tl.arange(0, VOCAB)
        chosen = token[:, None] == columns[None, :]
        here = (token >= start) & (token < start + VOCAB) & live
        z, r = _logits_tiles(
            H, H2, W, BIAS, row, live, columns, V, D, h_row, h2_row, w_row, HAS_BIAS, SHARED, PRECISION, UPCAST, HIDDEN
        )
        if HAS_REF:
            if not SHARED:
                r, _ = _logits_tiles(
                    H2, H2, W2, BIAS2, row, live, columns, V, D2, h2_row, h2_row, w2_row,
                    HAS_BIAS2, False, PRECISION, UPCAST, HIDDEN,
                )  # fmt: skip
        m, s, h, x, e, s_old, scale, shift = accumulate(z, m, s, h, inv_temperature)
        tl.store(TOKEN_Z + row, tl.sum(tl.where(chosen, z, 0.0), 1), mask=here)
        if HAS_REF:
            n, t, w = accumulate_ref(r, x, e, s_old, scale, shift, n, t, w, inv_temperature)
            tl.store(TOKEN_R + row, tl.sum(tl.where(chosen, r, 0.0), 1), mask=here)
    OUT += split.to(tl.int64) * rows + row
    stride = tl.full([], splits, tl.int64) * rows
    tl.store(OUT, m, mask=live)
    tl.store(OUT + stride, s, mask=live)
    tl.store(OUT + 2 * stride, h, mask=live)
    if HAS_REF:
        tl.store(OUT + 3 * stride, n, mask=live)
        tl.store(OUT + 4 * stride, t, mask=live)
        tl.store(OUT + 5 * stride, w, mask=live)


@triton.jit
def linear_grad_kernel(
    H, W, BIAS, H2, W2, BIAS2, TOKENS, MASK, ENTROPY, KL, SHIFT, LSE, REF_SHIFT, REF_LSE, A, B, C, OUT,
    rows, V, D, D2, h_row, w_row, h2_row, w2_row, out_row, inv_temperature, row_tiles, first,
    HAS_BIAS: tl.constexpr, HAS_BIAS2: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Logit gradients of one tile of the slab that starts at token `first`; OUT [rows, slab], zero in masked rows. The
    logits are computed once more (Wijmans et al. 2024)."""
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = (tl.program_id(0) // row_tiles) * VOCAB + tl.arange(0, VOCAB)
    columns = first + offset
    live = tl.load(MASK + row, mask=row < rows, other=0) != 0
    target = OUT + row[:, None] * out_row + offset[None, :]
    inside = (row < rows)[:, None] & (columns < V)[None, :]
    if tl.sum(live.to(tl.int32), 0) == 0:
        tl.store(target, tl.zeros([ROWS, VOCAB], tl.float32).to(OUT.dtype.element_ty), mask=inside)
        return
    z, _ = _logits_tiles(
        H, H, W, BIAS, row, live, columns, V, D, h_row, h_row, w_row, HAS_BIAS, False, PRECISION, UPCAST, HIDDEN
    )
    shift = tl.load(SHIFT + row, mask=live, other=0.0)[:, None]
    lse = tl.load(LSE + row, mask=live, other=0.0)[:, None]
    x = (z - shift) * inv_temperature - lse
    y = x
    zero = tl.zeros([ROWS, 1], tl.float32)
    a = tl.load(A + row, mask=live, other=0.0)[:, None] if HAS_A else zero
    b = tl.load(B + row, mask=live, other=0.0)[:, None] if HAS_B else zero
    c = tl.load(C + row, mask=live, other=0.0)[:, None] if HAS_C else zero
    entropy = tl.load(ENTROPY + row, mask=live, other=0.0)[:, None] if HAS_B else zero
    kl = tl.load(KL + row, mask=live, other=0.0)[:, None] if HAS_C else zero
    if HAS_C:
        r, _ = _logits_tiles(
            H2, H2, W2, BIAS2, row, live, columns, V, D2, h2_row, h2_row, w2_row,
            HAS_BIAS2, False, PRECISION, UPCAST, HIDDEN,
        )  # fmt: skip
        ref_shift = tl.load(REF_SHIFT + row, mask=live, other=0.0)[:, None]
        ref_lse = tl.load(REF_LSE + row, mask=live, other=0.0)[:, None]
        y = (r - ref_shift) * inv_temperature - ref_lse
    token = tl.load(TOKENS + row, mask=live, other=-1)
    chosen = token[:, None] == columns[None, :]
    dz = softmax_gradient(x, y, a, b, c, entropy, kl, chosen, HAS_B, HAS_C) * inv_temperature
    dz = tl.where(live[:, None], dz, 0.0)
    tl.store(target, dz.to(OUT.dtype.element_ty), mask=inside)


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """`torch_linear.linear_stats` of hidden [N, H] (Wijmans et al. 2024); needs no workspace."""
    out = Residuals.zeros(tokens, torch.float32, ref is not None)
    rows, V = len(tokens), len(policy.weight)
    if rows == 0:
        return out
    tile = chosen(TILES[policy.weight.element_size()])
    row_tiles = triton.cdiv(rows, tile.rows)
    splits, span = vocabulary_splits(PROGRAMS, row_tiles, V, tile.vocab)
    partials = torch.empty((PARTIALS, splits, rows), dtype=torch.float32, device=tokens.device)
    token_logits = torch.full((2, rows), float("nan"), dtype=torch.float32, device=tokens.device)
    heads, sizes, flags = _arguments(policy, ref)
    own, other = ([x is not None and (x.data_ptr(), x.shape, x.stride()) for x in h[1:]] for h in (policy, ref or ()))
    linear_stats_kernel[(row_tiles * splits,)](
        *heads, tokens, mask, partials, *token_logits, rows, V, *sizes, 1 / temperature, row_tiles, span, splits,
        **flags, HAS_REF=ref is not None, SHARED=ref is not None and own == other, **_tile(tile),
    )  # fmt: skip
    merge_kernel[(rows,)](
        partials, tokens, mask, *token_logits, *out, rows, V, 1, 0, 0, 0, 0, 1 / temperature, splits,
        HAS_REF=ref is not None, IN_ROWS=False, SPLITS=triton.next_power_of_2(splits), BLOCK=16, num_warps=1,
    )  # fmt: skip
    return out


def linear_grad(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, stats: Residuals,
    upstream: Upstream, needed: tuple[bool, bool, bool], workspace: int,
) -> Gradients:  # fmt: skip
    """`torch_linear.linear_grad`, recomputing logits as in Wijmans et al. 2024: their gradients [N, slab] exist for one
    slab of the vocabulary at a time, in the weight's dtype and within `workspace` bytes (or one tile); everything they
    are added to is fp32, in a fixed order."""
    hidden = torch.where(mask.unsqueeze(1), policy.hidden, 0)  # 0 · NaN would reach the weight
    grads = Gradients(*(torch.zeros_like(x, dtype=torch.float32) if n else None for x, n in zip(policy, needed)))
    rows, V = len(tokens), len(policy.weight)
    if rows == 0:
        return grads.like(policy)
    size = policy.weight.element_size()
    tile = chosen(TILES[size])
    slab = min(triton.cdiv(V, tile.vocab), max(1, workspace // (rows * size * tile.vocab))) * tile.vocab
    dz = torch.empty((rows, slab), dtype=policy.weight.dtype, device=tokens.device)
    heads, sizes, flags = _arguments(policy._replace(hidden=hidden), ref if upstream.kl is not None else None)
    row_tiles = triton.cdiv(rows, tile.rows)
    for first in range(0, V, slab):
        columns, width = slice(first, min(first + slab, V)), min(slab, V - first)
        linear_grad_kernel[(row_tiles * triton.cdiv(width, tile.vocab),)](
            *heads, tokens, mask, stats.entropy, stats.kl, stats.shift, stats.lse, stats.ref_shift, stats.ref_lse,
            *(stats.lse if x is None else x for x in upstream), dz, rows, V, *sizes, dz.stride(0), 1 / temperature,
            row_tiles, first, **flags, **upstream_flags(upstream), **_tile(tile),
        )  # fmt: skip
        part = dz[:, :width]
        if grads.hidden is not None:
            add_product(grads.hidden, part, policy.weight[columns])
        if grads.weight is not None:
            grads.weight[columns] = product(part.t(), hidden)
        if grads.bias is not None:
            grads.bias[columns] = part.sum(0, dtype=torch.float32)
    return grads.like(policy)


def chunk_stats(
    z: Tensor, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """`torch_linear.chunk_stats` of policy logits z [n, V], which stay: both models' rows are visited together (Milakov
    and Gimelshein 2018), so that the reference's logits need memory of their own."""
    ref_logits = None if ref is None else head_logits(ref, torch.empty_like(z))
    return triton_logits.logits_stats(z, tokens, ref_logits, temperature, mask)


def chunk_grad(
    z: Tensor, tokens: Tensor, temperature: float, mask: Tensor, stats: Residuals, a: Tensor
) -> tuple[Tensor, None]:
    """`torch_linear.chunk_grad` in place of the logits z [n, V] (Hsu et al. 2024), with nothing left to be applied."""
    return triton_logits.logits_grad(z, tokens, None, temperature, mask, stats, Upstream(a), z), None


def _arguments(policy: Head, ref: Head | None) -> tuple[list[Tensor], tuple[int, ...], dict[str, bool]]:
    """Both heads' tensors with unit last strides, their sizes and strides, and which biases there are."""
    given = [h.weight if x is None else x for h in (policy, ref or policy) for x in h]
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in given]
    h, w, _, h2, w2, _ = given
    flags = {"HAS_BIAS": policy.bias is not None, "HAS_BIAS2": ref is not None and ref.bias is not None}
    return given, (w.shape[1], w2.shape[1], *(x.stride(0) for x in (h, w, h2, w2))), flags


def fp32_precision(platform: str) -> str:
    """How fp32 [N, H] and [H, V] are multiplied: as three TF32 products on NVIDIA ("cuda"; Ootomo and Yokota 2022), on
    AMD ("hip") as they are."""
    return "ieee" if platform == "hip" else "tf32x3"


def _tile(tile: MatmulTile) -> dict:
    """Launch arguments of a tile."""
    return {
        "PRECISION": fp32_precision("hip" if torch.version.hip else "cuda"), "UPCAST": INTERPRETED, "ROWS": tile.rows,
        "VOCAB": tile.vocab, "HIDDEN": tile.hidden, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
