"""Chapter 11: from hidden states, without logits. Puzzles; what the notebook measures, compiles apart, and draws.
Nothing here imports Triton."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from torch.autograd.profiler import profile

from klq_edu.course.chapters import Chapter
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Mistake
from klq_edu.course.puzzles import Puzzle
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, Picture, panels, plain_axes
from klq_kernels.reference import linear_token_stats
from klq_kernels.torch_linear import WORKSPACE_BYTES

BLOCK = 16  # rows, tokens and hidden sizes of a puzzle's tile
LOWEST = -1e30  # where a running maximum starts
GIB = 2**30
SIZE = {"bf16": 2, "fp32": 4}  # bytes of an element
CARDS = (16, 40, 80)  # GB of memory that GPUs come with
KERNEL = "linear_token_stats, one model"
APART = """
import json, sys
from klq_kernels.offline import examine
for tile in json.loads(sys.argv[2]):
    record, sources = examine(sys.argv[1], "sm_90", "bf16", tile)
    print(json.dumps(record | sources))
"""


class Spent(NamedTuple):
    """What a computation took."""

    peak: int  # most bytes that were allocated at once, beyond what was there before
    operations: int  # of its matrix products, a multiply-add counting twice


@contextmanager
def _silenced():
    """Nothing of what C code writes to stderr: torch's profiler says there when it starts."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def spent(work: Callable, *arguments) -> Spent:
    """Call it, and ask torch's profiler what was allocated and multiplied (on the CPU)."""
    with _silenced(), profile(use_cpu=True, profile_memory=True, record_shapes=True) as profiled:
        work(*arguments)
    level, peak, operations = 0, 0, 0
    for event in sorted(profiled.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            peak = max(peak, level := level + event.nbytes())
        elif event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (rows, inner), (_, columns) = [x for x in event.shapes() if len(x) == 2][-2:]
            operations += 2 * rows * inner * columns
    return Spent(peak, operations)


def naive_bytes(n: int, v: int) -> float:
    """(11.1): the peak of log-prob by all logits, with its gradient; three [N, V] tensors in float32."""
    return 12.0 * n * v


def linear_bytes(n: int, v: int, h: int, size: int, workspace: int) -> float:
    """(11.2), a bound on the peak of `linear_klq_loss`: workspaces, gradients, in 16 bits the sum of dW in float32."""
    return 4.0 * workspace + size * (n + v) * h + (4 * v * h if size == 2 else 0)


def _linear_bytes(n: int, v: int, h: int, size: int) -> float:
    """With the workspace that the library takes on a GPU."""
    return linear_bytes(n, v, h, size, WORKSPACE_BYTES["cuda"])


def largest_batch(gigabytes: float, v: int, h: int, size: int, linear: bool) -> float:
    """Rows whose hidden states, with the weight and all that the loss takes, fill so many GB (0: not one fits)."""

    def total(n):
        return size * (n + v) * h + (_linear_bytes(n, v, h, size) if linear else naive_bytes(n, v))

    return max(0.0, (1e9 * gigabytes - total(0)) / (total(1) - total(0)))


def draw_memory(figure: FigureBase, N: int, V: int, H: int, dtype: str) -> None:
    """Left: bytes of both ways against N. Right: the largest N on a card of 16, 40 and 80 GB."""
    left, right = plain_axes(figure, 2)
    size, rows = SIZE[dtype], np.geomspace(256, 131_072, 60)
    ways = (("all logits, (11.1)", "-", "//", ORANGE, lambda n: naive_bytes(n, V)),
            ("linear, at most (11.2)", "--", "", BLUE, lambda n: _linear_bytes(n, V, H, size)))  # fmt: skip
    for i, (name, line, hatch, colour, of) in enumerate(ways):
        left.plot(rows, [of(n) / GIB for n in rows], line, color=colour, label=name)
        left.plot(N, of(N) / GIB, "o", color=colour)
        look = {"xytext": (4, -12 if i else 5), "textcoords": "offset points", "fontsize": 8}
        left.annotate(f"{of(N) / GIB:.3g}", (N, of(N) / GIB), **look)
        batches = [largest_batch(card, V, H, size, linear=bool(i)) for card in CARDS]
        bars = right.bar(np.arange(3) + 0.4 * i, batches, 0.38, color=colour, hatch=hatch, edgecolor="white")
        right.bar_label(bars, [f"{n:,.0f}" for n in batches], fontsize=7)
    for card in CARDS:
        left.axhline(card * 1e9 / GIB, color=GREY, lw=0.8, ls=":")
        left.text(rows[0], card * 1e9 / GIB, f"{card} GB", fontsize=7, va="bottom", color=GREY)
    left.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="peak [GiB]", ylim=(0.05, 1e3),
             title=f"N = {N:,}, V = {V:,}, H = {H:,}, {dtype}")  # fmt: skip
    left.title.set_fontsize(9)
    left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.13, 1.0))
    right.set(xticks=np.arange(3) + 0.2, xticklabels=[f"{card} GB" for card in CARDS], yscale="log", ylim=(100, 1e8),
              ylabel="largest N", title="largest batch")  # fmt: skip
    right.title.set_fontsize(9)


