"""The `triton` backend from hidden states: statistics without logits in memory, and what a chunk of logits needs.

Forward: each program walks over the tiles of its span of the vocabulary, multiplies hidden states by the weight tile in
fp32 accumulators, and folds the tile into its rows' running statistics; the sampled tokens' logits are a small product
of their own, and `merge_kernel` joins the spans. A shared head is loaded once for both models. The gradients are
`torch_linear`'s, with `triton_logits` between products.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from klq_kernels import triton_logits
from klq_kernels.device import INF, LOG2E, accumulate, empty_state, store_state
from klq_kernels.torch_linear import head_logits
from klq_kernels.triton_logits import PARTIALS, merge_partials
from klq_kernels.types import Head, Residuals, Upstream

INTERPRETED = triton.knobs.runtime.interpret
REF_SHARE = 1 / 2  # of the workspace, for a chunk's logits of the reference
TOKEN_BLOCK = 1024  # hidden sizes of a token's own product taken at once: 16 bytes per thread
FP32 = {"cuda": "tf32x3", "hip": "ieee"}  # products: as three in TF32 (Ootomo and Yokota 2022), on AMD as they are
GROUP = 16  # row tiles that run together: their hidden rows (16 MiB of 128 × 4096 in bf16) stay in L2


class MatmulTile(NamedTuple):
    """Compile-time sizes of a tile: rows, vocabulary, hidden; warps and pipeline stages; whether tensor descriptors
    (TMA: the hardware loads whole tiles) or pointers say where operands lie; in how many parts logits are folded."""

    rows: int
    vocab: int
    hidden: int
    warps: int
    stages: int
    descriptors: bool = False
    parts: int = 1


def _tiles(one: tuple, shared: tuple, two: tuple) -> dict[str, MatmulTile]:
    """Tiles by what there is: one model; a reference with the policy's head; a reference with its own."""
    return {"one": MatmulTile(*one), "shared": MatmulTile(*shared), "two": MatmulTile(*two)}


