"""Chapter 10: the kernels' gradients, the scan of the λ-returns, and sums in half precision."""

import functools
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from torch.autograd.graph import saved_tensors_hooks

from klq_edu.course.chapters import Chapter
from klq_edu.course.chapters.c05_lambda_returns import one_by_one
from klq_edu.course.chapters.c09_one_pass import storages, visits
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.course.puzzles import Puzzle, hostile_logits
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, Picture, panels, plain_axes
from klq_kernels.reference import kl_divergence

BLOCK = 16  # of the puzzles: small, so that rows have several and the last is ragged
STEPS = 16  # of the row whose scan is drawn
Rounds = list[list[tuple[int, int]]]  # of a scan: pairs (t, u) whose maps are composed at the same time


# Counting


def traffic(losses: dict[str, Callable], logits: Tensor, *others: Tensor) -> pd.DataFrame:
    """For each loss, a function of logits [N, V] and others: how many [N, V] tensors autograd keeps beside those given,
    and how many the forward and the backward pass read and write."""
    rows = {}
    for name, function in losses.items():
        kept, moved = [], visits(logits.numel())
        z = logits.detach().clone().requires_grad_()
        with moved, saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            loss = function(z, *others)
            forward = moved.read, moved.written
            loss.backward()
        extra = storages([x for x in kept if moved.weigh(x)]) - storages((z, *others))
        rows[name] = [len(extra), *forward, moved.read - forward[0], moved.written - forward[1]]
    columns = ["kept", "forward reads", "forward writes", "backward reads", "backward writes"]
    return pd.DataFrame(rows.values(), index=list(rows), columns=columns)


# Scans


def hillis_steele(steps: int) -> Rounds:
    """Every position reaches twice as far in each round (Hillis and Steele 1986)."""
    return [[(t, t + s) for t in range(steps - s)] for s in powers(steps)]


def brent_kung(steps: int) -> Rounds:
    """A tree, up and down, for a power of two of steps (Brent and Kung 1982; Blelloch 1990 has the exclusive form)."""
    up = [[(t, t + s) for t in range(0, steps - s, 2 * s)] for s in powers(steps)]
    down = [[(t, t + s) for t in range(s, steps - s, 2 * s)] for s in reversed(powers(steps)[:-1])]
    return up + down


def powers(steps: int) -> list[int]:
    """1, 2, 4 … below `steps`."""
    return [2**j for j in range((steps - 1).bit_length())]


def run_scan(rounds: Rounds, decay: Tensor, delta: Tensor) -> Tensor:
    """Compose the maps x ↦ delta_t + decay_t x [T] as the rounds say; what each then makes of x = 0."""
    for pairs in rounds:
        t, u = torch.tensor(pairs).T
        b, a = delta[t] + decay[t] * delta[u], decay[t] * decay[u]  # all of a round read before one writes
        delta, decay = delta.index_copy(0, t, b), decay.index_copy(0, t, a)
    return delta


def draw_scan(figure: FigureBase, scan: str, round: int) -> None:
    """Positions from left to right, rounds downwards: how far each position reaches, and who composed with whom."""
    (axis,) = plain_axes(figure)
    rounds = {"Hillis–Steele": hillis_steele, "Brent–Kung": brent_kung}[scan](STEPS)
    done, ends = rounds[:round], [*range(1, STEPS + 1)]
    for y, pairs in enumerate([[], *done]):
        before = list(ends)
        for t, u in pairs:
            ends[t] = before[u]
            axis.plot([t, u], [y, y - 1], color=GREY, lw=0.8, zorder=1)
        for t, end in enumerate(ends):
            active, final = any(t == first for first, _ in pairs), end == STEPS
            axis.plot(t, y, "s" if final else "o", ms=15, mec=ORANGE if active else GREY, mew=1.8 if active else 0.6,
                      color=BLUE if final else "white", zorder=2)  # fmt: skip
            axis.text(t, y, end - t, color="white" if final else "black", ha="center", va="center", fontsize=8)
    work = sum(map(len, done))
    axis.set(xlabel="position t", ylabel="round", xticks=range(STEPS), yticks=range(8), ylim=(7.6, -0.6))
    axis.set_title(f"{scan}: {len(done)} of {len(rounds)} rounds, {work} compositions", fontsize=10)
    axis.grid(False)


