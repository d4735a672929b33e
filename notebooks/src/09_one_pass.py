# %% [markdown]
# # 09 · Kernels I: one pass over the vocabulary
#
# **How does one visit to a row of logits give log-prob, entropy, KL and Q, and keep a KL of 1e-8?**
#
# *After this notebook you can* read and write a small GPU kernel in Triton, count the bytes that a computation must move, derive
# the running statistics of a softmax, and say why a small KL (Kullback–Leibler divergence) drowns in float32, and which form of the
# sum saves it.
#
# *You need* notebooks 04 (the exact KL and the estimator $k_3$) and 06 ($Q$ of a token). *Time:* <!-- minutes --> minutes. *Symbols:* $z$ and $r$ logits
# of policy and reference, $V$ size of the vocabulary (here never the value), $N$ rows, $m$ and $n$ running maxima, $s$, $t$, $h$, $w$, $b$
# running sums, $g$ pivot, $\varphi(d) = e^{-d} - 1 + d$.
#
# A GPU (graphics processing unit) is not needed: without one, Triton's interpreter runs each kernel in NumPy, correct and slow. The
# switch must be set before Triton is imported. (Triton itself comes for Linux; on Windows use its Linux subsystem.)

# %%
import os
import warnings

import pandas as pd
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

from klq_edu.bench.roofline import DEVICES, floor_seconds
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c09_one_pass import (
    PASS,
    draw_rounding,
    measured,
    visits,
)
from klq_kernels import device, token_q, token_stats
from klq_kernels.reference import kl_divergence

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of masked lanes
check = start("09")
where = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## Bytes, not operations
#
# For each of $N$ completion tokens we want four numbers: $\log\pi(a)$, the entropy, the exact KL to the reference, and soon $Q$. They come
# from two rows of logits. Arithmetic is cheap on a GPU; what takes time is to fetch those rows from memory. Each logit of each model must be
# read at least once, so with $c$ bytes per logit and a memory that delivers $B$ bytes a second, nobody is faster than
#
# $$T \ge \frac{2\,N\,V\,c}{B} \tag{9.1}$$
#
# The library calls this a *floor* and has it for GPUs by their data sheets. We type it for $N = 8192$, a vocabulary of 128,256 tokens, and
# bfloat16, which takes two bytes.

# %%
N, V = 8192, 128_256
floor = [floor_seconds("token_stats", name, "bf16", N, V, 1) for name in DEVICES]
bandwidth = torch.tensor([gpu.bandwidth for gpu in DEVICES.values()])
check.equation("9.1", torch.tensor(floor) * 1e3, 1e3 * 2 * N * V * 2 / bandwidth)

# %% [markdown]
# Here is how one writes it in PyTorch without thinking of memory. Every operation reads its arguments from memory and writes its result
# back. Call one such reading or writing of a whole $[N, V]$ tensor a *pass*.
#
# **Predict.** How many passes does `naive` make, if `log_softmax` counts as one reading and one writing, and `gather` as none? How many times
# the floor is that?
#
# <details><summary>Compare</summary>
#
# Two calls of `log_softmax` are 4 passes, `exp` 2, the entropy 4 (a product: 3; its sum: 1) and the KL 7 (a difference and a product: 3 each; the sum: 1).
# Together 17, as the cell counts: the floor is 2, so 8.5 times.
#
# </details>


# %%
def naive(z, r, tokens):
    logp, logq = z.log_softmax(-1), r.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    kl = (p * (logp - logq)).sum(-1)
    logprob, ref_logprob = (x.gather(-1, tokens[:, None])[:, 0] for x in (logp, logq))
    return logprob, entropy, ref_logprob, kl


z, r = 3 * torch.randn(6, 1000), 3 * torch.randn(6, 1000)
tokens = torch.randint(1000, (6,))
with visits(z.numel()) as traffic:
    naive(z, r, tokens)
passes = traffic.read + traffic.written
print(f"{passes} passes; needed are 2: {passes / 2:g} times the floor")

# %% [markdown]
# In milliseconds that is the following table. It is **a model, not a measurement**: bytes over the bandwidth of a data sheet. Where this
# notebook finds a GPU, the second table is measured on it, for fewer rows, and the prediction stands below it.

# %%
ms = torch.tensor(floor) * 1e3
table = {
    "GPU": list(DEVICES),
    "one visit [ms]": ms,
    "naive [ms]": ms * passes / 2,
}
pd.DataFrame(table).round(2)

