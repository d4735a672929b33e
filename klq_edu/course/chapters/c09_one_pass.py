"""Chapter 09: one pass over the vocabulary. Puzzles, and what the notebook counts and draws; nothing imports Triton."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klq_edu.course.chapters import Chapter
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Mistake
from klq_edu.course.puzzles import Puzzle, hostile_logits
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, Picture, panels, plain_axes
from klq_kernels.reference import token_stats

BLOCK = 32  # logits that a program of a puzzle reads at a time
LOWEST = -1e30  # where a running maximum starts
INF = torch.inf


class Traffic(TorchDispatchMode):
    """Counts what operations read and write while it is entered, backward passes included, as if each were a kernel
    that finds nothing in a cache. Views, and memory that is made empty, are free; `gather` reads only what it picks,
    `scatter_add` writes only what it adds to.

    weigh: what a tensor counts; its bytes, if it does not say. rows: (operation, read, written) of each that moved.

    >>> import torch
    >>> with Traffic() as traffic:
    ...     _ = torch.ones(8, 5).T.exp().sum()
    >>> traffic.rows
    [('ones', 0, 160), ('exp', 160, 160), ('sum', 160, 4)]
    """

    def __init__(self, weigh: Callable[[Tensor], float] = lambda x: x.nbytes):
        super().__init__()
        self.weigh, self.rows = weigh, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run it, and count."""
        out, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
        given, made = (tensors(part) for part in ((args, kwargs), out))
        view = not function._schema.is_mutable and storages(given) & storages(made)
        if view or name.startswith(("empty", "new_empty")):
            return out
        if name == "gather":
            given = [*given[1:], *made]
        elif name.startswith("scatter_add"):
            given, made = [*given[1:], given[-1]], given[-1:]
        elif name.startswith("new_") or name.endswith("_like"):
            given = []
        self.rows.append((name, sum(map(self.weigh, given)), sum(map(self.weigh, made))))
        return out

    @property
    def read(self) -> float:
        """All that was read."""
        return sum(read for _, read, _ in self.rows)

    @property
    def written(self) -> float:
        """All that was written."""
        return sum(written for _, _, written in self.rows)


def visits(elements: int) -> Traffic:
    """Counts how often a whole tensor of so many elements is read or written."""
    return Traffic(lambda x: x.numel() == elements and 0 not in x.stride())


def tensors(x) -> list[Tensor]:
    """Those in a nested structure."""
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def storages(x) -> set[int]:
    """Where the memory of the tensors in a nested structure begins; empty ones have none."""
    return {leaf.untyped_storage().data_ptr() for leaf in tensors(x) if leaf.numel()}


def measured(ways: dict[str, Callable], rows: int, vocab: int, device: str = "cuda") -> pd.DataFrame:
    """Milliseconds of each way, a function of bf16 logits [rows, vocab] of both models and tokens, on this GPU."""
    import triton

    z, r = (torch.randn(rows, vocab, device=device, dtype=torch.bfloat16) for _ in range(2))
    tokens = torch.randint(vocab, (rows,), device=device)
    ms = [triton.testing.do_bench(lambda way=way: way(z, r, tokens)) for way in ways.values()]
    return pd.DataFrame({"": list(ways), "measured [ms]": ms, "times the last": [x / ms[-1] for x in ms]})


def example(block: int = 8, blocks: int = 6) -> tuple[Tensor, Tensor]:
    """Logits [V] of a policy and its reference, whose maximum is found late."""
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(block * blocks, generator=rng, dtype=torch.float64) + torch.linspace(-2, 2, block * blocks).double()
    return z, z + 0.7 * torch.randn(len(z), generator=rng, dtype=torch.float64)