SCAN = Widget(
    "10-scan", draw_scan, {"scan": ["Hillis–Steele", "Brent–Kung"], "round": list(range(8))},
    [{"scan": scan, "round": n} for scan, first in (("Hillis–Steele", 1), ("Brent–Kung", 4)) for n in (first, 7)],
    "A number says how many steps the map at that position covers; a blue square reaches the end of the row and is "
    "final; an orange rim composed in this round, along the grey lines, with a map of the round before. Hillis–Steele "
    "is done after 4 rounds, in which nearly everyone works; Brent–Kung takes 7, in which few do.",
    "Four grids of 16 positions by rounds. Hillis–Steele after one round, and after 4, when all positions are blue "
    "squares. Brent–Kung after a tree up in 4 rounds, which makes position 0 final, and after a tree down in 3 more.",
    size=(7.2, 4.4),
)  # fmt: skip


# Sums


def running_sum(terms: Tensor, at: tuple[int, ...] = ()) -> Tensor:
    """Terms [n, ...] added one after another in their own precision; or the sums after so many terms, stacked."""
    total, found = terms[0], []
    for i, x in enumerate(terms[1:], 2):
        total = total + x
        found += [total] if i in at else []
    return torch.stack(found) if at else total


def pairwise_sum(terms: Tensor) -> Tensor:
    """Terms [n, ...] added in pairs, the sums in pairs again, and so on, in their own precision."""
    while len(terms) > 1:
        odd, pairs = terms[len(terms) // 2 * 2 :], terms[: len(terms) // 2 * 2]
        terms = torch.cat([pairs[::2] + pairs[1::2], odd])
    return terms[0]


@functools.cache
def sum_errors(longest: int = 15) -> tuple[list[int], dict[str, Tensor]]:
    """(lengths, ways of summing -> median relative error for each): softmax terms e^(z − max) of normal logits."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2**longest, 16, generator=generator, dtype=torch.float64)
    x, lengths = (z - z.amax(0)).exp(), [2**j for j in range(4, longest + 1)]
    exact = torch.stack([x[:n].sum(0) for n in lengths])
    sums = {
        f"{name}, one after another": running_sum(x.to(dtype), tuple(lengths))
        for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items()
    }
    sums["bf16, in pairs"] = torch.stack([pairwise_sum(x[:n].bfloat16()) for n in lengths])
    sums["bf16 terms, fp32 sum"] = running_sum(x.bfloat16().float(), tuple(lengths))
    return lengths, {name: ((s.double() - exact).abs() / exact).median(1).values for name, s in sums.items()}


def draw_sums() -> Picture:
    """Relative error of a sum against its number of terms."""
    figure, (axis,) = panels(1, width=7.0)
    lengths, errors = sum_errors()
    looks = [(ORANGE, "s--"), (GREY, "v:"), (GREEN, "^-."), (BLUE, "o-")]
    for (name, error), (colour, line) in zip(errors.items(), looks, strict=True):
        axis.plot(lengths, error, line, color=colour, ms=4, label=name)
    axis.axhline(2.0**-8, color=GREY, lw=0.8)
    axis.text(lengths[-1], 2.0**-8 * 1.15, "u of bf16", ha="right", fontsize=8, color=GREY)
    axis.set(xlabel="number of terms", ylabel="relative error of the sum", xscale="log", yscale="log")
    axis.set_xscale("log", base=2)
    axis.legend(frameon=False, fontsize=8)
    return Picture(
        figure,
        "Terms of a softmax, as a kernel would add them. One after another in bf16, the sum soon stops growing and the "
        "error approaches 1; fp16 drifts later. In pairs the error stays near u. Rounding only the terms, and adding "
        "in fp32, costs least: the terms' errors average out.",
        "Curves of relative error against the number of terms: bf16 one after another rises to nearly 1, fp16 follows "
        "later, bf16 in pairs stays flat near 2 to the −8, bf16 terms with a fp32 sum fall below all.",
    )


# Puzzles: what right and wrong kernels compute


def _contiguous(x: Tensor) -> Tensor:
    """What a kernel reads that takes rows for contiguous."""
    return x.as_strided(x.shape, (x.shape[1], 1))


def _log_softmax(z: Tensor, top: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return (z.double() - top.double()[:, None]) / temperature - lse.double()[:, None]


def logprob_grad(
    logits, tokens, top, lse, upstream, temperature, *, softmax=lambda *x: _log_softmax(*x).exp(),
    combine=lambda g, one, p: g * (one - p), scale=lambda t: 1 / t,
):  # fmt: skip
    """Exercise 10.1; the keywords are for mistakes: the softmax, what is made of it, the temperature's factor."""
    p = softmax(logits, top, lse, temperature)
    one = torch.zeros_like(p).scatter_(1, tokens[:, None], 1.0)
    return (scale(temperature) * combine(upstream.double()[:, None], one, p)).float()


def _finite(x: Tensor) -> Tensor:
    """As tl.maximum(x, −1e30) has it, which passes over NaN."""
    return torch.where(x > -1e30, x, -1e30)


def kl_grad(
    logits, ref_logits, top, lse, ref_top, ref_lse, kl, upstream, temperature, *, finite=_finite,
    combine=lambda p, q, d, kl: p * (d - kl), scale=lambda t: 1 / t,
):  # fmt: skip
    """Exercise 10.2; the keywords are for mistakes: what is made of −inf, of all, the temperature's factor."""
    logp = finite(_log_softmax(logits, top, lse, temperature))
    logq = finite(_log_softmax(ref_logits, ref_top, ref_lse, temperature))
    grad = combine(logp.exp(), logq.exp(), logp - logq, kl.double()[:, None])
    return (scale(temperature) * upstream.double()[:, None] * grad).float()


def scan_rows(delta, lengths, decay, *, clean=torch.where, carry=lambda a, k: a**k, flip=lambda x: x):
    """Exercise 10.3; the keywords are for mistakes: padding, what a block gets from its right, the direction."""
    real = torch.arange(delta.shape[1]) < lengths[:, None]
    blocks, tail = [], 0.0
    for x in reversed(flip(clean(real, delta.double(), 0.0)).split(BLOCK, 1)):
        alone, steps_left = one_by_one(x.T, torch.full_like(x.T, decay)).T, torch.arange(x.shape[1], 0, -1)
        blocks.insert(0, alone + carry(decay, steps_left) * tail)
        tail = blocks[0][:, :1]
    return clean(real, flip(torch.cat(blocks, 1)), 0.0).float()


def _other_way(delta, lengths, decay, *, blocks=reversed, steps=lambda x: x) -> Tensor:
    """Exercise 10.3 with the blocks in another order, or (steps flipped) each scanned from left to right."""
    room = -(-delta.shape[1] // BLOCK) * BLOCK
    real, made = torch.arange(room) < lengths[:, None], {}
    b = torch.where(real, torch.nn.functional.pad(delta.double(), (0, room - delta.shape[1])), 0.0)
    a, tail = torch.where(real, decay, 0.0).double(), 0.0
    for i in blocks(range(room // BLOCK)):
        x, y = (steps(z[:, i * BLOCK : (i + 1) * BLOCK]) for z in (a, b))
        made[i] = steps(one_by_one(y.T, x.T).T + x.flip(1).cumprod(1).flip(1) * tail)
        tail = made[i][:, :1]
    return torch.cat([made[i] for i in sorted(made)], 1)[:, : delta.shape[1]].float()


def fused_klq(
    logits, tokens, ref_logprobs, values, targets, mask, tau, *, clean=torch.where, price=lambda tau: tau, half=0.5,
    count=lambda mask: mask.sum(), slope=lambda e, tau: tau * e, combine=lambda g, one, p: g * (one - p),
):  # fmt: skip
    """Exercise 10.4; the keywords are for mistakes: padding, τ in e, ½, what is divided by, ∂L/∂log π, its use."""
    logp = torch.where(mask[..., None], logits, 0.0).log_softmax(-1)
    chosen = torch.where(mask, tokens, 0)[..., None]
    ratio = logp.gather(-1, chosen)[..., 0] - ref_logprobs
    e, n = clean(mask, price(tau) * ratio + values - targets, 0.0), count(mask)
    one = torch.zeros_like(logp).scatter_(-1, chosen, 1.0)
    return half * (e**2).sum() / n, combine(slope(e, tau)[..., None] / n, one, logp.exp()), e / n


def _logits(generator: Generator) -> tuple[Tensor, float]:
    """Three rows with an odd number of columns, so that the last block is ragged, and a temperature."""
    columns, temperature = torch.rand(2, generator=generator).tolist()
    return hostile_logits(generator, 3, 2 * int(BLOCK * (0.55 + columns)) + 1), 0.5 + temperature


def _residuals(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a forward pass keeps of logits: the largest, and the log of the sum relative to it."""
    top = z.amax(1)
    return top, ((z - top[:, None]).double() / temperature).logsumexp(1).float()


def _chosen(generator: Generator) -> tuple:
    z, temperature = _logits(generator)
    tokens = torch.multinomial((z / temperature).softmax(1), 1, generator=generator).squeeze(1)
    upstream = torch.randn(3, generator=generator, dtype=torch.float32)
    return z, tokens, *_residuals(z, temperature), upstream, temperature


def _pair(generator: Generator) -> tuple:
    """Two models' logits: what the reference forbids the policy forbids as well, and more."""
    z, temperature = _logits(generator)
    r = hostile_logits(generator, *z.shape)
    z = z.masked_fill(r == -torch.inf, -torch.inf)
    kl = kl_divergence(*((x.double() / temperature).log_softmax(1) for x in (z, r))).float()
    upstream = torch.randn(3, generator=generator, dtype=torch.float32)
    return z, r, *_residuals(z, temperature), *_residuals(r, temperature), kl, upstream, temperature


def _lengths(generator: Generator) -> tuple:
    steps = 2 * BLOCK + int(torch.randint(2, BLOCK, (), generator=generator))
    lengths = torch.tensor([steps, BLOCK + 3, 1, 0])[torch.randperm(4, generator=generator)]
    delta = torch.randn(4, steps, generator=generator, dtype=torch.float32)
    decay = 0.9 + 0.09 * torch.rand((), generator=generator).item()
    return delta.masked_fill(torch.arange(steps) >= lengths[:, None], torch.nan), lengths, decay


def _batch(generator: Generator) -> tuple:
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    data = torch.randn(3, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 2])[torch.randperm(3, generator=generator)][:, None]
    logits[..., 5] = -torch.inf
    tokens = torch.randint(5, (3, 4), generator=generator).masked_fill(~mask, -100)
    logits, data = logits.masked_fill(~mask[..., None], torch.nan), data.masked_fill(~mask, torch.nan)
    return logits, tokens, *data, mask, 0.2 + 0.5 * torch.rand((), generator=generator).item()


def _first_block(grad: Tensor) -> Tensor:
    """All that a grid of one block per row writes; the rest is what was in memory."""
    return grad.masked_fill(torch.arange(grad.shape[1]) >= BLOCK, torch.nan)


EXERCISES = {
    "10.1": Puzzle(
        "10.1", "The gradient of a log-prob", 2, 15, logprob_grad, _chosen,
        (
            Mistake("no upstream", partial(logprob_grad, combine=lambda g, one, p: one - p),
                    "you forgot the upstream gradient: every row has its own factor g."),
            Mistake("one upstream", lambda z, y, m, s, g, t: logprob_grad(z, y, m, s, g[:1].expand_as(g), t),
                    "every row got the first row's upstream gradient: load G + row."),
            Mistake("one-hot missing", partial(logprob_grad, combine=lambda g, one, p: -g * p),
                    "the one-hot is missing: at the token itself the gradient is g (1 − p)."),
            Mistake("one-hot bare", partial(logprob_grad, combine=lambda g, one, p: one - g * p),
                    "the one-hot has to be multiplied by the upstream gradient too."),
            Mistake("sign", partial(logprob_grad, combine=lambda g, one, p: g * (p - one)),
                    "the sign is that of a loss −log p; here it is log p: one-hot minus softmax."),
            Mistake("no factor", partial(logprob_grad, scale=lambda t: 1.0),
                    "you forgot the temperature in front: z enters as z / temperature, so 1 / temperature comes out."),
            Mistake("factor only", partial(logprob_grad, softmax=lambda z, m, s, t: _log_softmax(z, m, s, 1.0).exp()),
                    "you forgot the temperature inside p: p = exp((z − top) / temperature − lse)."),
            Mistake("no temperature", lambda z, y, m, s, g, t: logprob_grad(z, y, m, s, g, 1.0),
                    "you forgot the temperature twice: inside p, and in front."),
            Mistake("times temperature", partial(logprob_grad, scale=lambda t: t),
                    "you multiplied by the temperature; the chain rule divides."),
            Mistake("no top", partial(logprob_grad, softmax=lambda z, m, s, t: _log_softmax(z, 0 * m, s, t).exp()),
                    "lse is relative to the largest logit: subtract top first, or exp overflows."),
            Mistake("no lse", partial(logprob_grad, softmax=lambda z, m, s, t: _log_softmax(z, m, 0 * s, t).exp()),
                    "your p does not sum to 1: subtract lse in the exponent."),
            Mistake("stride", lambda z, *x: logprob_grad(_contiguous(z), *x),
                    "you took the rows for contiguous: row i starts at i · z_row, not at i · V."),
            Mistake("first block", lambda *x: _first_block(logprob_grad(*x)),
                    "only the first block of each row was written; the grid needs cdiv(V, BLOCK) programs for a row."),
            Mistake("half", lambda z, *x: logprob_grad(z.half(), *x),
                    "your logits were rounded to half precision: near 300 that is steps of 0.25. Stay in tl.float32."),
        ),
        ("(10.3) with only the first upstream gradient: what is left is g times one-hot minus softmax.",
         "p = exp((z − top) · inverse − lse); −inf gives p = 0 by itself. Compare `column` with the row's token.",
         "dz = tl.load(G + row) · inverse · (tl.where(column == token, 1.0, 0.0) − p), stored where column < V."),
        tol=1e-4, atol=1e-5, tile=(1, BLOCK),
    ),
    "10.2": Puzzle(
        "10.2", "The gradient of a KL", 3, 20, kl_grad, _pair,
        (
            Mistake("direction", partial(kl_grad, combine=lambda p, q, d, kl: p - q),
                    "this is the gradient of D(q‖p), the other direction; D(p‖q) has p (log p/q − D)."),
            Mistake("not centred", partial(kl_grad, combine=lambda p, q, d, kl: p * d),
                    "D is not subtracted: p depends on every logit of the row, and that takes the mean away."),
            Mistake("one too many", partial(kl_grad, combine=lambda p, q, d, kl: p * (d + 1 - kl)),
                    "the 1 from differentiating p log p must be centred away too: its mean under p is 1."),
            Mistake("added", partial(kl_grad, combine=lambda p, q, d, kl: p * (d + kl)),
                    "D is added where it has to be subtracted."),
            Mistake("sign", partial(kl_grad, combine=lambda p, q, d, kl: p * (kl - d)),
                    "the sign is wrong, or p and q are exchanged in the logarithm."),
            Mistake("weights q", partial(kl_grad, combine=lambda p, q, d, kl: q * (d - kl)),
                    "the weights are the policy's p; q is only inside the logarithm."),
            Mistake("p held", partial(kl_grad, combine=lambda p, q, d, kl: 0 * p),
                    "nothing is left where p is held fixed as a weight: the mean of ∇log p is 0. Differentiate p too."),
            Mistake("no upstream", lambda z, r, m, s, n, u, kl, g, t: kl_grad(z, r, m, s, n, u, kl, g / g, t),
                    "you forgot the upstream gradient: every row has its own factor g."),
            Mistake("no factor", partial(kl_grad, scale=lambda t: 1.0),
                    "you forgot the temperature in front: z enters as z / temperature, so 1 / temperature comes out."),
            Mistake("0 · inf", partial(kl_grad, finite=lambda x: x),
                    "NaN: where p = 0, log p is −inf, and 0 · inf is NaN. Make the logarithms finite (tl.maximum with "
                    "−1e30), or choose 0 by tl.where, before p meets them."),
            Mistake("one floor", lambda z, r, *x: kl_grad(z, r, *x).masked_fill(r == -torch.inf, torch.nan),
                    "log q is −inf too where the reference forbids a token, and 0 · inf is NaN: both need the "
                    "floor."),
            Mistake("upside down", partial(kl_grad, combine=lambda p, q, d, kl: p * (-d - kl)),
                    "the log-ratio is upside down: log p − log q, then minus D."),
            *(Mistake("another's stride", answer,
                      "r has its own stride, r_row, and z has z_row: you used one for both.")
              for f in (_finite, lambda x: x.clamp(min=-1e30))
              for answer in (lambda z, r, *x, f=f: kl_grad(z, r.as_strided(r.shape, z.stride()), *x, finite=f),
                             lambda z, r, *x, f=f: kl_grad(z.as_strided(z.shape, r.stride()), r, *x, finite=f))),
            Mistake("no normalisers", lambda z, r, m, s, n, u, kl, g, t: kl_grad(z, r, m, s, n, u, kl, g, t,
                        combine=lambda p, q, d, kl: p * (d + (s - u)[:, None] - kl)),
                    "the log-ratio lacks the normalisers: z − r alone is not log p − log q."),
            *(Mistake("stride", lambda z, r, *x, f=f: kl_grad(_contiguous(z), _contiguous(r), *x, finite=f),
                      "you took the rows for contiguous: row i starts at i · z_row, not at i · V.")
              for f in (_finite, lambda x: x.clamp(min=-1e30))),
            Mistake("first block", lambda *x: _first_block(kl_grad(*x)),
                    "only the first block of each row was written; the grid needs cdiv(V, BLOCK) programs for a row."),
        ),
        ("(10.3) with only the last upstream gradient. Everything in it but z and r is one number per row.",
         "log p = (z − top) · inverse − lse, log q likewise with the reference's; p = exp(log p).",
         "tl.maximum(…, −1e30) on both logarithms, then dz = g · inverse · p · (log p − log q − kl)."),
        tol=3e-4, atol=3e-4, tile=(1, BLOCK),
    ),
    "10.3": Puzzle(
        "10.3", "λ-returns, block by block", 3, 25, scan_rows, _lengths,
        (
            Mistake("forwards", partial(scan_rows, flip=lambda x: x.flip(1)),
                    "you started from the wrong end: Δ sums what comes *later*, so run from the last token back."),
            Mistake("blocks from the left", partial(_other_way, blocks=iter),
                    "the blocks run from left to right; the last comes first, since each needs what is right of it."),
            Mistake("scan forwards", partial(_other_way, steps=lambda x: x.flip(1)),
                    "within a block you sum what came before: the scan needs reverse=True."),
            Mistake("padding not stored", lambda d, n, a: scan_rows(d, n, a).masked_fill(
                        torch.arange(d.shape[1]) >= n[:, None], torch.nan),
                    "nothing is stored on padding, and `new_empty` leaves what was in memory: store 0, where t < T."),
            Mistake("no carry", partial(scan_rows, carry=lambda a, k: 0.0 * k),
                    "each block is right by itself, but hears nothing of the block on its right: carry its first Δ."),
            Mistake("decay kept", partial(scan_rows, carry=lambda a, k: a + 0.0 * k),
                    "the decay was kept, not composed: a position k steps before the seam gets decay^k of what is "
                    "carried (the first half of the scanned pair)."),
            Mistake("carry undecayed", partial(scan_rows, carry=lambda a, k: 1 + 0.0 * k),
                    "what is carried into a block was not discounted on the way."),
            Mistake("off by one", partial(scan_rows, carry=lambda a, k: a ** (k - 1)),
                    "what is carried over the seam misses one factor of decay."),
            Mistake("no decay", lambda d, n, a: scan_rows(d, n, 1.0),
                    "you forgot the decay: this is the plain sum of later errors."),
            Mistake("δ", lambda d, n, a: scan_rows(d, n, 0.0),
                    "these are the δ themselves; the recursion over later steps is missing."),
            Mistake("padding", partial(scan_rows, clean=lambda mask, x, other: x),
                    "padding got in: load with mask = t < length, other = 0, and store 0 there."),
            Mistake("one length", lambda d, n, a: scan_rows(d, n[:1].expand_as(n), a),
                    "every row got the first row's length: load LENGTHS + row."),
            Mistake("last token", lambda d, n, a: scan_rows(d, n - 1, a),
                    "the last token of each row is missing: real are t < length, not t < length − 1."),
            Mistake("stride", lambda d, n, a: scan_rows(_contiguous(d), n, a),
                    "you took the rows for contiguous: row i starts at i · d_row, not at i · T."),
            Mistake("first block", lambda *x: _first_block(scan_rows(*x)),
                    "only the first block of each row was written: loop over cdiv(T, BLOCK) blocks."),
        ),
        ("One program per row; a loop over blocks from the last to the first. Padding: δ = 0, so nothing starts there.",
         "decays, totals = tl.associative_scan((a, delta), 0, compose, reverse=True) scans one block; "
         "`compose` gets first what is already known of the steps after.",
         "Δ = totals + decays · tail, where tail is the block's right neighbour's first Δ; the next tail is "
         "tl.sum(tl.where(steps == 0, Δ, 0.0), 0)."),
        tol=1e-4, atol=1e-5, tile=(1, BLOCK),
    ),
    "10.4": Exercise(
        "10.4", "Loss and gradient in one pass", 2, 15, fused_klq, _batch,
        (
            Mistake("no τ in the gradient", partial(fused_klq, slope=lambda e, tau: e),
                    "the gradient in the logits lacks τ: Q changes by τ per nat of log π."),
            Mistake("no τ in e", partial(fused_klq, price=lambda tau: 1.0),
                    "you forgot τ in the error: e = τ (log π − log π_b) + V − Ĝ."),
            Mistake("no τ at all", partial(fused_klq, price=lambda tau: 1.0, slope=lambda e, tau: e),
                    "you forgot τ, in the error and in the gradient."),
            Mistake("sign", partial(fused_klq, combine=lambda g, one, p: g * (p - one)),
                    "the gradient in the logits has the wrong sign: ∂ log π_a/∂z is one-hot minus softmax."),
            Mistake("one-hot missing", partial(fused_klq, combine=lambda g, one, p: -g * p),
                    "the one-hot is missing in the gradient: at the token itself it is 1 − π."),
            Mistake("no half", partial(fused_klq, half=1.0),
                    "the gradients are right, but the loss lacks its ½."),
            Mistake("sum", partial(fused_klq, count=lambda mask: 1),
                    "you summed over tokens; divide loss and gradients by the number of real ones."),
            Mistake("mean over padding", partial(fused_klq, count=lambda mask: mask.numel()),
                    "you divided by all positions, padding included."),
            Mistake("times the mask", partial(fused_klq, clean=lambda mask, x, other: mask * x),
                    "NaN times 0 is NaN: multiplying by the mask lets padding poison the sum. Use torch.where."),
            Mistake("value undivided", lambda *x: (*(y := fused_klq(*x))[:2], y[2] * x[5].sum()),
                    "the gradient in the values is e / N; yours is e."),
        ),
        ("Replace logits, tokens and e on padding by 0 with torch.where; then every formula is safe.",
         "With log π known, e is known, and with e both gradients: ∂L/∂log π = τ e / N and ∂L/∂V = e / N.",
         "dz = (τ e / N)[..., None] · (one_hot − softmax). Return ½ (e²).sum() / N, dz, e / N."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "10", "backwards_and_scan", "Kernels II: backwards, and a scan",
    "How does one gradient kernel serve every loss, and how does a recursion run in parallel?",
    "kernels", "§3, (2), (6), (7) and (14), differentiated and fused",
    ("klq_kernels.token_stats", "klq_kernels.logits_klq_loss", "klq_kernels.lambda_returns"),
    needs=("05", "09"), place=(7, -1.4), short="backwards, scan", exercises=EXERCISES,
)  # fmt: skip