MEMORY = Widget(
    "11-memory", draw_memory,
    {"N": [2048, 8192, 32_768], "V": [32_000, 128_256], "H": [2048, 4096], "dtype": ["bf16", "fp32"]},
    [{"N": 8192, "V": 128_256, "H": 4096, "dtype": "bf16"}, {"N": 8192, "V": 32_000, "H": 2048, "dtype": "bf16"}],
    "Peak memory of one loss with its gradient, hidden states and weight not counted (left), and the largest batch "
    "where they are (right). By all logits memory grows as N times V. Without them it is flat until the gradient of "
    "the hidden states matters; for few tokens workspace and weight's gradient take more than all logits would.",
    "Two settings: on logarithmic axes, peak memory against the number of tokens, a steep line for all logits and a "
    "nearly flat one without; and bars of the largest batch on cards of 16, 40 and 80 gigabytes.",
    size=(7.4, 3.1),
)  # fmt: skip


def compiled_tiles(*tiles: list[int]) -> list[dict]:
    """What the library's kernel becomes on an H100 with each of these tiles (rows, vocabulary, hidden, warps, stages,
    descriptors, parts; empty: its own): a record of `klq_kernels.offline` with "ptx" and "sass", from a process in
    which Triton compiles."""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", APART, KERNEL, json.dumps(tiles)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def predictions(records: list[dict], model: list[dict]) -> pd.DataFrame:
    """A model, not a measurement: what bounds each tile, milliseconds and share of the floor, as `roofline.predict` has
    it for every record."""
    found = []
    for record, said in zip(records, model, strict=True):
        (slow, fast), shares = said["ms"], [f"{100 * x:.0f}" for x in said["share"]]
        bound = "/".join(dict.fromkeys(said["bound"]))
        found.append((record["tile"], bound, f"{fast:.0f}–{slow:.0f}", "–".join(shares)))
    return pd.DataFrame(found, columns=["tile", "bound by", "model [ms]", "share of the floor [%]"])


def draw_tiles(
    tiles: list[tuple[int, int]], needed: dict[str, list[float]], l2: tuple[float, float], shared: float
) -> Picture:
    """Bytes per clock that tiles need at full matrix rate, by GPU, and what L2 and shared memory of the first give."""
    figure, (axis,) = panels(1, 7.2)
    looks = zip(needed.items(), (BLUE, ORANGE, GREEN, GREY), ("-", "--", "-.", ":"), ("o", "s", "^", "D"))
    for (name, values), colour, line, marker in looks:
        axis.plot(range(len(tiles)), values, line, color=colour, marker=marker, label=f"{name}: needed")
    axis.axhspan(*l2, color=BLUE, alpha=0.2, lw=0, label="H100: L2 delivers")
    axis.axhline(shared, color=BLUE, lw=0.8)
    axis.text(len(tiles) - 1, shared, "shared memory delivers", ha="right", va="bottom", fontsize=8, color=BLUE)
    ticks, names = [16, 32, 64, 128, 256, 512], [f"{m} × {n}" for m, n in tiles]
    axis.set(xticks=range(len(tiles)), xticklabels=names, yscale="log", yticks=ticks, yticklabels=ticks,
             xlabel="tile of logits, rows × tokens", ylabel="bytes per clock of a multiprocessor")  # fmt: skip
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    caption = (
        "What must be loaded per clock to keep the matrix units busy, by (11.8), for two bytes per element. A tile "
        "of 64 × 64 needs several times what the L2 of an H100 delivers; 128 × 256 comes near."
    )
    return Picture(figure, caption, "Bytes per clock against tile size on a logarithmic axis: a falling line per GPU, "
                   "and a horizontal band of what an H100 delivers; its line enters it only at the end.")  # fmt: skip