# %%
if where == "cuda":
    ways = {"naive": naive, "one visit": lambda z, r, tokens: token_stats(z, tokens, r)}
    print(measured(ways, 2048, V).round(3))
    print(f"predicted by counting passes: {traffic.passes / 2:g} times")
else:
    print("no GPU here, so nothing is measured: the table above stays a model")

# %% [markdown]
# ## What a kernel is
#
# A *kernel* is a function that a GPU runs many times at once. Each run is a *program*; it asks for its number, `tl.program_id(0)`, and takes
# its share of the work: here, one row. A program works on *blocks*, small arrays whose length is a power of two that is known beforehand
# (`tl.constexpr`). `tl.arange(0, BLOCK)` is a block of numbers; added to a pointer it is a block of addresses. `tl.load` fetches what is there,
# `tl.store` writes, and these are the only passes. Everything in between stays on the chip.
#
# A vocabulary is rarely a multiple of the block, so the last block is ragged: the *tail*. Lanes beyond the end must be switched off by a
# `mask`, or they read what lies behind the row; a masked load gives `other` instead. And rows may lie further apart than they are long, so
# the kernel is told the *stride*. This one counts, in each row, the tokens that are allowed at all, whose logit is not −inf:


# %%
@triton.jit
def count_kernel(X, OUT, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    found = 0
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(
            X + row.to(tl.int64) * stride + columns,
            mask=columns < V,
            other=float("-inf"),
        )
        found += tl.sum((x > float("-inf")).to(tl.int32), 0)
    tl.store(OUT + row, found)


def allowed(x):
    out = torch.empty(len(x), dtype=torch.int32, device=x.device)
    count_kernel[(len(x),)](
        x, out, x.stride(0), x.shape[1], BLOCK=128
    )  # one program per row
    return out


barred = z.float().masked_fill(torch.rand(z.shape) < 0.3, -torch.inf).to(where)
print(allowed(barred).tolist(), (barred > -torch.inf).sum(1).tolist())
print(f"rows of {V} logits that a 32-bit offset can reach: {2**31 // V}")

# %% [markdown]
# Why `row.to(tl.int64)`? A program number has 32 bits, and the last line says how many rows that reaches. In a larger batch the product
# `row * stride` turns negative, and the kernel reads somewhere else. It has happened in several well-known libraries.
#
# > **People ask: do I lose time in the interpreter, or accuracy?**
# >
# > Time, and not accuracy: every operation of every program is a call of NumPy, in the precision you wrote. It cannot show how fast a kernel
# > would be, nor races between programs, which run one after another here. And the interpreter accepts Python that the compiler does not: keep a
# > carried variable's type (`0.0`, not `0`), no lists, no `return` in a loop. A kernel that passes here may still need that to compile for a GPU.
#
# ## A softmax in one pass
#
# $e^{z}$ overflows in float32 at $z = 89$, so one subtracts a number $m$ first, which changes nothing:
#
# $$\log Z = \log\sum_v e^{z_v} = m + \log\sum_v e^{z_v - m} \quad\text{for any } m \tag{9.2}$$
#
# The safe choice is the maximum, for then the largest term is 1.

# %%
print(torch.tensor([88.0, 89.0], dtype=torch.float32).exp().tolist())
for m in (z.amax(1), z[:, 0], torch.full((6,), -3.0)):
    shifted = m + (z - m[:, None]).exp().sum(1).log()
    check.equation("9.2", shifted, torch.logsumexp(z, 1))

# %% [markdown]
# But the maximum is only known once the row has been read, and then it has to be read again. That is the second pass to get rid of.
# The idea (Milakov and Gimelshein 2018, *online softmax*): use the maximum so far. When a block $\mathcal B$ brings a larger one, $m' = \max(m, \max_{\mathcal B} z)$,
# every term already summed is too large by the same factor, so repair the *sum*:
#
# $$s' = e^{m - m'}\,s + \sum_{v \in \mathcal B} e^{z_v - m'} \tag{9.3}$$
#
# **Predict.** What happens to $s$ in a row whose largest logit comes last, and is larger than all others by 20?
#
# <details><summary>Compare</summary>
#
# It is multiplied by $e^{-20}$ or less, so almost nothing of it is left, and the last logit adds $e^0 = 1$. The cell below prints how far above 1 it ends.
#
# </details>
#
# **Prove** (one line): if $s = \sum_{v \text{ seen}} e^{z_v - m}$ before, then the same holds with $s'$ and $m'$ after. Start with $s = 0$ and a *finite* $m$ below
# every logit, such as $-10^{30}$: with $m = -\infty$, a first block that is all −inf would give $-\infty - (-\infty)$, which is not a number.

# Beside $s$ the function below carries three more sums through the row, each of which the next two sections explain: $t$ is for the reference what
# $s$ is for the policy, $h$ is for the entropy and $w$ for the KL.

# %%
LOWEST = -1e30


def one_pass(z, r, block):
    """(m, s, h, n, t, w) of rows z and r [N, V], read once, in blocks."""
    m = n = z.new_full((len(z),), LOWEST)
    s = h = t = w = z.new_zeros(len(z))
    for a, b in zip(z.split(block, 1), r.split(block, 1)):
        new, new_r = torch.maximum(m, a.amax(1)), torch.maximum(n, b.amax(1))
        fall, fall_r = m - new, n - new_r
        a, b = a - new[:, None], b - new_r[:, None]
        e = a.exp()
        h = fall.exp() * (h + s * fall) + (e * a).sum(1)
        w = fall.exp() * (w + s * (fall - fall_r)) + (e * (a - b)).sum(1)
        s = fall.exp() * s + e.sum(1)
        t = fall_r.exp() * t + b.exp().sum(1)
        m, n = new, new_r
    return m, s, h, n, t, w


m, s, h, n, t, w = one_pass(z, r, 64)
check.equation("9.3", s, (z - z.amax(1, keepdim=True)).exp().sum(1))
check.equation("9.3", t, (r - r.amax(1, keepdim=True)).exp().sum(1))
late = torch.cat([z, z.amax(1, keepdim=True) + 20], 1)
print(
    f"largest logit last, by 20: s − 1 is at most {one_pass(late, late, 64)[1].max() - 1:.0e}"
)

# %% [markdown]
# The log-prob of the sampled token needs one logit more, and no further sum:
#
# $$\log\pi(a) = z_a - m - \log s \tag{9.4}$$
#
# From here on the left-hand side of a check is the library, the right-hand side what our pass has found.

# %%
stats = token_stats(z, tokens, r)
check.equation("9.4", stats.logprob, z[range(6), tokens] - m - s.log())

# %% [markdown]
# ## Entropy and KL in the same pass
#
# The entropy is a mean of $-\log\pi$, and by (9.4) a mean of $z - m$ is all it takes. Its numerator $h$ runs along. When the maximum rises, each
# $z_v - m$ falls by $m' - m$, so $h$ gets a share of $s$ before it is rescaled like $s$, $h \leftarrow e^{m - m'}(h + s\,(m - m'))$:
#
# $$H(\pi) = \log s - \frac{h}{s}, \qquad h = \sum_v e^{z_v - m}\,(z_v - m) \tag{9.5}$$

# %%
check.equation("9.5", stats.entropy, s.log() - h / s)

# %% [markdown]
# And the KL is a mean of $\log\pi - \log\pi_b$. Write both by (9.4); the difference of logits is averaged in a running sum $w$, the
# normalisers come at the end:
#
# $$D(\pi\|\pi_b) = \frac{w}{s} + \log t - \log s, \qquad w = \sum_v e^{z_v - m}\,\big[(z_v - m) - (r_v - n)\big] \tag{9.6}$$

# %%
check.equation("9.6", stats.kl, w / s + t.log() - s.log())
logp, logq = z.log_softmax(1), r.log_softmax(1)
check.equation("9.6", kl_divergence(logp, logq), w / s + t.log() - s.log())

# %% [markdown]
# With log-probs of both models, KLQ (KL-regularised Q-learning) has its action-value too. The value head's number $V(s)$ is the only thing
# to be added, so the kernel that closes the pass writes $Q$ as well:
#
# $$Q(s, a) = \tau\,\big(\log\pi(a) - \log\pi_b(a)\big) + V(s) \tag{9.7}$$

# %%
values, tau = torch.randn(6), 0.05
q = token_q(z, tokens, r, values, tau=tau)[1]
ratio = (z[range(6), tokens] - m - s.log()) - (r[range(6), tokens] - n - t.log())
check.equation("9.7", q, tau * ratio + values)

# %% [markdown]
# **Change.** Move the slider from block to block. Which of the three lines may go down as well as up?

# %%
explore(PASS)

# %% [markdown]
# ## Why a small KL drowns
#
# At the start of training the policy *is* its reference, and for a while the KL of a token stays tiny. (9.6) then is a difference of
# numbers of size one or more whose result is tiny. A float32 number is rounded by up to $u = 2^{-24}$ of its size, and these numbers are not tiny, so
# the error of the form (9.6) does not shrink with the KL. What can be promised? Each term of a sum is rounded at most $K$ times: with blocks of 128 logits,
# 128 times in its block and eight times in each of the $V/128$ blocks (an exponential of two roundings, products, additions). An exponent that is rounded
# changes its term by $u\,|z_v - m|$ more. Chained, with $x_v = 1 + |z_v - m| + |r_v - n|$:
#
# $$\big|D_{\text{float32}} - D\big| \le \gamma_K\,\big(2\,\mathbb{E}_\pi[x^2] + \mathbb{E}_{\pi_b}[x] + \log s + \log t\big), \qquad \gamma_K = \frac{K u}{1 - K u} \tag{9.8}$$
#
# The first mean is for $w/s$: the terms of $w$ have *signs*, so their roundings are measured by the absolute values, and not by the sum. The bound takes every
# rounding at its worst, all in one direction; what one sees is a small part of it. But nothing on its right-hand side knows how small $D$ is.
#
# **Predict.** Say $\log s \approx \log t \approx 5$, and that each is rounded only once. Below which KL is no digit left? And can the result be negative?
#
# <details><summary>Compare</summary>
#
# Near 5, the numbers of float32 lie about 5e-7 apart (printed below), and rounding moves by up to half of that. So a KL of some 1e-7 has no digit left, and
# from 1e-6 on it has few. What is left is a sum of roundings, and that has either sign.
#
# </details>
#
# We try: pairs of rows with a KL from $10^{-9}$ to 1, exact in float64. For each size, the error of (9.6) in float32.

# %%
sizes = torch.logspace(-9, 0, 10)
grid = 2.0**-13  # float32 holds these logits exactly
base = (2 * torch.randn(10, 5, 1000) / grid).round() * grid
noise = (2 * sizes[:, None, None]).sqrt() * torch.randn(10, 5, 1000)
z64 = base.reshape(50, 1000)
r64 = (base + noise).float().double().reshape(50, 1000)
exact = kl_divergence(z64.log_softmax(1), r64.log_softmax(1))


def by_difference_and_bound(z, r, block=128):
    """(9.6) in float32 of rows that float32 holds, and how far (9.8) lets it be off."""
    _, s, _, _, t, w = one_pass(z.float(), r.float(), block)
    a, b = (x - x.amax(1, keepdim=True) for x in (z, r))
    x = 1 + a.abs() + b.abs()
    means = 2 * (a.softmax(1) * x**2).sum(1) + (b.softmax(1) * x).sum(1)
    K, u = block + 8 * -(-z.shape[1] // block), 2.0**-24
    bound = means + a.logsumexp(1) + b.logsumexp(1)
    return (w / s + t.log() - s.log()).double(), K * u / (1 - K * u) * bound


by_difference, bound = by_difference_and_bound(z64, r64)
check.inequality("9.8", (by_difference - exact).abs(), bound)
for size, rows, vocab in ((3, 200, 1000), (10, 200, 256), (10, 2, 32_000)):
    hostile = size * torch.randn(2, rows, vocab).float().double()
    found, most = by_difference_and_bound(*hostile)
    off = (found - kl_divergence(*hostile.log_softmax(-1))).abs()
    check.inequality("9.8", off, most)
    print(
        f"logits of size {size}, {vocab} of them: at most {(off / most).max():.1g} of it"
    )

epsilon = torch.finfo(torch.float32).eps
five = torch.tensor([5.0, 6.0], dtype=torch.float32)
print(f"from 5 to the next number in float32: {five[0].nextafter(five[1]) - 5:.0e}")
for i in (0, 2, 4, 6):
    print(f"true {exact[5 * i]:.2e}, by (9.6) in float32 {by_difference[5 * i]:+.2e}")
print(f"below zero: {(by_difference < 0).sum()} of {len(exact)}")

# %% [markdown]
# ## A pivot, and no term is negative
#
# Notebook 04 had the cure: sum $\pi\,\varphi(d)$ with $d = \log\pi - \log\pi_b$, equation (4.10). No term is negative, none is the difference of
# large numbers. (A term is still a difference, $e^{-d} - 1$ and $d$, of *small* numbers: in float32, $\varphi$ itself needs its series near 0, as
# the next section shows.) But $d$ needs both normalisers, which a single pass has only at the end. So guess: replace $\log Z_\pi - \log Z_{\pi_b}$ by a *pivot* $g$, taken from
# the first block, and sum with
#
# $$d_v = (z_v - m) - (r_v - n) - g, \qquad b = e^{-g}\sum_v e^{z_v - m}\,\varphi(d_v) = t - e^{-g}(s - w_g) \tag{9.9}$$
#
# where $w_g = \sum_v e^{z_v - m} d_v$. The second form explains it ($e^{z-m}e^{-d}$ is $e^{g}e^{r-n}$, so the exponentials add up to $t$), the first one is computed.

# %%
z, r = z64, r64
m, s, h, n, t, w = one_pass(z, r, 128)
a, c = z - m[:, None], r - n[:, None]


def phi(d):
    return torch.expm1(-d) + d


def about(g):
    """(w, b) of (9.9) about a pivot for each row."""
    d = a - c - g[:, None]
    return (a.exp() * d).sum(1), (-g).exp() * (a.exp() * phi(d)).sum(1)


g = (a - c)[:, :128].mean(1)  # a guess from the first block
w_g, b = about(g)
check.equation("9.9", b, t - (-g).exp() * (s - w_g))

# %% [markdown]
# Solve (9.9) for $t$ and put it into the KL, which about any pivot reads $D = w_g/s + g + \log t - \log s$:
#
# $$D = \frac{w_g}{s} + \log\left(1 - \frac{w_g}{s} + \frac{e^{g}\,b}{s}\right) \tag{9.10}$$
#
# There is one pivot about which $w_g = 0$: the mean of $(z - m) - (r - n)$ under the policy. About it only the logarithm is left,
#
# $$D = \log\left(1 + \frac{e^{g^*} b^*}{s}\right), \qquad g^* = g + \frac{w_g}{s} \tag{9.11}$$
#
# a number that is as small as its smallest ingredient, and never negative. And the mean need not be known in advance: about another pivot $g'$,
# with the jump $j = g - g'$, the sum becomes
#
# $$b' = b + e^{-g'}\big[(s - w_g)\,\varphi(j) + w_g\,j\big] \tag{9.12}$$

# %%
kl = token_stats(z, torch.zeros(50, dtype=torch.long), r).kl
check.equation("9.10", kl, w_g / s + torch.log1p(-w_g / s + g.exp() * b / s))
best = g + w_g / s
w_best, b_best = about(best)
check.equation("9.11", kl, torch.log1p(best.exp() * b_best / s))
check.equation("9.11", w_best / s, torch.zeros(50))
for other in (best, g + 0.3, torch.zeros(50)):
    shift = g - other
    moved = b + (-other).exp() * ((s - w_g) * phi(shift) + w_g * shift)
    check.equation("9.12", about(other)[1], moved)

# %% [markdown]
# ## The library's kernel
#
# This is how the project's kernel adds one more tile to its state, in base 2, which is what the hardware has ($k$ is $\log_2 e$ over the temperature).
# You know most of it: the fall of the maximum, $h$, the sums of (9.9), and (9.12) as `_move` where the pivot changes (there $j$ is called `a`). Not derived here:
# `_power` caps an exponent so that nothing overflows; and `_move` also rescales, and starts $b$ afresh where $s$ has underflown.

# %%
d = torch.logspace(-6, -1, 6)
plain = (torch.expm1(-d.float()) + d.float()).double()
by_series = d * d * (0.5 - d * (1 / 6 - d / 24))
for i in (0, 2, 5):
    print(
        f"d = {d[i]:.0e}: φ in float32 is off by {abs(plain[i] / by_series[i] - 1):.0e}"
    )

# %% [markdown]
# So where $d$ is small, `bregman`, the library's $p\,\varphi(d)$, takes the series $\tfrac12 d^2 - \tfrac16 d^3 + \tfrac1{24} d^4$, with its second number moved a little to make
# up for what is cut off:

# %%
source(device.bregman.fn)
source(device.accumulate.fn)
source(device.kl_divergence.fn)

# %% [markdown]
# The last function closes the pass: it moves the pivot to the mean, and takes (9.11) for a small KL, by $\log(1 + x) = 2\,\mathrm{artanh}\frac{x}{2 + x}$, whose series
# is short where the number is small; for a large KL (9.6) will do. We run it on the fifty rows in float32 (one visit to each), and compare the three forms.

# %%
z32, r32 = z64.float().to(where), r64.float().to(where)
zeros = torch.zeros(50, dtype=torch.long, device=where)
fused = token_stats(z32, zeros, r32, backend="triton")
by_pivot = fused.kl.double().cpu()
check.inequality("9.11", (by_pivot / exact - 1).abs(), torch.full((50,), 1e-2))
for name in ("logprob", "entropy"):
    ours, right = (
        getattr(fused, name),
        getattr(token_stats(z64, zeros.cpu(), r64), name),
    )
    error = (ours.double().cpu() - right).abs().max()
    print(f"{name}: largest error of the kernel {error:.1e}")

logp32, logq32 = z32.log_softmax(1), r32.log_softmax(1)
by_sum = (logp32.exp() * (logp32 - logq32)).sum(1).double().cpu()
forms = {
    "by normalisers, (9.6)": by_difference.view(10, 5),
    "Σ p (log p − log q)": by_sum.view(10, 5),
    "about a pivot, (9.11), Triton": by_pivot.view(10, 5),
}
show(draw_rounding(exact.view(10, 5), forms, epsilon))

# %% [markdown]
# And $Q$, in the same pass, from the Triton kernel against (9.7) in float64:

# %%
values = torch.randn(50)
_, q = token_q(z32, zeros, r32, values.float().to(where), tau=0.05, backend="triton")
ratio = (z64.log_softmax(1) - r64.log_softmax(1))[:, 0]
off = (q.double().cpu() - (0.05 * ratio + values)).abs()
check.inequality("9.7", off, 2 * epsilon * values.abs().clamp(min=1.0))

# %% [markdown]
# ## Puzzles
#
# Three kernels to write. Each answer is a function that launches your kernel, and that function is given; the hole is in the kernel. Your
# kernel runs in a process of its own: it may hang or crash, and you are told so. It gets several rows, more than one block, a ragged tail, rows that lie
# further apart than they are long, by another gap in each tensor, and NaN (not a number) wherever it has no business. All tensors are float32 unless said otherwise.
#
# What a kernel prints is hidden while it is graded. To see it, call your function yourself:
# `my_row_stats(torch.randn(2, 50, dtype=torch.float32), torch.tensor([True, True]))`.
#
# ### Exercise 9.1 · Maximum and sum of a row
#
# `x` [N, V] and `mask` [N], boolean. Return the maximum [N] and the sum [N] of every row, and 0 for both where the mask is False: such a row holds NaN.
#
# <!-- hints 9.1 -->


# %%
@triton.jit
def row_kernel(X, MASK, TOP, TOTAL, stride, V, BLOCK: tl.constexpr):
    # BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    best, total = float("-inf"), 0.0
    if tl.load(MASK + row) == 0:
        tl.store(TOP + row, 0.0)
        tl.store(TOTAL + row, 0.0)
        return
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(X + row * stride + columns, mask=inside, other=float("-inf"))
        best = tl.maximum(best, tl.max(x, 0))
        total += tl.sum(tl.where(inside, x, 0.0), 0)
    tl.store(TOP + row, best)
    tl.store(TOTAL + row, total)
    # END SOLUTION


def my_row_stats(x, mask):
    top, total = x.new_empty(len(x)), x.new_empty(len(x))
    row_kernel[(len(x),)](x, mask, top, total, x.stride(0), x.shape[1], BLOCK=32)
    return top, total


check.exercise("9.1", my_row_stats)

# %% [markdown]
# ### Exercise 9.2 · The normaliser, block by block
#
# `z` [N, V], with logits near −300 and 300, and −inf among them: in some rows, a whole block. Return $\log Z$ [N] of every row, reading each
# logit once (not checked). At least one logit of a row is finite.
#
# <!-- hints 9.2 -->


# %%
@triton.jit
def normaliser_kernel(Z, OUT, stride, V, BLOCK: tl.constexpr):
    # BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    m, s = -1e30, 0.0
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(Z + row * stride + columns, mask=columns < V, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0)
        m = new
    tl.store(OUT + row, m + tl.log(s))
    # END SOLUTION


def my_log_normaliser(z):
    out = z.new_empty(len(z))
    normaliser_kernel[(len(z),)](z, out, z.stride(0), z.shape[1], BLOCK=32)
    return out


check.exercise("9.2", my_log_normaliser)

# %% [markdown]
# ### Exercise 9.3 · Log-prob and KL of two rows in one pass
#
# `z` and `r` [N, V] as before; where one is −inf, so is the other, and such a token adds nothing. `tokens` [N], int64, are the sampled ones. Return
# $\log\pi(a)$ [N] and $D(\pi\|\pi_b)$ [N] by (9.6), reading each logit once (the token's again; not checked). The KLs here are of size one: no pivot is needed.
#
# <!-- hints 9.3 -->


# %%
@triton.jit
def kl_kernel(Z, R, TOKENS, LOGPROB, KL, z_stride, r_stride, V, BLOCK: tl.constexpr):
    # BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_stride
    R += row * r_stride
    m, n, s, t, w = -1e30, -1e30, 0.0, 0.0, 0.0
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(Z + columns, mask=columns < V, other=float("-inf"))
        r = tl.load(R + columns, mask=columns < V, other=float("-inf"))
        new, new_r = tl.maximum(m, tl.max(z, 0)), tl.maximum(n, tl.max(r, 0))
        fall, fall_r = m - new, n - new_r
        e, d = tl.exp(z - new), (z - new) - (r - new_r)
        d = tl.where(z > float("-inf"), d, 0.0)
        w = tl.exp(fall) * (w + s * (fall - fall_r)) + tl.sum(e * d, 0)
        s = tl.exp(fall) * s + tl.sum(e, 0)
        t = tl.exp(fall_r) * t + tl.sum(tl.exp(r - new_r), 0)
        m, n = new, new_r
    chosen = tl.load(Z + tl.load(TOKENS + row))
    tl.store(LOGPROB + row, chosen - m - tl.log(s))
    tl.store(KL + row, w / s + tl.log(t) - tl.log(s))
    # END SOLUTION


def my_two_rows(z, r, tokens):
    logprob, kl = z.new_empty(len(z)), z.new_empty(len(z))
    kl_kernel[(len(z),)](
        z, r, tokens, logprob, kl, z.stride(0), r.stride(0), z.shape[1], BLOCK=32
    )
    return logprob, kl


check.exercise("9.3", my_two_rows)

# %% [markdown]
# ### Open question
#
# A colleague says: "Our KL penalty has a weight of 0.05, so an error of $10^{-7}$ in the KL is worth $5 \cdot 10^{-9}$ of reward. Why bother?" Where is the colleague
# right, and for which uses of the KL is that wrong?
#
# *What a good answer contains:* that as a number added to a reward the error is harmless (1 point); that a *relative* error matters where the KL is
# differentiated, compared, or used to steer a coefficient early in training (2); that the sign matters, for a KL below zero breaks a logarithm, a square
# root or a stopping rule (1); a measurement that would decide it in one's own run (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# Added to a reward, the error is far below its noise, and the colleague is right. It is not so where the KL itself is the signal. Near the reference its gradient is of
# the size of $d$, while the rounding of each $d$ by (9.6) does not shrink: a penalty on the exact KL then pushes in random directions. A controller that keeps the KL
# at a target, a plot on a logarithmic axis, and the question whether two runs are at the same KL all read the relative error. A negative KL under a square root is
# not a number at all. To decide: log the KL of the first hundred updates in float32 and in float64, and look at the ratio.
#
# </details>

# %% [markdown]
# ## Remember
#
# A statistic of logits is as fast as its bytes are few (9.1). A running maximum and sums that are rescaled when it rises (9.3) give log-prob (9.4), entropy (9.5), KL
# (9.6) and $Q$ (9.7) in one visit. A difference of normalisers loses a small KL (9.8); a sum of terms that are never negative, about a pivot that is moved to the mean at the
# end, keeps it (9.11), and is still one visit. In a kernel, mind the tail, the stride, the finite start and the −inf.
#
# *In the library:* `klq_kernels.token_stats` and `token_q`, `klq_kernels.device` (the state), `klq_kernels.triton_logits` (the launches),
# `klq_edu.bench.roofline` (the floors). *Next:* the gradient of all this.

# %%
check.ledger()