TMA, POINTERS = True, "sm_80"  # the latter's tiles serve where a row's bytes are no multiple of 16, too
# By device and bytes per element; none spills (`klq inspect`). sm_80 stands for all of 8.x. Never run: sm_100, gfx942.
TILES = {
    "sm_80": {
        2: _tiles((128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 3)),
        4: _tiles((128, 64, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    },
    "sm_90": {
        2: _tiles((128, 256, 64, 8, 3, TMA), (128, 128, 64, 8, 3, TMA, 2), (128, 128, 64, 8, 4, TMA, 4)),
        4: _tiles((128, 128, 32, 8, 3, TMA), (128, 64, 32, 8, 3, TMA), (128, 64, 32, 8, 3, TMA)),
    },
    "sm_100": {
        2: _tiles((128, 256, 64, 8, 3, TMA, 2), (128, 128, 64, 8, 3, TMA, 2), (128, 128, 64, 8, 4, TMA, 2)),
        4: _tiles((128, 128, 32, 8, 3, TMA), (128, 64, 32, 8, 3, TMA), (128, 64, 32, 8, 3, TMA)),
    },
    "sm_120": {
        2: _tiles((128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3)),
        4: _tiles((64, 64, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    },
    "gfx942": {
        2: _tiles((256, 128, 32, 8, 2), (128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
        4: _tiles((64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
    },
    "cpu": dict.fromkeys((2, 4), _tiles((64, 64, 64, 1, 1), (64, 64, 64, 1, 1), (64, 64, 64, 1, 1))),
}


@triton.jit
def _multiply(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a b. The interpreter gets bfloat16 products wrong, so there the operands are converted first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _load_tile(X, first, d, count, D, stride, COUNT: tl.constexpr, HIDDEN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[COUNT, HIDDEN] of X [count, D] from row `first` and column d on; zeros outside, which a descriptor adds."""
    if DESCRIPTORS:
        return X.load([first, d])
    else:
        row, column = first + tl.arange(0, COUNT), d + tl.arange(0, HIDDEN)
        inside = (row < count)[:, None] & (column < D)[None, :]
        return tl.load(X + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    H, H2, W, first, start, rows, V, D, h_row, h2_row, w_row, BOTH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, HIDDEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[ROWS, VOCAB] logits in fp32 of the hidden states H from row `first` on, for tokens from `start` on; and, if
    BOTH, of H2, for which each tile of the weight W is loaded once."""
    z = tl.zeros([ROWS, VOCAB], tl.float32)
    r = z
    for d in range(0, D, HIDDEN):
        h = _load_tile(H, first, d, rows, D, h_row, ROWS, HIDDEN, DESCRIPTORS)
        w = _load_tile(W, start, d, V, D, w_row, VOCAB, HIDDEN, DESCRIPTORS).T
        z = _multiply(h, w, z, PRECISION, UPCAST)
        if BOTH:
            h2 = _load_tile(H2, first, d, rows, D, h2_row, ROWS, HIDDEN, DESCRIPTORS)
            r = _multiply(h2, w, r, PRECISION, UPCAST)
    return z, r


@triton.jit
def _biased(z, BIAS, start, V, HAS_BIAS: tl.constexpr):
    """Logits [rows, columns] plus the bias, if there is one, of tokens from `start` on."""
    if HAS_BIAS:
        columns = start + tl.arange(0, z.shape[1])
        z += tl.load(BIAS + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _until(parts, count):
    """Parts of a tile, [rows, columns] each, with −inf from column `count` of the tile on."""
    if len(parts) == 1:
        return (tl.where((tl.arange(0, parts[0].shape[1]) < count)[None, :], parts[0], -INF),)
    else:
        return _until(parts[:1], count) + _until(parts[1:], count - parts[0].shape[1])


@triton.jit
def _parts(x, PARTS: tl.constexpr):
    """x [rows, columns] as a tuple of PARTS (1, 2 or 4) with equally many columns each, from left to right."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return _parts(left, PARTS // 2) + _parts(right, PARTS // 2)


@triton.jit
def _token_logit(H, W, BIAS, row, token, known, D, h_row, w_row, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """One row's logit of one token in fp32; that of nothing (0) for an impossible one."""
    total = tl.zeros([BLOCK], tl.float32)
    for d in range(0, tl.where(known, D, 0), BLOCK):
        column = d + tl.arange(0, BLOCK)
        h = tl.load(H + row * h_row + column, mask=column < D, other=0.0).to(tl.float32)
        total += h * tl.load(W + token * w_row + column, mask=column < D, other=0.0).to(tl.float32)
    z = tl.sum(total, 0)
    if HAS_BIAS:
        z += tl.load(BIAS + token, mask=known, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["V"])
def token_logits_kernel(
    H, W, BIAS, H2, W2, BIAS2, TOKENS, MASK, Z, R, V, D, D2, h_row, w_row, h2_row, w2_row,
    HAS_BIAS: tl.constexpr, HAS_REF: tl.constexpr, HAS_BIAS2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both models' logits Z, R [rows] of each row's own token, an indexed product of their own (Wijmans et al. 2024):
    looking for the token in every tile would cost an instruction or two per logit."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(MASK + row) == 0:
        return
    token = tl.load(TOKENS + row).to(tl.int64)
    known = (token >= 0) & (token < V)
    tl.store(Z + row, _token_logit(H, W, BIAS, row, token, known, D, h_row, w_row, HAS_BIAS, BLOCK))
    if HAS_REF:
        tl.store(R + row, _token_logit(H2, W2, BIAS2, row, token, known, D2, h2_row, w2_row, HAS_BIAS2, BLOCK))


@triton.jit(do_not_specialize=["rows", "V", "span"])
def linear_stats_kernel(
    H, W, BIAS, H2, W2, BIAS2, MASK, OUT, rows, V, D, D2, h_row, w_row, h2_row, w2_row,
    inv_temperature, span,
    HAS_BIAS: tl.constexpr, HAS_REF: tl.constexpr, HAS_BIAS2: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, VOCAB: tl.constexpr, HIDDEN: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of a tile of rows over one span of the vocabulary; OUT [PARTIALS, splits, rows]. Programs are
    numbered by row tile of a group, then split, then group. A masked row's hidden states are multiplied like any
    other's: they reach no other row, and what comes of them is not stored. Source: Cut Cross-Entropy (Wijmans et al.
    2024)."""
    first, split = (tl.program_id(2) * GROUP + tl.program_id(0)) * ROWS, tl.program_id(1)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    if tl.max((tl.load(MASK + row, mask=row < rows, other=0) != 0).to(tl.int32), 0) == 0:
        return
    k = inv_temperature * LOG2E
    state = empty_state(ROWS, HAS_REF)
    end = tl.minimum((split + 1) * span, V)
    for start in range(split * span, end, VOCAB):
        z, r = _logits(
            H, H2, W, first, start, rows, V, D, h_row, h2_row, w_row,
            SHARED, PRECISION, UPCAST, ROWS, VOCAB, HIDDEN, DESCRIPTORS,
        )  # fmt: skip
        if HAS_REF and not SHARED:
            r, _ = _logits(
                H2, H2, W2, first, start, rows, V, D2, h2_row, h2_row, w2_row,
                False, PRECISION, UPCAST, ROWS, VOCAB, HIDDEN, DESCRIPTORS,
            )  # fmt: skip
        z, r = _biased(z, BIAS, start, V, HAS_BIAS), _biased(r, BIAS2, start, V, HAS_BIAS2)
        zs, rs = _parts(z, PARTS), _parts(r, PARTS)
        if start + VOCAB > V:
            zs, rs = _until(zs, V - start), _until(rs, V - start)
        for i in tl.static_range(PARTS):
            state = accumulate(zs[i], rs[i], state, k)
    stride = tl.num_programs(1).to(tl.int64) * rows
    live = tl.load(MASK + row, mask=row < rows, other=0) != 0
    store_state(OUT + split.to(tl.int64) * rows + row, stride, live, state)


def linear_stats(
    policy: Head, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int,
    values: Tensor | None = None, tau: float = 0.0,
) -> Residuals:  # fmt: skip
    """`torch_linear.linear_stats` of hidden [N, H] (Wijmans et al. 2024); needs no workspace."""
    out = Residuals.zeros(tokens, torch.float32, ref is not None, values is not None)
    rows, V = len(tokens), len(policy.weight)
    if rows == 0:
        return out
    heads, sizes, flags = _arguments(policy, ref)
    shared = ref is not None and _place(ref.weight) == _place(policy.weight)
    work = "shared" if shared else "one" if ref is None else "two"
    best = tile(capability(tokens.device), policy.weight.dtype, work)
    if best.descriptors and not all(map(_describable, (heads[i] for i in (0, 1, 3, 4)))):
        best = tile(POINTERS, policy.weight.dtype, work)
    blocks = [[best.rows, best.hidden], [best.vocab, best.hidden], None] * 2 if best.descriptors else [None] * 6
    operands = [TensorDescriptor.from_tensor(x, b) if b else x for x, b in zip(heads, blocks, strict=True)]
    row_tiles, tiles = triton.cdiv(rows, best.rows), triton.cdiv(V, best.vocab)
    splits, span = vocabulary_split(row_tiles, tiles, multiprocessors(tokens.device))
    together = min(GROUP, row_tiles)
    partials = torch.empty((PARTIALS, splits, rows), dtype=torch.float32, device=tokens.device)
    z, r = (torch.empty(rows, dtype=torch.float32, device=tokens.device) for _ in range(2))  # both aligned
    with torch.cuda.device_of(tokens):
        token_logits_kernel[(rows,)](*heads, tokens, mask, z, r, V, *sizes, **flags, BLOCK=TOKEN_BLOCK)
        linear_stats_kernel[(together, splits, triton.cdiv(row_tiles, together))](
            *operands, mask, partials, rows, V, *sizes, 1 / temperature, span * best.vocab, **flags,
            SHARED=shared, GROUP=GROUP, UPCAST=INTERPRETED, PRECISION=FP32["hip" if torch.version.hip else "cuda"],
            ROWS=best.rows, VOCAB=best.vocab, HIDDEN=best.hidden, DESCRIPTORS=best.descriptors, PARTS=best.parts,
            num_warps=best.warps, num_stages=best.stages,
        )  # fmt: skip
        merge_partials(
            partials, tokens, mask, z, None if ref is None else r, (rows, V, 1, 0, 0, 0, 0, 1 / temperature), out,
            values, tau, in_rows=False,
        )  # fmt: skip
    return out


def chunk_stats(
    z: Tensor, tokens: Tensor, ref: Head | None, temperature: float, mask: Tensor, workspace: int
) -> Residuals:
    """`torch_linear.chunk_stats` of policy logits z [n, V], which stay: both models' rows are visited together (Milakov
    and Gimelshein 2018), so that the reference's logits need memory of their own."""
    ref_logits = None if ref is None else head_logits(ref, ref.weight.new_empty(z.shape))
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
    flags["HAS_REF"] = ref is not None
    return given, (w.shape[1], w2.shape[1], *(x.stride(0) for x in (h, w, h2, w2))), flags


def tile(capability: str, dtype: torch.dtype, kind: str) -> MatmulTile:
    """The tile for operands [n, H] of this dtype on a device ("sm_90", "gfx942", "cpu"); kind is "one" model, a
    reference with a "shared" head, or "two" heads. Devices that are not in the table get what suits their kin."""
    if capability not in TILES:
        major = int(capability[3:-1]) if capability.startswith("sm_") else 0
        capability = {0: "gfx942", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, POINTERS)
    return TILES[capability][dtype.itemsize][kind]


def capability(device: torch.device) -> str:
    """A device's name in the table of tiles: "sm_90", "gfx942"; "cpu" for one on which kernels are interpreted."""
    if device.type != "cuda" or INTERPRETED:
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def multiprocessors(device: torch.device) -> int:
    """How many programs of `linear_stats_kernel` run at once: one fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(4096)
def vocabulary_split(row_tiles: int, tiles: int, slots: int) -> tuple[int, int]:
    """(splits, tiles per split) of logits [N, V] in so many tiles that leave the fewest of a device's slots idle: all
    programs take equally long, so they come in waves. A group of row tiles fills the device, or its hidden rows would
    not be all there is in L2. Source: Flash-Decoding (Dao et al. 2023) splits where rows are too few."""
    least = min(tiles, max(1, slots // min(GROUP, row_tiles)))
    spans = {triton.cdiv(tiles, n) for n in range(least, min(tiles, 4 * least) + 1)}
    span = min(sorted(spans, reverse=True), key=lambda n: triton.cdiv(row_tiles * triton.cdiv(tiles, n), slots) * n)
    return triton.cdiv(tiles, span), span


def _place(x: Tensor) -> tuple:
    """Where x [V, H] lies."""
    return x.data_ptr(), x.shape, x.stride()


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can say where x [n, H] lies: rows of whole 16 bytes that don't overlap."""
    stride, size = x.stride(0), x.element_size()
    return x.data_ptr() % 16 == 0 and stride * size % 16 == 0 and stride >= x.shape[1] > 0