def lines(source: str, pattern: str, count: int = 3) -> list[str]:
    """The first lines of an assembly source with this pattern, without addresses and what makes a page too wide; none
    where it is not there."""
    found = [line.split("*/")[-1].split() for line in source.splitlines() if pattern in line]
    return [" ".join(w if len(w) < 45 else f"{w[:43]}…" for w in words) for words in found[:count]]


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Puzzle 11.1."""
    return (hidden.double() @ weight.double().T).float()


def _product(read: Callable = lambda x: x, other: Callable | None = None) -> Callable:
    """A product whose operands are read so (the weight otherwise, if `other` is given)."""
    return lambda hidden, weight: product(read(hidden), (other or read)(weight))


def _in_half(hidden, weight):
    """The sum over blocks of the hidden size is kept in float16."""
    total = torch.zeros(len(hidden), len(weight), dtype=torch.float16)
    for h, w in zip(hidden.split(BLOCK, 1), weight.split(BLOCK, 1)):
        total += product(h, w).half()
    return total.float()


def log_normaliser(hidden: Tensor, weight: Tensor) -> Tensor:
    """Puzzle 11.2."""
    return torch.logsumexp(hidden.double() @ weight.double().T, 1).float()


def _online(start: float = LOWEST, rescaled=True, added=True, rowwise=True, running=True) -> Callable:
    """The loop of a kernel over tiles of the vocabulary, with a mistake."""

    def answer(hidden, weight):
        out = []
        for h in hidden.split(BLOCK):
            m, s = torch.full((len(h),), start, dtype=torch.float32), torch.zeros(len(h), dtype=torch.float32)
            for w in weight.split(BLOCK):
                z = product(h, w)
                new = torch.maximum(m, z.amax(1) if rowwise else z.amax()) if running else z.amax(1)
                s = s * (m - new).exp() ** rescaled + (z - new[:, None]).exp().sum(1)
                m = new
            out.append(added * m + s.log())
        return torch.cat(out)

    return answer


def hidden_gradient(hidden: Tensor, weight: Tensor, tokens: Tensor, lse: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
    """Puzzle 11.3, by autograd through all logits."""
    given = torch.where(mask[:, None], hidden, 0.0).double().requires_grad_()
    with torch.enable_grad():
        stats = linear_token_stats(given, weight.double(), tokens, mask=mask)
        total = (torch.where(mask, grad, 0.0).double() * stats.logprob).sum()
    return torch.autograd.grad(total, given)[0].float()


def _gradient(
    onehot: Callable = lambda v, y: v == y, sign: float = 1.0, upstream: bool = True, read: Callable = lambda x: x,
    normal: Callable = lambda z, lse: (z - lse[:, None]).exp(), only_last: bool = False, masked: float | None = 0.0,
    whole: Callable = lambda weight: weight,
) -> Callable:  # fmt: skip
    """The tiles of a kernel, with a mistake; `onehot` gets the tokens of a tile [n] and those of the rows [N, 1]."""

    def answer(hidden, weight, tokens, lse, grad, mask):
        h, total = read(hidden).double(), 0.0
        weight = whole(read(weight)).double()
        for start in range(0, len(weight), BLOCK):
            w = weight[start : start + BLOCK]
            hot = onehot(torch.arange(start, start + len(w)), tokens[:, None]).double()
            g = sign * (hot - normal(h @ w.T, lse.double())) * (grad[:, None] if upstream else 1.0)
            total = g @ w + (0.0 if only_last else total)
        return (total if masked is None else torch.where(mask[:, None], total, masked)).float()

    return answer


def _no_mask(x: Tensor) -> Tensor:
    """What lies in memory where whole blocks of the hidden size are read."""
    return x.as_strided((len(x), -(-x.shape[1] // BLOCK) * BLOCK), x.stride())


def _no_tail(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // BLOCK * BLOCK]


def _contiguous(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, (x.shape[1], 1))


def _transposed(x: Tensor) -> Tensor:
    """Column d of row v is read from row d, column v."""
    return x.as_strided(x.shape, x.stride()[::-1])


def _whole_tiles(weight: Tensor) -> Tensor:
    """Zeros behind the end of the vocabulary."""
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % BLOCK))


def _grid(generator: Generator, limit: int, scale: float, *shape: int) -> Tensor:
    """Random multiples of `scale` below `limit` of them, float32: sums of products of such numbers are exact."""
    return torch.randint(1 - limit, limit, shape, generator=generator).float() * scale


def _size(generator: Generator, blocks: int) -> int:
    """So many blocks, the last of them ragged."""
    return (blocks - 1) * BLOCK + int(torch.randint(3, BLOCK - 2, (), generator=generator))


def _operands(generator: Generator) -> tuple[Tensor, Tensor]:
    n, v, h = (_size(generator, blocks) for blocks in (2, 4, 3))
    hidden, weight = _grid(generator, 512, 2**-6, n, h), _grid(generator, 512, 2**-6, v, h)
    hidden[1] *= 2**14
    return hidden, weight


def _model(generator: Generator, offset: float = 300.0) -> tuple[Tensor, Tensor]:
    """Hidden states and weight of logits that are exact in float32, of some rows larger or smaller by the offset."""
    n, v, h = (_size(generator, blocks) for blocks in (2, 3, 2))
    hidden, weight = _grid(generator, 16, 2**-3, n, h), _grid(generator, 32, 2**-5, v, h)
    hidden[:, 0] = torch.tensor([0.0, -offset, offset], dtype=torch.float32).repeat(n)[:n]
    weight[:, 0] = 1.0
    return hidden, weight


def _falling(generator: Generator) -> tuple[Tensor, Tensor]:
    """As `_model`; from the second tile of the vocabulary on, the offset counts half: logits fall or rise by 150."""
    hidden, weight = _model(generator)
    weight[BLOCK:, 0] = 0.5
    return hidden, weight


def _differentiable(generator: Generator) -> tuple[Tensor, ...]:
    hidden, weight = (x.roll(-1, 1) for x in _model(generator, offset=100.0))  # the gradient of the offset is 0: last
    n, v = len(hidden), len(weight)
    tokens = torch.randint(v, (n,), generator=generator)
    tokens[:2] = torch.tensor([2, v - 1])  # in the first tile, and in the ragged one
    lse = log_normaliser(hidden, weight)
    grad = 1 + torch.rand(n, generator=generator, dtype=torch.float32)
    mask = torch.arange(n) % 5 != 3
    hidden[~mask], lse[~mask], grad[~mask], tokens[~mask] = torch.nan, torch.nan, torch.nan, -100
    return hidden, weight, tokens, lse, grad, mask


STRIDE = "your rows start at row · H, but these lie further apart: row · x.stride(0), of each tensor its own."
NANS = (
    "every number is NaN. As a rule memory from outside of the rows got in: they start at row · x.stride(0), of each "
    "tensor its own, not at row · H; and the last block of the hidden size ends at H, d < H in the mask of both loads, "
    "other=0.0. (If both are right: ∞ − ∞, or 0 · ∞ in a product.)"
)
EXERCISES = {
    "11.1": Puzzle(
        "11.1", "A product in tiles", 2, 25, product, _operands,
        (
            Mistake("unmasked tail", _product(_no_mask),
                    "the last block of the hidden size is read beyond the end of the rows: mask=columns < H in both "
                    "loads, other=0.0."),
            Mistake("tail dropped", _product(_no_tail),
                    "the tail of the hidden size is missing: H // BLOCK leaves it out, range(0, H, BLOCK) does not."),
            Mistake("one block", _product(lambda x: x[:, :BLOCK]),
                    "only the first block of the hidden size was multiplied: loop over all of them."),
            Mistake("overwritten", _product(lambda x: x[:, (x.shape[1] - 1) // BLOCK * BLOCK :]),
                    "only the last block of the hidden size is left: add each product to the sum, "
                    "total += tl.dot(…), or tl.dot(…, total)."),
            Mistake("transposed", _product(other=_transposed),
                    "your weight is read transposed: row v, column d lies at v · stride + d. For the product turn "
                    "the tile that you have loaded, w.T."),
            Mistake("wrong stride", _product(_contiguous), STRIDE),
            Mistake("half accumulator", _in_half,
                    "you add up in float16, which has three digits and ends at 65504: the accumulator is float32."),
            Mistake("bfloat16", _product(Tensor.bfloat16),
                    "your operands were rounded to bfloat16; here they are float32, and stay so."),
            Mistake("float16", _product(Tensor.half),
                    "your operands were rounded to float16, and some overflow; here they are float32, and stay so."),
        ),
        ("A program owns a tile: rows first, …, first + 15 and tokens start, …, start + 15. What does it carry along "
         "while d goes over the hidden size?",
         "h = tl.load(HIDDEN + row[:, None] * h_row + d[None, :], mask=…, other=0.0) is a tile [16, 16]. Which two "
         "conditions does its mask have? And which those of w, with token[:, None]?",
         "total = tl.zeros([BLOCK, BLOCK], tl.float32), then total += tl.dot(h, w.T, input_precision='ieee'); store at "
         "OUT + row[:, None] * V + token[None, :], masked by row < N and token < V."),
        tile=(BLOCK, BLOCK),
    ),
    "11.2": Puzzle(
        "11.2", "The normaliser without logits", 2, 25, log_normaliser, _falling,
        (
            Mistake("phantom tokens", lambda h, w: log_normaliser(h, _whole_tiles(w)),
                    "tokens behind the end of the vocabulary take part: their weight was loaded as 0, so their logit "
                    "is 0 and not −∞, and e^0 enters the sum. After the product: tl.where(token < V, z, "
                    "float('-inf'))."),
            Mistake("not rescaled", _online(rescaled=False),
                    "you forgot to rescale: when the maximum rises from m to m', the old sum shrinks by e^(m − m')."),
            Mistake("maximum started at 0", _online(start=0.0),
                    "your maximum starts at 0: logits near −300 underflow, and log 0 = −∞. Start at −1e30."),
            Mistake("maximum of the tile", _online(running=False),
                    "your maximum is that of the last tile alone: where that lies far below an earlier one, e^(m − m') "
                    "overflows. It is a running one, tl.maximum(m, tl.max(z, 1))."),
            Mistake("one maximum", _online(rowwise=False),
                    "you subtract one maximum from all rows of the tile: a row that lies 600 lower underflows. One "
                    "per row, tl.max(z, 1)."),
            Mistake("no maximum", lambda h, w: product(h, w).exp().sum(1).log(),
                    "e^300 overflows and e^(−300) underflows in float32: subtract the running maximum."),
            Mistake("maximum not added", _online(added=False),
                    "you return log s: the maximum that you subtracted has to be added again, m + log s."),
            Mistake("vocabulary's tail", lambda h, w: log_normaliser(h, w[: len(w) // BLOCK * BLOCK]),
                    "the last, ragged tile of the vocabulary is missing: range(0, V, BLOCK)."),
            Mistake("half precision", lambda h, w: torch.logsumexp(product(h, w).half().double(), 1).float(),
                    "your logits were rounded to half precision: near 300 that is steps of 0.25. Keep them in "
                    "float32."),
            Mistake("NaN", lambda h, w: log_normaliser(_contiguous(h), _contiguous(w)), NANS),
        ),
        ("Notebook 09 had one row and a block of logits, here it is 16 rows and a tile. m and s are now of shape [16].",
         "z = tl.dot(h, w.T, input_precision='ieee') is [16, 16]. Reduce along its second axis: tl.max(z, 1), "
         "tl.sum(…, 1). What is z for a token behind the end of the vocabulary, and what must it be?",
         "z = tl.where((token < V)[None, :], z, float('-inf')); new = tl.maximum(m, tl.max(z, 1)); s = s * tl.exp(m "
         "- new) + tl.sum(tl.exp(z - new[:, None]), 1); m = new. Start with m = tl.full([BLOCK], -1e30, tl.float32)."),
        tile=(BLOCK,),
    ),
    "11.3": Puzzle(
        "11.3", "The gradient of the hidden states, tile by tile", 3, 30, hidden_gradient, _differentiable,
        (
            Mistake("one-hot at the wrong place", _gradient(lambda v, y: v % BLOCK == y),
                    "the 1 of the sampled token stands in the wrong tile: compare the token with the tile's own "
                    "tokens, start + tl.arange(0, BLOCK), not with 0, …, 15."),
            Mistake("no one-hot", _gradient(lambda v, y: torch.zeros(1)),
                    "the sampled token's 1 is missing: G = a (1[v = token] − p)."),
            Mistake("sign", _gradient(sign=-1.0),
                    "the sign is wrong: that is the gradient of −log π, a loss; asked is that of a · log π."),
            Mistake("upstream forgotten", _gradient(upstream=False),
                    "the upstream gradient is missing: multiply each row of G by its a."),
            Mistake("softmax of a tile", _gradient(normal=lambda z, lse: z.softmax(1)),
                    "you normalised within the tile: p = e^(z − lse), with the log-normaliser of the whole "
                    "vocabulary."),
            Mistake("not normalised", _gradient(normal=lambda z, lse: z.float().exp().double()),
                    "e^z is no probability yet, and overflows: p = e^(z − lse)."),
            Mistake("phantom tokens", _gradient(whole=_whole_tiles,
                        normal=lambda z, lse: (z - lse[:, None]).float().exp().double()),
                    "tokens behind the end of the vocabulary take part: their logit is 0, and e^(0 − lse) overflows "
                    "where lse is near −100; ∞ times their weight of 0 is NaN, and so is ∞ · 0 if you multiply p by a "
                    "mask. Pick with tl.where: z = −∞, or p = 0."),
            Mistake("overwritten", _gradient(only_last=True),
                    "only the last tile's share is left: add up G W over all tiles of the vocabulary."),
            Mistake("masked rows leak", _gradient(masked=None),
                    "a masked row is not 0: its hidden state is NaN and 0 · NaN is NaN, or it was never stored and "
                    "`new_empty` left what was in memory. Pick with tl.where, then store every row."),
            Mistake("NaN", _gradient(read=_contiguous), NANS),
        ),
        ("Two products per tile: z = h Wᵀ, then G W. Which of the two has the tokens of the tile as its inner "
         "dimension?",
         "p = tl.exp(z - lse[:, None]) needs no maximum: lse is known. The one-hot is (token[None, :] == chosen[:, "
         "None]). What is p of a token behind the end, whose weight was loaded as 0, in a row whose lse is −100?",
         "z = tl.where((token < V)[None, :], z, float('-inf')) as before; g = a[:, None] * (tl.where(token[None, :] "
         "== chosen[:, None], 1.0, 0.0) - p); total += tl.dot(g, w, input_precision='ieee'); at the end "
         "tl.where(live[:, None], total, 0.0)."),
        tol=1e-4, atol=5e-5, tile=(BLOCK, 1),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "11", "never_build_the_logits", "Kernels III: never build the logits",
    "What does it take to train on a large vocabulary without ever having its logits in memory?",
    "kernels", "(2) and (6), from hidden states",
    ("klq_kernels.linear_token_stats", "klq_kernels.linear_klq_loss", "klq_kernels.offline", "klq_edu.bench.roofline"),
    needs=("10",), place=(8, -1.4), short="no logits", exercises=EXERCISES,
)  # fmt: skip