def draw_pass(figure: FigureBase, blocks: int) -> None:
    """Left: the logits, those that were read, their maximum. Right: what is known of the row after every block."""
    block, (z, r) = 8, example()
    left, right = plain_axes(figure, 2)
    seen, places = blocks * block, np.arange(len(z))
    top = z[:seen].max().item()
    left.bar(places, z.numpy(), color="white", edgecolor=GREY, hatch="..", label="not yet read")
    left.bar(places[:seen], z[:seen].numpy(), color=BLUE, edgecolor=BLUE, label="read")
    left.axhline(top, color=ORANGE, ls="--", label=f"maximum m = {top:.2f}")
    s = (z[:seen] - top).exp().sum().item()
    left.set(
        xlabel="token of the vocabulary", ylabel="logit z", ylim=(-5, 7), title=f"{blocks} of 6 blocks: s = {s:.2f}"
    )
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    steps, zero = np.arange(1, 7), torch.zeros(1, dtype=torch.long)
    known = [token_stats(z[None, : k * block], zero, r[None, : k * block]) for k in steps]
    lines = (
        ("log-normaliser m + log s", "-", "o", BLUE, [torch.logsumexp(z[: k * block], 0) for k in steps]),
        ("entropy", "--", "s", ORANGE, [x.entropy for x in known]),
        ("KL", ":", "^", GREEN, [x.kl for x in known]),
    )
    for name, style, marker, colour, values in lines:
        values = [float(x) for x in values]
        right.plot(steps[:blocks], values[:blocks], style, color=colour, marker=marker, ms=4, label=name)
        right.plot(steps[blocks - 1], values[blocks - 1], marker, color=colour, ms=9)
        right.axhline(values[-1], color=colour, lw=0.8, alpha=0.5)
    right.set(xlabel="blocks read", ylabel="of the tokens read so far [nats]", ylim=(-0.2, 6), xlim=(0.7, 6.3),
              title="what the statistics say")  # fmt: skip
    right.legend(frameon=False, fontsize=8, loc="upper left")


PASS = Widget(
    "09-pass", draw_pass, {"blocks": [1, 2, 3, 4, 5, 6]}, [{"blocks": 2}, {"blocks": 6}],
    "A row of 48 logits, read in six blocks. Left: the maximum (dashed) rises as more is read, and each rise shrinks "
    "what was summed before. Right: log-normaliser, entropy and KL of the tokens read so far; after the last block, "
    "and only then, each has reached the thin line of the whole row.",
    "Two states of one pass: bars of the logits read with the running maximum, and lines of log-normaliser, entropy "
    "and KL over the blocks read, which end at the values of the whole row.",
    size=(7.6, 3.0),
)  # fmt: skip


def draw_rounding(exact: Tensor, forms: dict[str, Tensor], epsilon: float) -> Picture:
    """Relative errors of the KL in float32, by form, against the true KL."""
    figure, (axis,) = panels(1, 7.2)
    looks = zip((ORANGE, BLUE, GREEN), ("-", "--", "-."), ("o", "s", "^"))
    for (name, values), (colour, style, marker) in zip(forms.items(), looks):
        error = ((values - exact) / exact).abs().median(1).values.clamp(min=1e-8)
        axis.plot(exact.median(1).values, error, style, color=colour, marker=marker, ms=4, label=name)
    sizes = np.logspace(-9, 0.5, 50)
    axis.plot(sizes, epsilon / sizes, color=GREY, ls=":", label="ε / KL")
    axis.axhline(1, color=GREY, lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="true KL [nats]", ylabel="relative error in float32", ylim=(1e-8, 1e3))
    axis.legend(frameon=False, fontsize=8)
    caption = (
        "Both differences lose a digit for each digit that the KL is smaller, along the dotted line, and on the "
        "thin line nothing of the number is left. The sum without negative terms keeps two or more, in one visit."
    )
    return Picture(figure, caption, "Relative error against true KL on logarithmic axes: two lines rise to 1 as the "
                   "KL falls to 1e-7, the third stays below 1e-2 everywhere.")  # fmt: skip


