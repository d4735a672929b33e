"""The `triton` backend on logits and λ-returns: GPU kernels (or, with TRITON_INTERPRET=1, the same on a CPU).

One visit to each row pair for the statistics, one for the gradient. Offsets are int64, no size is a compile-time
constant, and masked rows are not read. The interface is that of `torch_logits`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels.device import INF, LN2, LOG2E, LOWEST, accumulate, empty_state, kl_divergence, merge, store_state
from klq_kernels.types import LambdaReturns, Residuals, Upstream

PARTIALS = 8  # m, s, h, n, t, w, b, g per row and split: see `device`
LANE = tl.constexpr(32)  # elements of a tile that one lane folds into its own statistics
ROWS_PER_SPLIT = 264  # fewer rows than this leave a GPU's 132 multiprocessors idle: split the vocabulary
STATS_BLOCK, GRAD_BLOCK, SCAN_BLOCK = 4096, 8192, 1024  # elements of a tile, for four warps: LANE per thread and round


@triton.jit
def _load_lanes(X, first, end, TAIL: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """[LANES, COLUMNS] elements of X, each lane having every LANES-th WIDE ones; in a TAIL −inf from `end` on."""
    column = tl.arange(0, COLUMNS // WIDE)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    column = first + column * WIDE + tl.arange(0, WIDE)[None, None, :]
    x = tl.load(X + column, mask=column < end, other=-INF) if TAIL else tl.load(X + column)
    return tl.permute(x, (1, 0, 2)).reshape(LANES, COLUMNS).to(tl.float32)


@triton.jit
def _add_tile(
    Z, R, first, end, state, k, TAIL: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The lanes' state with one more tile of logits Z and, if it has a reference, R [LANES · COLUMNS]."""
    z = _load_lanes(Z, first, end, TAIL, WIDE, LANES, COLUMNS)
    r = _load_lanes(R, first, end, TAIL, WIDE, LANES, COLUMNS) if len(state) > 3 else z
    return accumulate(z, r, state, k)


