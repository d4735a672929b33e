"""The `triton` backend on logits and λ-returns: GPU kernels (or, with TRITON_INTERPRET=1, the same on a CPU).

One visit to each row pair for the statistics, one for the gradient. Offsets are int64, no size is a compile-time
constant, and masked rows are not read. The interface is that of `torch_logits`.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels.device import INF, SMALL_KL, accumulate, accumulate_ref, bregman, shrink, softmax_gradient
from klq_kernels.types import LambdaReturns, Residuals, Upstream

PARTIALS = 6  # m, s, h, n, t, w per row and split
ROWS_PER_SPLIT = 264  # fewer rows than this leave a GPU's 132 multiprocessors idle: split the vocabulary


class Tile(NamedTuple):
    """A kernel's compile-time sizes."""

    block: int
    warps: int


# Each list starts with the default; KLQ_TILE=1, 2 tries the others (`klq inspect --all-tiles` compiles them).
STATS_TILES = [Tile(4096, 8), Tile(2048, 4), Tile(8192, 16)]
GRAD_TILES = [Tile(4096, 8), Tile(2048, 4), Tile(8192, 16)]
SCAN_TILES = [Tile(1024, 4), Tile(512, 4), Tile(2048, 8)]


@triton.jit
def stats_kernel(
    Z, R, MASK, OUT, rows, V, T, z_batch, z_time, r_batch, r_time, inv_temperature, splits, span,
    HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one row of Z [rows, V] over one span of the vocabulary, by online softmax (Milakov and
    Gimelshein 2018); OUT [6, splits, rows]."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if tl.load(MASK + row) == 0:
        return
    batch, time = row // T, row % T
    Z += batch * z_batch + time * z_time
    if HAS_REF:
        R += batch * r_batch + time * r_time
    m = tl.full([1], -INF, tl.float32)
    s = tl.zeros([1], tl.float32)
    h, n, t, w = s, m, s, s
    end = tl.minimum((split + 1) * span, V)
    for start in range(split * span, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        z = tl.load(Z + columns, mask=inside, other=-INF).to(tl.float32)[None, :]
        m, s, h, x, e, s_old, scale, shift = accumulate(z, m, s, h, inv_temperature)
        if HAS_REF:
            r = tl.load(R + columns, mask=inside, other=-INF).to(tl.float32)[None, :]
            n, t, w = accumulate_ref(r, x, e, s_old, scale, shift, n, t, w, inv_temperature)
    one = tl.arange(0, 1)
    OUT += split.to(tl.int64) * rows + row
    stride = tl.full([], splits, tl.int64) * rows  # not rows.to(…): a size of 1 is a Python number here
    tl.store(OUT + one, m)
    tl.store(OUT + stride + one, s)
    tl.store(OUT + 2 * stride + one, h)
    if HAS_REF:
        tl.store(OUT + 3 * stride + one, n)
        tl.store(OUT + 4 * stride + one, t)
        tl.store(OUT + 5 * stride + one, w)


@triton.jit
def merge_kernel(
    PART, TOKENS, MASK, Z, R, LOGPROB, ENTROPY, REF_LOGPROB, KL, SHIFT, LSE, REF_SHIFT, REF_LSE,
    rows, V, T, z_batch, z_time, r_batch, r_time, inv_temperature, splits,
    HAS_REF: tl.constexpr, IN_ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge one row's partials PART [6, splits, rows] (Milakov and Gimelshein 2018: ⊕ is associative). Z and R hold its
    logits (IN_ROWS: then a small KL is summed once more, accurately) or only those of its token [rows]."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(MASK + row) == 0:
        return
    token = tl.load(TOKENS + row).to(tl.int64)
    if IN_ROWS:
        batch, time = row // T, row % T
        Z += batch * z_batch + time * z_time
        if HAS_REF:
            R += batch * r_batch + time * r_time
        token_offset = token
    else:
        token_offset = row
    part = tl.arange(0, SPLITS)
    there = part < splits
    stride = tl.full([], splits, tl.int64) * rows
    PART += row + part.to(tl.int64) * rows
    m_i = tl.load(PART, mask=there, other=-INF)
    s_i = tl.load(PART + stride, mask=there, other=0.0)
    h_i = tl.load(PART + 2 * stride, mask=there, other=0.0)
    m = tl.max(m_i, 0)
    shift = tl.where(s_i > 0.0, (m_i - m) * inv_temperature, 0.0)
    scale = tl.where(s_i > 0.0, tl.exp(shift), 0.0)
    s = tl.sum(s_i * scale, 0)
    h = tl.sum(shrink(scale, h_i + s_i * shift), 0)
    lse = tl.log(s)
    known = (token >= 0) & (token < V)  # a GPU's ids are not checked on the host: an impossible one gives NaN
    z = tl.load(Z + token_offset, mask=known, other=float("nan")).to(tl.float32)
    tl.store(LOGPROB + row, (z - m) * inv_temperature - lse)
    tl.store(ENTROPY + row, lse - h / s)
    tl.store(SHIFT + row, m)
    tl.store(LSE + row, lse)
    if HAS_REF:
        n_i = tl.load(PART + 3 * stride, mask=there, other=-INF)
        t_i = tl.load(PART + 4 * stride, mask=there, other=0.0)
        w_i = tl.load(PART + 5 * stride, mask=there, other=0.0)
        n = tl.max(n_i, 0)
        shift_ref = tl.where(t_i > 0.0, (n_i - n) * inv_temperature, -(n * inv_temperature))
        t = tl.sum(tl.where(t_i > 0.0, t_i * tl.exp(shift_ref), 0.0), 0)
        w = tl.sum(shrink(scale, w_i + s_i * (shift - shift_ref)), 0)
        ref_lse = tl.log(t)
        kl = w / s - lse + ref_lse
        if IN_ROWS:
            if kl < SMALL_KL:  # two ifs: the first is decided when compiling
                kl_block = tl.zeros([BLOCK], tl.float32)
                for start in range(0, V, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    inside = columns < V
                    x = tl.load(Z + columns, mask=inside, other=-INF).to(tl.float32)
                    y = tl.load(R + columns, mask=inside, other=-INF).to(tl.float32)
                    kl_block += bregman((x - m) * inv_temperature - lse, (y - n) * inv_temperature - ref_lse)
                kl = tl.sum(kl_block, 0)
        r = tl.load(R + token_offset, mask=known, other=float("nan")).to(tl.float32)
        tl.store(REF_LOGPROB + row, (r - n) * inv_temperature - ref_lse)
        tl.store(KL + row, tl.maximum(kl, 0.0))
        tl.store(REF_SHIFT + row, n)
        tl.store(REF_LSE + row, ref_lse)


@triton.jit
def grad_kernel(
    Z, R, TOKENS, MASK, ENTROPY, KL, SHIFT, LSE, REF_SHIFT, REF_LSE, A, B, C, OUT,
    V, T, z_batch, z_time, r_batch, r_time, out_row, inv_temperature, blocks,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of one row's logits Z [rows, V], p computed again from the residuals (Dao et al. 2022); OUT
    may be Z itself. Masked rows become zero."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    OUT += row * out_row
    if tl.load(MASK + row) == 0:
        tl.store(OUT + columns, tl.zeros([BLOCK], tl.float32).to(OUT.dtype.element_ty), mask=inside)
        return
    batch, time = row // T, row % T
    a = tl.load(A + row) if HAS_A else 0.0
    b = tl.load(B + row) if HAS_B else 0.0
    c = tl.load(C + row) if HAS_C else 0.0
    entropy = tl.load(ENTROPY + row) if HAS_B else 0.0
    kl = tl.load(KL + row) if HAS_C else 0.0
    z = tl.load(Z + batch * z_batch + time * z_time + columns, mask=inside, other=-INF).to(tl.float32)
    x = (z - tl.load(SHIFT + row)) * inv_temperature - tl.load(LSE + row)
    y = x
    if HAS_C:
        r = tl.load(R + batch * r_batch + time * r_time + columns, mask=inside, other=-INF).to(tl.float32)
        y = (r - tl.load(REF_SHIFT + row)) * inv_temperature - tl.load(REF_LSE + row)
    chosen = columns == tl.load(TOKENS + row)
    dz = softmax_gradient(x, y, a, b, c, entropy, kl, chosen, HAS_B, HAS_C) * inv_temperature
    tl.store(OUT + columns, dz.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _compose(end_decay, end_total, decay, total):
    """Join Δ_t = total + decay Δ_{t+1} to what is already known of the steps after it, down to the end of the block."""
    return decay * end_decay, total + decay * end_total


@triton.jit
def returns_kernel(
    REWARDS, VALUES, LOGPROBS, REF_LOGPROBS, MASK, WEIGHTS, TARGETS, ADVANTAGES, TD,
    T, r_row, v_row, p_row, q_row, mask_row, c_row, tau, gamma, lam, alpha,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of [B, T]: log-ratio → Q → δ → reverse scan → Δ → Ĝ (arXiv 2508.17000, eqs. (13), (14), (7)), block by
    block from the end. The scan of a linear recurrence is that of Blelloch 1990."""
    row = tl.program_id(0).to(tl.int64)
    MASK, VALUES = MASK + row * mask_row, VALUES + row * v_row
    steps = tl.arange(0, BLOCK)
    tail = 0.0
    for block in range(tl.cdiv(T, BLOCK) - 1, -1, -1):
        t = block * BLOCK + steps
        real = tl.load(MASK + t, mask=t < T, other=0) != 0
        following = tl.load(MASK + t + 1, mask=t + 1 < T, other=0) != 0
        # masked by t alone: 16 bytes at a time
        r = tl.load(REWARDS + row * r_row + t, mask=t < T, other=0.0).to(tl.float32)
        v = tl.load(VALUES + t, mask=t < T, other=0.0).to(tl.float32)
        v_next = tl.load(VALUES + t + 1, mask=following, other=0.0).to(tl.float32)
        p = tl.load(LOGPROBS + row * p_row + t, mask=t < T, other=0.0).to(tl.float32)
        q = tl.load(REF_LOGPROBS + row * q_row + t, mask=t < T, other=0.0).to(tl.float32)
        action_value = tl.where(real, tau * (p - q) + v, 0.0)
        td = tl.where(real, r + gamma * v_next, 0.0) - action_value
        decay = tl.where(following, gamma * lam, 0.0)
        if HAS_WEIGHTS:
            decay *= tl.load(WEIGHTS + row * c_row + t + 1, mask=following, other=0.0).to(tl.float32)
        decays, totals = tl.associative_scan((decay, td), 0, _compose, reverse=True)
        advantages = totals + decays * tail
        tail = tl.sum(tl.where(steps == 0, advantages, 0.0), 0)
        out = row * T + t
        tl.store(ADVANTAGES + out, advantages, mask=t < T)
        tl.store(TD + out, td, mask=t < T)
        tl.store(TARGETS + out, action_value + alpha * advantages, mask=t < T)


def logits_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor
) -> Residuals:
    """`torch_logits.logits_stats` for logits [..., V] in one visit to each row (Milakov and Gimelshein 2018)."""
    out = Residuals.zeros(tokens, torch.float32, ref_logits is not None)
    rows, V = len(tokens), logits.shape[-1]
    if rows == 0:
        return out
    z, time, z_batch, z_time = _grid_view(logits)
    has_ref, tile = ref_logits is not None, chosen(STATS_TILES)
    r, _, r_batch, r_time = _grid_view(ref_logits if has_ref else logits)
    splits, span = vocabulary_splits(ROWS_PER_SPLIT, rows, V, tile.block)
    partials = torch.empty((PARTIALS, splits, rows), dtype=torch.float32, device=logits.device)
    where = (z_batch, z_time, r_batch, r_time, 1 / temperature, splits)
    stats_kernel[(rows * splits,)](
        z, r, mask, partials, rows, V, time, *where, span, HAS_REF=has_ref, BLOCK=_block(tile, V), num_warps=tile.warps
    )
    merge_kernel[(rows,)](
        partials, tokens, mask, z, r, *out, rows, V, time, *where, HAS_REF=has_ref, IN_ROWS=True,
        SPLITS=triton.next_power_of_2(splits), BLOCK=_block(tile, V), num_warps=tile.warps,
    )  # fmt: skip
    return out


def logits_grad(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor, stats: Residuals,
    upstream: Upstream, out: Tensor,
) -> Tensor:  # fmt: skip
    """`torch_logits.logits_grad`, written to out [N, V]: p comes from the residuals again, as in Dao et al. 2022."""
    rows, V = out.shape
    if rows == 0:
        return out
    z, time, z_batch, z_time = _grid_view(logits)
    r, _, r_batch, r_time = _grid_view(logits if upstream.kl is None else ref_logits)
    tile = chosen(GRAD_TILES)
    blocks = triton.cdiv(V, _block(tile, V))
    grad_kernel[(rows * blocks,)](
        z, r, tokens, mask, stats.entropy, stats.kl, stats.shift, stats.lse, stats.ref_shift, stats.ref_lse,
        *(stats.lse if x is None else x for x in upstream), out, V, time, z_batch, z_time, r_batch, r_time,
        out.stride(0), 1 / temperature, blocks, **upstream_flags(upstream), BLOCK=_block(tile, V), num_warps=tile.warps,
    )  # fmt: skip
    return out


def upstream_flags(upstream: Upstream) -> dict[str, bool]:
    """Which upstream gradients [N] a gradient kernel gets."""
    return {f"HAS_{name}": x is not None for name, x in zip("ABC", upstream, strict=True)}


def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    tau: float, gamma: float, lam: float, alpha: float,
) -> LambdaReturns:  # fmt: skip
    """`reference.lambda_returns` (arXiv 2508.17000, eqs. (7), (14)) of [B, T] in one launch, each row scanned in
    parallel."""
    out = LambdaReturns(*(torch.zeros(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(3)))
    if mask.numel() == 0:
        return out
    given = [rewards, values, logprobs, ref_logprobs, mask, mask if trace_weights is None else trace_weights]
    inputs = [x if x.stride(1) == 1 else x.contiguous() for x in given]
    tile = chosen(SCAN_TILES)
    block = min(tile.block, triton.next_power_of_2(mask.shape[1]))
    returns_kernel[(len(mask),)](
        *inputs, *out, mask.shape[1], *(x.stride(0) for x in inputs), tau, gamma, lam, alpha,
        HAS_WEIGHTS=trace_weights is not None, BLOCK=block, num_warps=tile.warps,
    )  # fmt: skip
    return out


def vocabulary_splits(programs: int, rows: int, V: int, block: int) -> tuple[int, int]:
    """(number of splits, tokens per split) of [rows, V]: one where the rows make enough programs, more where they don't
    (Flash-Decoding: Dao et al. 2023)."""
    wanted = min(triton.cdiv(programs, rows), triton.cdiv(V, block))
    span = triton.cdiv(triton.cdiv(V, wanted), block) * block
    return triton.cdiv(V, span), span


def chosen(tiles: list):
    """The tile to use: the first, or the one KLQ_TILE names."""
    return tiles[int(os.environ.get("KLQ_TILE", 0)) % len(tiles)]


def _block(tile: Tile, V: int) -> int:
    """The tile's width, but no wider than the vocabulary needs."""
    return min(tile.block, max(16, triton.next_power_of_2(V)))


def _grid_view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(tensor, T, batch stride, time stride) such that flat row i starts at (i // T)·batch + (i % T)·time. A strided
    [B, T, V] with adjacent tokens is used as it stands."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x.flatten(0, -3) if x.dim() > 3 else x
    if x.dim() == 3:
        return x, x.shape[1], x.stride(0), x.stride(1)
    return x.reshape(-1, x.shape[-1]), 1, x.reshape(-1, x.shape[-1]).stride(0), 0