def row_stats(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Puzzle 9.1."""
    return _row_stats()(x, mask)


def _row_stats(read: Callable = lambda x: x, least: float = -INF, masked: float | None = 0.0) -> Callable:
    """What a kernel gives that reads its rows so, and in masked ones (None: as in others); tl.max passes over NaN."""

    def answer(x, mask):
        lanes = read(x).double()
        top = torch.where(lanes.isnan(), least, lanes).amax(1).clamp(min=least)
        return tuple(torch.where(mask, y, y if masked is None else masked).float() for y in (top, lanes.sum(1)))

    return answer


def log_normaliser(z: Tensor) -> Tensor:
    """Puzzle 9.2."""
    return torch.logsumexp(z.double(), 1).float()


def _online(start: float = LOWEST, rescaled: bool = True, subtracted: bool = True) -> Callable:
    """The loop of a kernel, in float32, with a mistake."""

    def answer(z):
        m, s = torch.full((len(z),), start, dtype=torch.float32), 0.0
        for part in z.split(BLOCK, 1):
            new = torch.maximum(m, part.amax(1))
            s = s * (m - new).exp() ** rescaled + (part - new[:, None]).exp().sum(1)
            m = new
        return subtracted * m + s.log()

    return answer


def two_rows(z: Tensor, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Puzzle 9.3."""
    stats = token_stats(z.double(), tokens, r.double())
    return stats.logprob.float(), stats.kl.float()


def _two_rows(change: Callable = lambda x: x, kl: Callable = lambda e, p, q: (e * (p - q)).nansum(1), which: int = 0,
              log_s: float = 1.0) -> Callable:  # fmt: skip
    """Log-prob and KL with a mistake; `kl` gets softmax and normalised logits, both NaN where they are −inf."""

    def answer(z, r, tokens):
        rows = [change(x).double() for x in (z, r)]
        logs = [x.log_softmax(1) for x in rows]
        p, q = (torch.where(x > -INF, x, torch.nan) for x in logs)
        chosen = rows[which].gather(1, tokens[:, None])[:, 0]
        size = log_s * (rows[which] - rows[which].amax(1, keepdim=True)).exp().sum(1).log()
        return (chosen - rows[which].amax(1) - size).float(), kl(p.exp(), p, q).float()

    return answer


def _sums(
    mean: Callable = lambda w, s, s_new, fall, fall_r: fall.exp() * (w + s * (fall - fall_r)),
    kl: Callable = lambda w, s, t: w / s + t.log() - s.log(), barred: float = 0.0,
) -> Callable:  # fmt: skip
    """(9.6) as the loop of a kernel, with a mistake: what becomes of w, or of all three; what a −inf adds."""

    def answer(z, r, tokens):
        logprob, (z, r), s, t, w = two_rows(z, r, tokens)[0], (z.double(), r.double()), *torch.zeros(3, len(z), 1)
        m, n = torch.full((2, len(z), 1), LOWEST)
        for a, b in zip(z.split(BLOCK, 1), r.split(BLOCK, 1)):
            new, new_r = torch.maximum(m, a.amax(1, True)), torch.maximum(n, b.amax(1, True))
            fall, fall_r, e = m - new, n - new_r, (a - new).exp()
            d = torch.where(a > -INF, (a - new) - (b - new_r), barred)
            s_new = fall.exp() * s + e.sum(1, True)
            w = mean(w, s, s_new, fall, fall_r) + (e * d).sum(1, True)
            s, t, m, n = s_new, fall_r.exp() * t + (b - new_r).exp().sum(1, True), new, new_r
        return logprob, kl(w, s, t)[:, 0].float()

    return answer


def _policy_normalised(z, r, tokens):
    """The reference's logit with the policy's m and s."""
    (right, kl), at = two_rows(z, r, tokens), tokens[:, None]
    return (right.double() + (r.gather(1, at) - z.gather(1, at))[:, 0].double()).float(), kl


def _strided(x: Tensor, other: Tensor) -> Tensor:
    """What is read of x by the stride of another tensor."""
    return x.as_strided(x.shape, other.stride())


def _one_program(answer: Callable) -> Callable:
    """What a grid of one program stores."""

    def first_row(*arguments):
        result = answer(*arguments)
        return tuple(x.masked_fill(torch.arange(len(x)) > 0, torch.nan) for x in result)

    return first_row


def _no_mask(x: Tensor) -> Tensor:
    """What lies in memory where whole blocks are read."""
    return x.as_strided((len(x), -(-x.shape[1] // BLOCK) * BLOCK), x.stride())


def _zeros_behind(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[1] % BLOCK))


def _no_tail(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // BLOCK * BLOCK]


def _first_block(x: Tensor) -> Tensor:
    return x[:, :BLOCK]


def _contiguous(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, (x.shape[1], 1))


def _half(x: Tensor) -> Tensor:
    return x.half()


def _width(generator: Generator) -> int:
    """Three blocks, the last of them ragged."""
    return 2 * BLOCK + int(torch.randint(5, BLOCK - 5, (), generator=generator))


def _masked_rows(generator: Generator) -> tuple[Tensor, Tensor]:
    x = 2 * torch.randn(5, _width(generator), generator=generator, dtype=torch.float32)
    x += torch.tensor([-30.0, 30.0, 0.0, -30.0, 0.0], dtype=torch.float32)[:, None]
    x[2] = torch.nan
    return x, torch.arange(5) != 2


def _one_model(generator: Generator) -> tuple[Tensor]:
    z = hostile_logits(generator, 4, _width(generator))
    z[3, :BLOCK] = -INF
    return (z,)


def _two_models(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    (z,) = _one_model(generator)
    r = z + 1.5 * torch.randn(z.shape, generator=generator, dtype=torch.float32)
    r += torch.tensor([100.0, -100.0, 7.0, 0.0], dtype=torch.float32)[:, None]
    allowed = (z > -INF) * torch.rand(z.shape, generator=generator)
    return z, r, allowed.argmax(1)


EXERCISES = {
    "9.1": Puzzle(
        "9.1", "Maximum and sum of a row", 1, 15, row_stats, _masked_rows,
        (
            Mistake("unmasked tail", _row_stats(_no_mask),
                    "the last block is read beyond the end of the row: load with mask=columns < V."),
            Mistake("a zero in the maximum", _row_stats(least=0.0),
                    "a 0 took part in the maximum, and all of a row may be negative: start at −inf, and let lanes "
                    "beyond the end be −inf (other=float('-inf')) or leave them out by tl.where."),
            Mistake("tail dropped", _row_stats(_no_tail),
                    "the tail is missing: V // BLOCK leaves it out, tl.cdiv(V, BLOCK) does not."),
            Mistake("one block", _row_stats(_first_block),
                    "only the first block was read: loop over tl.cdiv(V, BLOCK) blocks."),
            Mistake("wrong stride", _row_stats(_contiguous),
                    "your rows start at row · V, but these lie further apart: row · x.stride(0)."),
            Mistake("masked rows read", _row_stats(masked=None),
                    "a masked row is read as if it were not: load the mask first, store 0 and return."),
            Mistake("masked rows not stored", _row_stats(masked=torch.nan),
                    "a masked row gives NaN: nothing was stored for it (`new_empty` leaves whatever was in memory), or "
                    "NaN was multiplied by 0, which is NaN. Store 0."),
            Mistake("one program", _one_program(row_stats),
                    "only the first row is stored: each row takes a program, so the grid is (len(x),)."),
            Mistake("half precision", _row_stats(_half),
                    "your numbers have three digits: something is in half precision. Reduce in float32."),
        ),
        ("One program per row; its block of columns moves on. Which two numbers does it carry from block to block?",
         "columns = start + tl.arange(0, BLOCK); tl.load(X + row * stride + columns, mask=columns < V, other=…). Which "
         "`other` is neutral for a maximum, and which for a sum?",
         "Load with other=float('-inf'), best = tl.maximum(best, tl.max(x, 0)), and for the sum tl.where(columns < V, "
         "x, 0.0). A masked row: store 0 twice and return."),
        tol=1e-5, atol=1e-3,
    ),
    "9.2": Puzzle(
        "9.2", "The normaliser, block by block", 2, 20, log_normaliser, _one_model,
        (
            Mistake("not rescaled", _online(rescaled=False),
                    "you forgot to rescale: when the maximum rises from m to m', the old sum shrinks by e^(m − m')."),
            Mistake("maximum started at 0", _online(start=0.0),
                    "your maximum starts too high: logits near −300 underflow, and log 0 = −inf. Start at −1e30."),
            Mistake("no −inf", _online(start=-INF),
                    "−inf − (−inf) is NaN, in a row whose first block is all −inf. Let the maximum start at a finite "
                    "−1e30: e^(−inf − (−1e30)) is 0. Or the maximum forgets what came before: "
                    "tl.maximum(m, …)."),
            Mistake("no maximum", lambda z: z.exp().sum(1).log(),
                    "e^300 overflows and e^(−300) underflows in float32: subtract the running maximum, (9.2)."),
            Mistake("maximum not added", _online(subtracted=False),
                    "you return log s: the maximum that you subtracted has to be added again, m + log s."),
            Mistake("zeros behind the end", lambda z: log_normaliser(_zeros_behind(z)),
                    "lanes beyond the end count as logits of 0: load with other=float('-inf'), which adds 0."),
            Mistake("tail dropped", lambda z: log_normaliser(_no_tail(z)),
                    "the tail is missing: use tl.cdiv(V, BLOCK)."),
            Mistake("wrong stride", lambda z: log_normaliser(_contiguous(z)),
                    "only the first row is right: the others start at row · z.stride(0), not at row · V; and each "
                    "takes a program, so the grid is (len(z),)."),
            Mistake("half precision", lambda z: log_normaliser(_half(z)),
                    "your logits were rounded to half precision: near 300 that is steps of 0.25. Reduce in float32."),
        ),
        ("Two numbers are carried: m and s of (9.3). What is s of no tokens, and what may m be?",
         "new = tl.maximum(m, tl.max(z, 0)); the block adds tl.sum(tl.exp(z - new), 0). What happens to s before?",
         "s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0); m = new. Start with m = -1e30, s = 0.0; store m + "
         "tl.log(s)."),
    ),
    "9.3": Puzzle(
        "9.3", "Log-prob and KL of two rows in one pass", 3, 35, two_rows, _two_models,
        (
            Mistake("direction", _two_rows(kl=lambda e, p, q: (q.exp() * (q - p)).nansum(1)),
                    "that is D(π_b‖π): the KL weighs by the policy's e^(z − m), not by the reference's."),
            Mistake("sign", _two_rows(kl=lambda e, p, q: (e * (q - p)).nansum(1)),
                    "the sign is wrong: D = E[log π − log π_b]."),
            Mistake("normalisers forgotten", lambda z, r, tokens: _two_rows(kl=lambda e, p, q: (
                        e * torch.where(z > -INF, z.double() - r.double(), 0.0)).nansum(1))(z, r, tokens),
                    "E[z − r] alone is no KL: the difference of the log-normalisers is missing, (9.6)."),
            Mistake("half of (9.6)", lambda z, r, tokens: _two_rows(kl=lambda e, p, q: (e * torch.where(
                        z > -INF, (z - z.amax(1, keepdim=True)) - (r - r.amax(1, keepdim=True)), 0.0).double()
                    ).nansum(1))(z, r, tokens),
                    "w/s alone is no KL: + log t − log s is missing, (9.6)."),
            Mistake("w not rescaled", _sums(lambda w, *_: w),
                    "you rescale s but not w: every sum of e^(z − m) shrinks when m rises."),
            Mistake("w after s", _sums(lambda w, s, s_new, fall, fall_r: fall.exp() * (w + s_new * (fall - fall_r))),
                    "w is brought up to date after s: what it gets is a share of the *old* s. Do w first."),
            Mistake("w shrunk only", _sums(lambda w, s, s_new, fall, fall_r: fall.exp() * w),
                    "w shrinks with s, but its terms change too when a maximum moves: e^(m − m') (w + s ((m − m') − "
                    "(n − n')))."),
            Mistake("NaN of −inf", _sums(barred=torch.nan),
                    "−inf − (−inf) is NaN, and so is 0 times that: where z is −inf, let the term be 0 by tl.where."),
            Mistake("sign of the normalisers", _sums(kl=lambda w, s, t: w / s + s.log() - t.log()),
                    "the normalisers are the wrong way round: + log t − log s, (9.6)."),
            Mistake("reference's logit", _policy_normalised,
                    "the log-prob takes the token's logit from r, but m and s from z: take it from z."),
            *(Mistake(name, answer, "only the first row is right: r has its own stride, r.stride(0), as has z; and "
                      "each row takes a program, so the grid is (len(z),).")
              for name, answer in (("r has its own stride", lambda z, r, y: two_rows(z, _strided(r, z), y)),
                                   ("z has its own stride", lambda z, r, y: two_rows(_strided(z, r), r, y)),
                                   ("one program", _one_program(two_rows)))),
            Mistake("zeros behind the end", _two_rows(_zeros_behind),
                    "lanes beyond the end count as logits of 0: load both rows with other=float('-inf')."),
            Mistake("reference's log-prob", _two_rows(which=1), "the log-prob is the reference's: take it from z."),
            Mistake("log s forgotten", _two_rows(log_s=0.0), "z_a − m is no log-prob yet: − log s is missing, (9.4)."),
            Mistake("half precision", _two_rows(_half),
                    "your logits were rounded to half precision: near 300 that is steps of 0.25. Reduce in float32."),
        ),
        ("Five numbers are carried: m, s of the policy, n, t of the reference, and one sum for the KL.",
         "w = Σ e^(z − m) · ((z − m) − (r − n)). When m rises to m' and n to n', what was summed changes twice: each "
         "term's d grows by (m − m') − (n − n'), and all shrink by e^(m − m').",
         "fall = m - new; w = tl.exp(fall) * (w + s * (fall - (n - new_r))), before s; then add the block's "
         "tl.sum(tl.where(z > float('-inf'), tl.exp(z - new) * ((z - new) - (r - new_r)), 0.0), 0)."),
        tol=2e-5, atol=3e-4,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "09", "one_pass", "Kernels I: one pass over the vocabulary",
    "How does one visit to a row of logits give log-prob, entropy, KL and Q, and keep a KL of 1e-8?",
    "kernels", "(2) and (13), as they are computed",
    ("klq_kernels.token_stats", "klq_kernels.token_q", "klq_kernels.device", "klq_edu.bench.roofline"),
    needs=("04", "06"), place=(6, -1.4), short="one pass", exercises=EXERCISES,
)  # fmt: skip