@triton.jit(do_not_specialize=("rows", "T", "splits"))
def stats_kernel(
    Z, R, MASK, OUT, rows, V, T, z_batch, z_time, r_batch, r_time, inv_temperature, splits, span,
    HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one row of Z [rows, V] over one span of the vocabulary, by online softmax (Milakov and
    Gimelshein 2018): each lane keeps its own until the end. OUT [PARTIALS, splits, rows]."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(MASK + row) == 0:
        return
    batch, time = (row // T).to(tl.int64), (row % T).to(tl.int64)
    Z += batch * z_batch + time * z_time
    if HAS_REF:
        R += batch * r_batch + time * r_time
    k = inv_temperature * LOG2E
    COLUMNS: tl.constexpr = min(BLOCK, LANE)
    LANES: tl.constexpr = BLOCK // COLUMNS
    WIDE: tl.constexpr = min(COLUMNS, 128 // Z.dtype.element_ty.primitive_bitwidth)  # 16 bytes; a lane is a thread
    state = empty_state(LANES, HAS_REF)
    first = split * span
    end = tl.minimum(first + span, V)
    tail = first + (end - first) // BLOCK * BLOCK
    for start in range(first, tail, BLOCK):
        state = _add_tile(Z, R, start, end, state, k, False, WIDE, LANES, COLUMNS)
    if tail < end:
        state = _add_tile(Z, R, tail, end, state, k, True, WIDE, LANES, COLUMNS)
    stride = splits.to(tl.int64) * rows
    store_state(OUT + split.to(tl.int64) * rows + row, stride, True, merge(state, k))


@triton.jit(do_not_specialize=("rows", "V", "T", "z_batch", "z_time", "r_batch", "r_time", "splits"))
def merge_kernel(
    PART, TOKENS, MASK, Z, R, VALUES, LOGPROB, ENTROPY, REF_LOGPROB, KL, SHIFT, LSE, REF_SHIFT, REF_LSE, Q,
    rows, V, T, z_batch, z_time, r_batch, r_time, inv_temperature, tau, splits,
    HAS_REF: tl.constexpr, HAS_Q: tl.constexpr, IN_ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Statistics of one row from its partials PART [PARTIALS, splits, rows] (Milakov and Gimelshein 2018: ⊕ is
    associative), and, if HAS_Q, Q = τ (log π − log π_b) + V. Z and R hold its logits (IN_ROWS) or only those of its
    token [rows]."""
    row = tl.program_id(0)
    if tl.load(MASK + row) == 0:
        return
    token = tl.load(TOKENS + row).to(tl.int64)
    known = (token >= 0) & (token < V)  # a GPU's ids are not checked on the host: an impossible one gives NaN
    if IN_ROWS:
        batch, time = (row // T).to(tl.int64), (row % T).to(tl.int64)
        Z += batch * z_batch + time * z_time + token
        if HAS_REF:
            R += batch * r_batch + time * r_time + token
    else:
        Z += row
        R += row
    k = inv_temperature * LOG2E
    part = tl.arange(0, SPLITS)
    there = part < splits
    stride = splits.to(tl.int64) * rows
    PART += row + part.to(tl.int64) * rows
    state = (tl.load(PART, mask=there, other=LOWEST),)
    for i in tl.static_range(1, 8 if HAS_REF else 3):
        state += (tl.load(PART + i * stride, mask=there, other=LOWEST if i == 3 else 0.0),)
    state = merge(state, k)
    m, s, h = state[:3]
    lse = tl.log(s)
    z = tl.load(Z, mask=known, other=float("nan")).to(tl.float32)
    logprob = (z - m) * inv_temperature - lse
    logprob = tl.where(logprob > 0.0, 0.0, logprob)  # which rounding may make it; NaN stays
    tl.store(LOGPROB + row, logprob)
    tl.store(ENTROPY + row, lse - h / s * LN2)
    shift = m + lse / inv_temperature
    tl.store(SHIFT + row, shift)
    tl.store(LSE + row, lse - (shift - m) * inv_temperature)  # what rounding took from the shift
    if HAS_REF:
        n, t, w, b, g = state[3:]
        ref_lse = tl.log(t)
        r = tl.load(R, mask=known, other=float("nan")).to(tl.float32)
        ref_logprob = (r - n) * inv_temperature - ref_lse
        ref_logprob = tl.where(ref_logprob > 0.0, 0.0, ref_logprob)
        kl, more = kl_divergence(s, t, w, b, g, inv_temperature)
        tl.store(REF_LOGPROB + row, ref_logprob)
        tl.store(KL + row, kl)
        ref_shift = n + (lse + more) / inv_temperature
        tl.store(REF_SHIFT + row, ref_shift)
        tl.store(REF_LSE + row, lse - (ref_shift - n) * inv_temperature + more)
        if HAS_Q:
            tl.store(Q + row, tau * (logprob - ref_logprob) + tl.load(VALUES + row).to(tl.float32))


@triton.jit(do_not_specialize=("T",))
def grad_kernel(
    Z, R, TOKENS, MASK, ENTROPY, KL, SHIFT, LSE, REF_SHIFT, REF_LSE, A, B, C, OUT,
    V, T, z_batch, z_time, r_batch, r_time, out_row, inv_temperature,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of one row's logits Z [rows, V], p computed again from the residuals (Dao et al. 2022):
    arXiv 2508.17000, eq. (2), differentiated as in `torch_logits.logits_grad`, with log p − log q − KL as a difference
    of differences, which small ones survive. OUT may be Z itself. Masked rows become zero."""
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = columns < V
    OUT += row.to(tl.int64) * out_row
    if tl.load(MASK + row) == 0:
        tl.store(OUT + columns, tl.zeros([BLOCK], tl.float32).to(OUT.dtype.element_ty), mask=inside)
        return
    batch, time = (row // T).to(tl.int64), (row % T).to(tl.int64)
    a = tl.load(A + row) if HAS_A else 0.0
    lse = tl.load(LSE + row)
    z = tl.load(Z + batch * z_batch + time * z_time + columns, mask=inside).to(tl.float32) - tl.load(SHIFT + row)
    if HAS_B or HAS_C:
        z = tl.maximum(z, LOWEST)
    x = z * (inv_temperature * LOG2E) - lse * LOG2E
    weight = -a
    if HAS_B:
        b = tl.load(B + row)
        weight -= b * tl.load(ENTROPY + row)
    if HAS_C:
        r = tl.load(R + batch * r_batch + time * r_time + columns, mask=inside).to(tl.float32)
        r = tl.maximum(r - tl.load(REF_SHIFT + row), LOWEST)
        kl = tl.load(KL + row)
        c = tl.where(kl < INF, tl.load(C + row), 0.0)  # an infinite KL passes no gradient
        weight -= c * (lse - tl.load(REF_LSE + row) + tl.where(kl < INF, kl, 0.0))
    g = tl.zeros_like(x) + weight * inv_temperature
    if HAS_B:
        g -= x * (b * inv_temperature * LN2)
    if HAS_C:
        g += (z - r) * (c * inv_temperature * inv_temperature)
    chosen = columns == tl.load(TOKENS + row).to(tl.int32)
    dz = tl.exp2(x) * g + tl.where(chosen, a * inv_temperature, 0.0)
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
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor,
    values: Tensor | None = None, tau: float = 0.0,
) -> Residuals:  # fmt: skip
    """`torch_logits.logits_stats` for logits [..., V] in one visit to each row (Milakov and Gimelshein 2018)."""
    out = Residuals.zeros(tokens, torch.float32, ref_logits is not None, values is not None)
    rows, V = len(tokens), logits.shape[-1]
    if rows == 0:
        return out
    z, time, z_batch, z_time = _grid_view(logits)
    has_ref = ref_logits is not None
    r, _, r_batch, r_time = _grid_view(ref_logits if has_ref else logits)
    splits, span = vocabulary_splits(ROWS_PER_SPLIT, rows, V, STATS_BLOCK)
    partials = torch.empty((PARTIALS, splits, rows), dtype=torch.float32, device=logits.device)
    places = (rows, V, time, z_batch, z_time, r_batch, r_time, 1 / temperature)
    with torch.cuda.device_of(logits):
        stats_kernel[(rows, splits)](
            z, r, mask, partials, *places, splits, span, HAS_REF=has_ref, BLOCK=_block(STATS_BLOCK, V)
        )
        merge_partials(partials, tokens, mask, z, r if has_ref else None, places, out, values, tau, in_rows=True)
    return out


def merge_partials(
    partials: Tensor, tokens: Tensor, mask: Tensor, z: Tensor, r: Tensor | None, places: tuple, out: Residuals,
    values: Tensor | None, tau: float, in_rows: bool,
) -> None:  # fmt: skip
    """Launch `merge_kernel` on partials [PARTIALS, splits, N]. z and r are rows that lie as `places` (N, V, T, strides,
    1/temperature) says, or, not in_rows, the tokens' own logits [N]. Source: Milakov and Gimelshein 2018."""
    splits, given = partials.shape[1], partials if values is None else values.contiguous()
    merge_kernel[(partials.shape[2],)](
        partials, tokens, mask, z, z if r is None else r, given, *out, *places, float(tau), splits,
        HAS_REF=r is not None, HAS_Q=values is not None, IN_ROWS=in_rows, SPLITS=triton.next_power_of_2(splits),
        num_warps=1,
    )  # fmt: skip


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
    block = _block(GRAD_BLOCK, V)
    flags = {f"HAS_{name}": x is not None for name, x in zip("ABC", upstream, strict=True)}
    with torch.cuda.device_of(logits):
        grad_kernel[(rows, triton.cdiv(V, block))](
            z, r, tokens, mask, stats.entropy, stats.kl, stats.shift, stats.lse, stats.ref_shift, stats.ref_lse,
            *(stats.lse if x is None else x for x in upstream), out, V, time, z_batch, z_time, r_batch, r_time,
            out.stride(0), 1 / temperature, **flags, BLOCK=block,
        )  # fmt: skip
    return out


def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    tau: float, gamma: float, lam: float, alpha: float,
) -> LambdaReturns:  # fmt: skip
    """`reference.lambda_returns` (arXiv 2508.17000, eqs. (7), (14)) of [B, T] in one launch, each row scanned in
    parallel."""
    out = LambdaReturns(*(torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(3)))
    if mask.numel() == 0:
        return out
    given = [rewards, values, logprobs, ref_logprobs, mask, mask if trace_weights is None else trace_weights]
    inputs = [x if x.stride(1) == 1 else x.contiguous() for x in given]
    block = min(SCAN_BLOCK, triton.next_power_of_2(mask.shape[1]))
    with torch.cuda.device_of(mask):
        returns_kernel[(len(mask),)](
            *inputs, *out, mask.shape[1], *(x.stride(0) for x in inputs), tau, gamma, lam, alpha,
            HAS_WEIGHTS=trace_weights is not None, BLOCK=block,
        )  # fmt: skip
    return out


def vocabulary_splits(programs: int, rows: int, V: int, block: int) -> tuple[int, int]:
    """(number of splits, tokens per split) of [rows, V]: one where the rows make enough programs, more where they don't
    (Flash-Decoding: Dao et al. 2023)."""
    wanted = min(triton.cdiv(programs, rows), triton.cdiv(V, block))
    span = triton.cdiv(triton.cdiv(V, wanted), block) * block
    return triton.cdiv(V, span), span


def _block(widest: int, V: int) -> int:
    """A tile's width, but no wider than the vocabulary needs."""
    return min(widest, max(16, triton.next_power_of_2(V)))


def _grid_view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(tensor, T, batch stride, time stride) such that flat row i starts at (i // T)·batch + (i % T)·time. A strided
    [B, T, V] with adjacent tokens is used as it stands."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x.flatten(0, -3) if x.dim() > 3 else x
    if x.dim() == 3:
        return x, x.shape[1], x.stride(0), x.stride(1)
    return x.reshape(-1, x.shape[-1]), 1, x.reshape(-1, x.shape[-1]).stride(0), 0
