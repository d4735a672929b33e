# %% [markdown]
# # 12 · Benchmarking without fooling yourself
#
# **Is the fused way faster, by how much, and in which sentence may you say so?**
#
# *After this notebook you can* find the usual flaws in a benchmark, and repair them; time in units of a matrix product; say how
# sure a median of a few repetitions is; compare a result with float64; predict the most that fusing can gain by counting bytes;
# and write a claim that a reviewer would accept.
#
# *You need* notebooks 07 and 11 for what is computed (log-probabilities, the Kullback–Leibler divergence or KL, the loss of KLQ, KL-regularised
# Q-learning); nothing of it is derived again. *Time:* <!-- minutes --> minutes. *Symbols:* $N$ tokens, $V$ vocabulary, $H$ hidden size, $s$ bytes per
# number; $t$ seconds of a job, $g$ seconds of a matrix product, $u = t/g$; $R$ repetitions; $\varepsilon$ drift; $B$ bandwidth, $I$
# operations per byte, $P_{peak}$ the most operations per second; $P(\dots)$ with brackets is a probability.
#
# Two machines appear. The one you are reading on is **measured**, and no check here depends on what comes out. The other one is
# **simulated**: its costs are known, so a benchmark of it is right or wrong.

# %%
import math
from itertools import product
from statistics import mean, median
from unittest.mock import patch

import pandas as pd
import torch

from klq_edu.bench import measure, roofline
from klq_edu.bench.config import QUICK, BenchConfig, Size
from klq_edu.bench.measure import errors, exact, interleave, run_once, stage_rows
from klq_edu.bench.roofline import DEVICES, KERNELS, LOSSES, SHAPE, floor_seconds
from klq_edu.bench.workloads import Contender, contenders, make_inputs, naive_stats
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters import c12_benchmarking as c12
from klq_edu.course.chapters import float32
from klq_edu.course.chapters.c09_one_pass import Traffic
from klq_edu.course.chapters.c12_benchmarking import Lab
from klq_edu.machine import facts, resolve_device

check = start("12")

# %% [markdown]
# ## A number that is wrong
#
# Somebody has fused two kernels and wants to know what it is worth. `lab` is an accelerator: `run` asks it for a forward pass,
# `backward` for the gradient, `inputs` draws a batch, `clock` says what time it is.

# %%
source(c12.broken_benchmark)

# %% [markdown]
# **Predict.** There are six flaws. Write them down before you read on. Which of them favour fused, which naive?
#
# On the simulated accelerator the truth is known: forward and backward, fused takes 0.83 of naive's time. Here is what
# this function says, once on a fresh machine, and a second time on the same one.

# %%
TRUTH = c12.benchmark(Lab("backward"))
lab = Lab(*(c12.TROUBLES.keys() - {"wrong", "asynchronous"}))
print(f"the truth:       fused takes {TRUTH:.2f} of naive's time")
for attempt in ("first", "second"):
    print(f"{attempt:>6} attempt:  {c12.broken_benchmark(lab):.2f}")

# %% [markdown]
# First fused seems slower, then many times faster. Nobody would publish the first; many would publish the second.
# Here is what each flaw does alone, on a machine with just the trouble that reveals it.
#
# <details><summary>Compare with your list</summary>
#
# 1. *No warm-up*: a first call compiles and allocates.
# 2. *No waiting*: a call on a graphics processing unit (GPU) only asks for work; without a `synchronize` before each look at the
#    clock one times the asking.
# 3. *Unequal work*: the gradient is left out for fused.
# 4. *Inputs inside the clock*, for naive only.
# 5. *A mean of three in a fixed order*: the machine gets warm, and one interrupted run decides.
# 6. *No look at the result*: what skips half of the work is fast.
#
# Two more do not show in the code: another precision for one of the two, and an input so small that it stays in the cache.
#
# </details>

# %%
c12.effects().round(2)

# %% [markdown]
# Without flaws the ratio is 0.67 where only a forward pass costs time, and 0.83 where the backward pass does, too. The fifth flaw stands
# three times, as it has parts: the order shows on a machine that drifts, the mean of a few where runs are interrupted or lucky.
#
# Compare the last two columns: a flaw that makes the ratio smaller favours fused, one that makes it larger naive. (NaN, not a number: the repaired function refuses to report a time for a wrong result). No flaw is a matter of
# a few per cent, and most do not average out: measuring longer gives the wrong number with more digits. Exercise 12.1 is to repair the
# function. The sections that follow treat what needs more than a line.
#
# ## Time in units of a product
#
# Seconds belong to one machine at one moment. Divide them by something that this machine did at that moment: the
# matrix product $[N, H] \times [H, V]$, which is the work that cannot be avoided when logits are made. (Such a product is called a
# GEMM, general matrix multiplication.) Take it just before and just after each repetition:
#
# $$u = \frac{t}{\tfrac12\left(g_{before} + g_{after}\right)} \tag{12.1}$$
#
# The check lends the library's own harness a simulated clock, on a machine that gets slower and is interrupted. Left: what the
# harness reports (lowest, median, highest). Right: the formula, from the log of the machine.


# %%
def contender(lab, name):
    """A forward pass on the simulated machine, as the library's harness wants it."""

    def run(inputs):
        lab.run(name)
        return {}

    return Contender(name, run, truth=None)


def on_its_clock(lab, reps):
    """The library's repetitions of naive and fused, with a product around each."""

    def gemm():
        begun = lab.clock()
        lab.run("product")
        return lab.clock() - begun

    both = [contender(lab, "naive"), contender(lab, "fused")]
    with patch.object(measure, "now", lab.clock):
        return both, interleave(both, {}, gemm, reps, tick=lambda: None)


def by_hand(lab, name):
    """(12.1) for each run of this name in the log."""
    log = lab.log
    at = [i for i, (ran, _) in enumerate(log) if ran == name]
    return [log[i][1] / ((log[i - 1][1] + log[i + 1][1]) / 2) for i in at]


SECONDS = {"naive": 3.0, "fused": 2.0, "product": 1.0}
lab = Lab("drifts", "hiccups", seconds=SECONDS)
both, times = on_its_clock(lab, reps=5)
for one in both:
    (row,) = stage_rows(one, times, ("forward",), in_units=True)
    typed = by_hand(lab, one.name)
    reported = [row["units_low"], row["units"], row["units_high"]]
    check.equation("12.1", reported, [min(typed), median(typed), max(typed)])

# %% [markdown]
# **Predict.** A laptop gets warm, and every run takes $\varepsilon = 4\,\%$ of the first one's time longer than the run before. By how much are
# units off after fifty runs?
#
# <details><summary>Compare</summary>
#
# Not at all. The job is run number $k$, the products are $k-1$ and $k+1$, and the mean of what came before and after is what
# there was in between:
#
# $$\frac{w\,(1+\varepsilon k)}{\tfrac12\,g\,\big(1+\varepsilon(k-1)\big) + \tfrac12\,g\,\big(1+\varepsilon(k+1)\big)} = \frac{w}{g} \tag{12.2}$$
#
# A product from before only would do worse. (Drift that bends is cancelled in part.)
#
# </details>

# %%
lab = Lab("drifts", seconds=SECONDS)
both, times = on_its_clock(lab, reps=12)
units = {n: [r["forward"] / r["gemm"] for r in rows] for n, rows in times.items()}
check.equation("12.2", units["naive"], [3.0 / 1.0] * 12)
check.equation("12.2", units["fused"], [2.0 / 1.0] * 12)
slowest = max(seconds for name, seconds in lab.log if name == "naive")
print(f"meanwhile a run of naive went from 3 to {slowest:.1f} seconds")

# %% [markdown]
# ## Taking turns
#
# Not every machine is asked for products all the time. Without them, the order decides. Run $n$ times fused, then $n$ times
# naive, on a machine that drifts. Fused runs are number $0$ to $n-1$, naive's $n$ to $2n-1$, so the ratio of means is
#
# $$\frac{\bar t_{fused}}{\bar t_{naive}} = \frac{w_{fused}}{w_{naive}}\cdot\frac{1 + \varepsilon\,\frac{n-1}{2}}{1 + \varepsilon\,\frac{3n-1}{2}} \tag{12.3}$$
#
# and it gets *worse* with more repetitions: it tends to a third of the truth, however small the drift.

# %%
eps = 0.04
for n in (2, 10, 50):
    lab = Lab("drifts", seconds=SECONDS, drift=eps)
    blocks = c12.benchmark(lab, n, {"compiles", "drifts"}, mean)
    factor = (1 + eps * (n - 1) / 2) / (1 + eps * (3 * n - 1) / 2)
    check.equation("12.3", blocks, 2 / 3 * factor)
    print(f"n = {n}: {blocks:.3f} where the truth is {2 / 3:.3f}")

# %% [markdown]
# Instead let them take turns, and change who goes first: naive, fused, fused, naive. Now both have runs whose numbers
# sum to the same, and a steady drift cancels:
#
# $$\frac{w_{fused}\,\big[(1+\varepsilon) + (1+2\varepsilon)\big]}{w_{naive}\,\big[1 + (1+3\varepsilon)\big]} = \frac{w_{fused}}{w_{naive}} \tag{12.4}$$
#
# That is what `interleave` does. (The check gives it a product that costs nothing, so that only turns are left.)

# %%
lab = Lab("drifts", seconds=SECONDS)
both = [contender(lab, "naive"), contender(lab, "fused")]
with patch.object(measure, "now", lab.clock):
    times = interleave(both, {}, lambda: 1.0, 8, lambda: None)
naive, fused = ([r["forward"] for r in times[name]] for name in ("naive", "fused"))
check.equation("12.4", mean(fused) / mean(naive), 2.0 / 3.0)
print("order:", " ".join(name for name, _ in lab.log[:8]), "…")

# %% [markdown]
# **Change.** What is cured by turns, what by medians, and what is left when a machine has both troubles?

# %%
explore(c12.ORDER)

# %% [markdown]
# ## How sure is a median of three?
#
# The committed benchmark gives the median of three repetitions, with the lowest and the highest as whiskers. Let $m$ be the
# median of *all* repetitions one could make. Each repetition falls below it or above it with probability ½, whatever the
# distribution is (ties have probability 0). If repetitions are *independent*, the whiskers miss $m$ only if all fall on one side:
#
# $$P\left(t_{(1)} \le m \le t_{(R)}\right) = 1 - 2^{1-R} \tag{12.5}$$
#
# **Predict:** what is that for $R = 3$? How many repetitions does a 95 % interval take? The check counts all patterns of below and above.

# %%
counts = range(2, 11)
covered = []
for R in counts:
    patterns = list(product((0, 1), repeat=R))
    covered.append(sum(0 < sum(pattern) < R for pattern in patterns) / len(patterns))
check.equation("12.5", covered, [1 - 2.0 ** (1 - R) for R in counts])
for R in (3, 5, 6):
    print(f"R = {R}: whiskers cover the median with {covered[R - 2]:.1%}")

# %% [markdown]
# A machine with moods makes repetitions alike: one slow run is followed by another. Then the whiskers cover less. Here is what is left
# of (12.5) if each repetition has correlation 0.8 with the one before.

# %%
generator = torch.Generator().manual_seed(0)
runs = torch.randn(20_000, 6, generator=generator)  # their median is 0
for i in range(1, 6):
    runs[:, i] = 0.8 * runs[:, i - 1] + 0.6 * runs[:, i]
for R in (3, 6):
    low, high = runs[:, :R].aminmax(dim=1)
    share = ((low < 0) & (high > 0)).double().mean()
    print(f"R = {R}: {share:.0%} instead of {1 - 2.0 ** (1 - R):.0%}")

# %% [markdown]
# > **People ask: the documentation of Python's `timeit` says to take the minimum. Why not here?**
# >
# > A minimum answers "how fast can it go, once, if nothing interferes?". On a quiet machine with one deterministic program that is a
# > fair question. It is no property of the program alone, though. With $F(x)$ the share of repetitions that take at most $x$,
#
# $$P\left(\min(t_1, \dots, t_R) > x\right) = \left(1 - F(x)\right)^R \tag{12.6}$$
#
# > so the minimum falls the longer you measure, and two people with different $R$ report different numbers. And the two contenders must
# > be equally lucky: a fused kernel that now and then finds its data in the cache has a minimum that no user sees.
#
# The check goes through all sequences of $R$ repetitions from a distribution with four times.

# %%
likely = {0.7: 0.05, 1.0: 0.7, 1.1: 0.2, 3.0: 0.05}  # seconds: probability
for R in (1, 3, 6):
    tail, shortest = dict.fromkeys(likely, 0.0), 0.0
    for runs in product(likely, repeat=R):
        weight = math.prod(likely[t] for t in runs)
        shortest += weight * min(runs)
        tail = {x: p + weight * (min(runs) > x) for x, p in tail.items()}
    above = [sum(p for t, p in likely.items() if t > x) ** R for x in likely]
    check.equation("12.6", [*tail.values()], above)
    print(f"R = {R}: the minimum is {shortest:.3f} on average")

# %% [markdown]
# We want an interval for a *ratio* of medians, and there is no formula as simple as (12.5). The *bootstrap* takes the repetitions for
# the whole distribution, draws $R$ of them with replacement, computes the ratio, and does that many times. The middle 95 % of these ratios are
# the interval. It can't be better than its data: for one median and odd $R$ everything it can say is known, for a resample's
# median is at most $t_{(k)}$ if more than half of its draws are,
#
# $$P\left(\mathrm{median}^* \le t_{(k)}\right) = \sum_{j > R/2} \binom{R}{j}\left(\frac{k}{R}\right)^j\left(1 - \frac{k}{R}\right)^{R-j} \tag{12.7}$$
#
# and it only ever names times that occurred. The check goes through all $R^R$ resamples.

# %%
for R in (3, 5):
    resamples = [median(draw) for draw in product(range(1, R + 1), repeat=R)]
    counted = [sum(m <= k for m in resamples) / R**R for k in range(1, R + 1)]
    typed = [
        sum(
            math.comb(R, j) * (k / R) ** j * (1 - k / R) ** (R - j)
            for j in range(R // 2 + 1, R + 1)
        )
        for k in range(1, R + 1)
    ]
    check.equation("12.7", counted, typed)
    print(f"R = {R}: the extremes are the median of {counted[0]:.1%} of resamples each")

# %% [markdown]
# With three repetitions, even the lowest is the median of a quarter of the resamples: a 95 % bootstrap interval *is* the whiskers, and
# by (12.5) covers 75 %, at best: resampling takes repetitions for independent, too, and on a machine that drifts it covers less. (Pairs that
# are taken in one minute, as in Exercise 12.2, help where both drift alike.) So report three as what they are, a median with its range,
# and take twenty where a small difference is to be claimed. Exercise 12.2 writes the interval.
#
# ## Is it right at all?
#
# A kernel that is wrong is easily fast. Compared with what? With the naive result in the same precision, you would measure two
# errors at once, and call the better one wrong. So the library computes a truth in float64, and for a gradient $\hat G$ reports
#
# $$e = \frac{\|\hat G - G\|_2}{\|G\|_2}, \qquad G \text{ in float64} \tag{12.8}$$
#
# Why not number by number? Most entries of this gradient are nearly 0, and relative errors there say nothing.
#
# The check runs the fused kernel in float32. Left: the library's error, whose truth comes from autograd in float64. Right: (12.8), with
# $G$ from the formula $\frac{\partial L}{\partial z} = a\,(1_y - p) + p\,\big(-b\,(\log p + \mathcal{H}) + c\,(\log\frac pq - D)\big)$ for upstream gradients $a$ of the
# log-probability, $b$ of the entropy $\mathcal{H}$ and $c$ of the KL $D$.

# %%
with float32():  # in float64 there would be nothing to see
    x = make_inputs("logits_stats", QUICK["logits_stats"], 0, "cpu")
    naive, ours = contenders("logits_stats", "cpu")[:2]
    found = errors(run_once(ours, x)[0], x, exact(ours.truth, x))
    got = x["logits"].grad.double()

z, r = (x[key].detach().double().log_softmax(-1) for key in ("logits", "ref_logits"))
a, b, c = x["upstream"].double()[:, :, None].unbind(1)
p, ratio = z.exp(), z - r
entropy = -(p * z).sum(-1, keepdim=True)
kl = (p * ratio).sum(-1, keepdim=True)
hit = torch.nn.functional.one_hot(x["tokens"], z.shape[1])
G = a * (hit - p) + p * (c * (ratio - kl) - b * (z + entropy))
check.equation("12.8", found["error_gradient"], (got - G).norm() / G.norm(), tol=1e-13)
print(pd.Series(found).map("{:.1e}".format).to_string())

# %% [markdown]
# How small can an error be? A number that is rounded to $d$ significant binary digits (bits) moves by at most
#
# $$|\mathrm{fl}(x) - x| \le 2^{-d}\,|x|, \qquad d = 24,\ 11,\ 8 \text{ for float32, float16, bfloat16} \tag{12.9}$$
#
# so a gradient in bfloat16 may be off by $2^{-8} \approx 0.4\,\%$ from its last rounding alone, and that is no bug. An error is judged
# beside that of the naive way in the *same* precision: the committed file for bfloat16 has both.

# %%
x = torch.randn(10_000)
for bits, dtype in ((24, torch.float32), (11, torch.float16), (8, torch.bfloat16)):
    normal = x[x.abs() > 1e-3]  # below, float16 has fewer bits
    moved = (normal.to(dtype).double() - normal).abs()
    check.inequality("12.9", moved, 2.0**-bits * normal.abs())

half = pd.read_csv(c12.RESULTS / "bench-bf16.csv").dropna(subset=["error_gradient"])
print(
    "committed, bfloat16:",
    dict(zip(half["contender"], half["error_gradient"].round(4))),
)

# %% [markdown]
# ## Memory
#
# What is counted is the peak beyond the inputs, of forward and backward pass: on a GPU by torch's allocator, elsewhere in
# a fresh process, since a process does not give back all that it once had. Whoever returns a gradient for logits has at least
# made room for it:
#
# $$M \ge N\,V\,s \tag{12.10}$$
#
# Here are the committed rows (the file is `results/bench.csv`), in arrays of that size.

# %%
table, origin = c12.committed()
rows = table[(table["workload"] == "logits_stats") & (table["stage"] == "both")]
array = rows["n"] * rows["v"] * 4 / measure.MEGABYTE
check.inequality(
    "12.10", torch.tensor(array.values), torch.tensor(rows["memory_mb"].values)
)
for who, arrays in zip(rows["contender"], rows["memory_mb"] / array):
    print(f"{who}: {arrays:.2f} arrays of N × V numbers")

# %% [markdown]
# The naive way keeps six, the fused one little more than the gradient itself. Peak memory varies by a few MB from one run to the next: next to
# nothing at this size, up to half at small ones (run the measurement below twice). And it decides whether a batch fits.
#
# ## What could it be at best?
#
# **Predict**, before anything is timed: how much can fusing gain? Logits have to be read; the rest can stay in
# registers. Count what `naive_stats` moves instead (log-probability, entropy and KL, forward), operation by operation, as if each were a
# kernel that reads its arguments from memory and writes its result there.

# %%
with float32():
    x = make_inputs("logits_stats", QUICK["logits_stats"], 0, "cpu")
with Traffic() as traffic, torch.no_grad():
    naive_stats(x, x["logits"], x["ref_logits"])

N, V = x["logits"].shape
moved = pd.DataFrame(traffic.rows, columns=["operation", "reads", "writes"])
moved[["reads", "writes"]] /= N * V * 4
print(moved.round(2).to_string(index=False))
print(
    "in all, arrays of N × V numbers:", round(moved[["reads", "writes"]].sum().sum(), 2)
)

# %% [markdown]
# Seventeen passes, and a few numbers per token: 12 of 4 bytes each, the token's own index included.
#
# $$\text{bytes}_{naive} = (17\,V + 12)\,N s \tag{12.11}$$

# %%
check.equation("12.11", traffic.read + traffic.written, (17 * V + 12) * N * 4)

# %% [markdown]
# The fused kernel reads two arrays, once. At a bandwidth of $B$ bytes per second it cannot come below
#
# $$T = \frac{2\,N\,V\,s}{B} \tag{12.12}$$
#
# and where bytes decide, fusing gains at most a factor of $17/2 = 8.5$. The library has these floors for GPUs that are not here,
# from their data sheets.

# %%
n, v, h = SHAPE
for name, device in DEVICES.items():
    floor = floor_seconds("token_stats", name, "bf16", n, v, h)
    check.equation("12.12", 1e3 * floor, 1e3 * 2 * n * v * 2 / device.bandwidth)
    print(f"{name}: at least {1e3 * floor:.2f} ms for N = {n:,}, V = {v:,}")

# %% [markdown]
# Do bytes decide? A kernel that does $I$ operations per byte can, while bytes arrive at rate $B$, do $B\,I$ operations per second; and
# never more than the peak. That is the *roofline*:
#
# $$P_{attainable} = \min\left(P_{peak},\; B\,I\right) \tag{12.13}$$
#
# Derive it from the library's floor: the longer one of bytes over bandwidth and operations over peak. Operations divided by that time are
# (12.13).

# %%
size = (64, 32_000, 1024)  # so few tokens that bytes decide
for name, device in DEVICES.items():
    reached, attainable = [], []
    for kernel, shape in product(KERNELS, (SHAPE, size)):
        bytes_moved, operations = KERNELS[kernel](*shape, 2)
        if operations:
            floor = floor_seconds(kernel, name, "bf16", *shape)
            reached.append(operations / floor / 1e12)
            slope = device.bandwidth * operations / bytes_moved
            attainable.append(min(device.rate("bf16"), slope) / 1e12)
    check.equation("12.13", reached, attainable)
    flat = sum(x == max(attainable) for x in attainable)
    print(f"{name}: {flat} of {len(attainable)} on the flat part")

# %% [markdown]
# Where does each kernel stand? Those that start from logits have no products. For the figure we count the instructions that the library allows
# them per logit (`roofline.INSTRUCTIONS`); these are not matrix operations, so their own flat part would be lower than the one drawn.

# %%
chosen = ("A100", "B200", "H100")
roofs = {d: (DEVICES[d].bandwidth, DEVICES[d].rate("bf16")) for d in chosen}
names = (
    "token_stats",
    "token_stats, gradient",
    "linear_token_stats",
    "linear_klq_loss",
)
places = {}
for name in names:
    bytes_moved, operations = KERNELS[name](n, v, h, 2)
    operations = operations or roofline.INSTRUCTIONS[name] * n * v
    places[name] = operations / bytes_moved
show(c12.draw_roofline(roofs, places))

# %%
stand = []
for kernel in KERNELS:
    bytes_moved, operations = KERNELS[kernel](n, v, h, 2)
    floor = 1e3 * floor_seconds(kernel, "H100", "bf16", n, v, h)
    by = "bytes" if bytes_moved / roofs["H100"][0] * 1e3 >= floor else "operations"
    guess = "–"
    if kernel in LOSSES:
        record = {"kernel": kernel, "dtype": "bf16"}
        guess = round(roofline.predict(record, "H100", n, v, h)["ms"][1], 2)
    stand.append((kernel, bytes_moved / 1e9, by, floor, guess))
columns = ["kernel", "gigabytes", "decided by", "floor [ms]", "model [ms]"]
pd.DataFrame(stand, columns=columns).round(2)

# %% [markdown]
# This is an H100 in bf16, for the shape of `SHAPE`, and **a model: nothing in this table was measured.** The floor is arithmetic. The
# last column is a guess at what the loop of products reaches, from rates fitted to published kernels. For the other kernels such a
# guess needs their machine code, which `klq inspect` compiles.
#
# ## Predict, then measure
#
# Now your machine, with the library's harness: warm-up, errors, turns, products, medians, and peak memory in fresh processes. (On a machine
# with a GPU the same cell measures the GPU, Triton kernels included.) First the prediction, for sizes that take seconds: units as in the
# committed file, memory in proportion to $N V$; it is predicted where it is measured, for the statistics from logits. ($H$ is that of the file: the yardstick grows with it, and what starts from logits does not.)

# %%
device = str(resolve_device("auto"))
sizes = {"logits_stats": Size(1152, 8000, 512), "klq": Size(256, 8000, 512)}
there = table[table["stage"] == "both"].drop_duplicates(["workload", "contender"])
everyone = {w: [c for c in contenders(w, device) if not c.optional] for w in sizes}
keys = [(workload, c.name) for workload in sizes for c in everyone[workload]]
there = there.set_index(["workload", "contender"])
there = there[there.index.isin(keys)]
at = [sizes[workload] for workload, _ in there.index]
scale = [s.n * s.v for s in at] / (there["n"] * there["v"])
memory = (there["memory_mb"] * scale).loc[["logits_stats"]]
predicted = there[["units", "vs_naive"]].assign(memory_mb=memory)
predicted.round(2).astype(object).fillna("–")

# %%
mine = []
for workload, size in sizes.items():
    config = BenchConfig(reps=5, memory=workload == "logits_stats", device=device)
    with float32():
        mine += measure.measure_point(
            workload, size, everyone[workload], config, device, print, lambda: None
        )
mine = pd.DataFrame(mine)
measured = mine[mine["stage"] == "both"].set_index(["workload", "contender"])
shown = ["units", "units_low", "units_high", "vs_naive", "memory_mb"]
measured[shown].round(2).astype(object).fillna("–")

# %%
show(c12.draw_beside(mine, table))

# %% [markdown]
# **Explain** what you see on *your* machine. Three things to look for. Do units agree better than seconds? (Another size changes what stays in
# the cache, and another machine the price of an exponential against that of a product.) Do the whiskers overlap? By (12.5) those of five
# repetitions cover the median with 94 %, if they are independent. Is memory what the arrays say?
# (With a few hundred tokens the fused loss may gain no time at all; what it saves then is memory.)
#
# On the committed machine fusing gained less than 8.5. A processor may well be busy with exponentials while bytes wait. The floor by bytes says
# what can be gained at most, and predicts no time.
#
# Now the ratio with an interval, from twelve repetitions taken in turns. If a curve zigzags, it matters who ran just before: turns show that,
# blocks hide it.

# %%
size, reps = Size(512, 8000, 256), 12
with float32():
    x = make_inputs("logits_stats", size, 0, device)
    gemm = measure.reference_gemm(size, device)
    naive, *_, ours = contenders("logits_stats", device)
    measure.first_runs([naive, ours], x, print, lambda: None)
    times = interleave([naive, ours], x, gemm, reps, lambda: None)

draws = torch.randint(reps, (2000, reps))
show(c12.draw_repetitions(times[naive.name], times[ours.name], draws))

# %% [markdown]
# ## Where does it come from?
#
# A number without its origin cannot be repeated, and cannot be doubted either. The committed file has a twin in JSON (a text format for
# settings and records) that says where it comes from; yours would begin like this:

# %%
print(
    "committed:",
    {k: origin[k] for k in ("command", "torch", "machine", "device", "threads")},
)
print("here:     ", facts(device) | {"threads": torch.get_num_threads()})

# %% [markdown]
# What does the twin *not* say? Which processor it was, what else ran on it, and how warm it was. Units and turns are there because such things
# are never all known.
#
# ## The sentence
#
# All four sentences below are made from the committed file, and every number in them comes from it.

# %%
main = table.drop_duplicates(["workload", "contender", "stage"])
main = main.set_index(["workload", "contender", "stage"])
old, new = (main.loc["klq_ref", who, "both"] for who in ("naive", "ours (torch)"))
print(
    f"ACCEPTED. On {origin['machine']} ({origin['threads']} threads, torch {origin['torch']}, "
    f"{new['dtype']}; N = {new['n']:,}, V = {new['v']:,.0f}, H = {new['h']:.0f}), forward and "
    "backward pass of the KLQ loss with its reference, entropy and KL took "
    f"{new['units']:.2f} matrix products (median of {new['reps']} in turns; {new['units_low']:.2f} to "
    f"{new['units_high']:.2f}) against {old['units']:.2f} ({old['units_low']:.2f} to "
    f"{old['units_high']:.2f}) for the naive code, at a peak of {new['memory_mb']:.0f} MB beyond the "
    f"inputs against {old['memory_mb']:.0f}; errors of the gradient against float64 are "
    f"{new['error_gradient']:.1e} and {old['error_gradient']:.1e}."
)
back = main.loc["klq_ref", "ours (torch)", "backward"]["vs_naive"]
best = main.loc["returns", "ours (torch)", "forward"]["vs_naive"]
print(f"\nREJECTED 1. Our backward pass is {1 / back:,.0f} times as fast.")
print(f"REJECTED 2. Our kernels are up to {1 / best:.0f} times as fast.")
print(
    f"REJECTED 3. The loss takes {new['seconds']:.3f} s instead of {old['seconds']:.3f} s."
)

# %% [markdown]
# **Predict** what is wrong with each, then compare.
#
# <details><summary>Compare</summary>
#
# 1. True, and a trick. The fused loss computes its gradient in the *forward* pass; the backward pass only hands it over. Look at
#    forward alone, and fused is slower than naive. Give forward, backward and both.
# 2. *Up to* is the best of many: here the λ-return, against a Python loop over time, which nobody waits for. Name the operation, or give
#    all of them.
# 3. Three decimals of seconds on an unnamed machine, no spread, no size, no precision, nothing on memory or error. Nobody can repeat it, and
#    tomorrow the same machine would not.
#
# </details>
#
# > **People ask: one row of the committed file beats its limit. Is that not impossible?**
# >
# > Look at the whiskers first: where they reach across the limit, it may be noise, by (12.5). And if they do not? The limit counts products that cannot be avoided; the unit is *one* of them, in one shape. The backward pass has products of
# > other shapes, which can be faster, most of all at small sizes. A unit is a yardstick and no law. Here are the rows:

# %%
below = table[(table["stage"] == "both") & (table["units"] < table["limit"])]
print(
    below[
        ["workload", "n", "v", "contender", "units_low", "units", "units_high", "limit"]
    ].to_string(index=False)
)

# %% [markdown]
# ## Exercises
#
# ### Exercise 12.1 · Repair the benchmark
#
# Write the function that stands at the top again, without its six flaws. It gets a `lab` and a number `reps` (even) of timed repetitions of each, and returns
# fused's time over naive's, forward and backward, as a ratio of medians; or `math.nan` (not a number), if a result is wrong: its relative error against
# `lab.exact(logits)`, by (12.8), is above 1e-4. Each of the two goes first equally often. The check runs it on a
# machine without any trouble, then on machines that each have one trouble, and says which
# flaws are still there and which are repaired; an answer that gets past them meets rarer troubles.
#
# | call | what it does |
# |---|---|
# | `lab.inputs()` | draws logits |
# | `lab.run(name, logits)` | asks for the forward pass of `"naive"` or `"fused"`; returns one number per token, in float32 |
# | `lab.backward(name, logits)` | asks for its backward pass |
# | `lab.exact(logits)` | what `run` should return, in float64 |
# | `lab.synchronize()`, `lab.clock()` | waits until all that was asked for is done; seconds |
#
# <!-- hints 12.1 -->


# %%
def my_benchmark(lab, reps):
    # BEGIN SOLUTION
    logits, seconds = lab.inputs(), {"naive": [], "fused": []}
    exact = lab.exact(logits)

    def once(name):
        lab.synchronize()
        begun = lab.clock()
        result = lab.run(name, logits)
        lab.backward(name, logits)
        lab.synchronize()
        return lab.clock() - begun, result

    for name in seconds:
        _, result = once(name)
        if not (result - exact).norm() <= 1e-4 * exact.norm():
            return math.nan
    for rep in range(reps):
        for name in ("fused", "naive") if rep % 2 else ("naive", "fused"):
            seconds[name].append(once(name)[0])
    return median(seconds["fused"]) / median(seconds["naive"])
    # END SOLUTION


check.exercise("12.1", my_benchmark)

# %% [markdown]
# ### Exercise 12.2 · An interval for a ratio of medians
#
# `naive` and `fused` are the times of $R$ repetitions, [R] each; repetition $i$ of both was taken in the same minute. Row $b$ of `draws` [B, R] says
# which repetitions resample $b$ consists of. Return three numbers: the ratio of medians, fused over naive, and the two ends of its
# 95 % bootstrap interval. Use `Tensor.quantile` for medians and ends. $R$ is even.
#
# <!-- hints 12.2 -->


# %%
def my_interval(naive, fused, draws):
    # BEGIN SOLUTION
    ratio = fused.quantile(0.5) / naive.quantile(0.5)
    again = fused[draws].quantile(0.5, dim=-1) / naive[draws].quantile(0.5, dim=-1)
    return ratio, again.quantile(0.025), again.quantile(0.975)
    # END SOLUTION


check.exercise("12.2", my_interval)

# %% [markdown]
# ### Exercise 12.3 · Seconds from bytes
#
# The naive way runs $K$ kernels one after the other. Row $k$ of `kernels` [K, 3] holds how many arrays of $N V$ numbers it reads, how many it writes, and its operations
# per logit; a number has `size` bytes. The fused kernel does all of these operations, reads two such arrays, and writes none. Return the pair of
# roofline times (naive, fused) at `bandwidth` bytes and `peak` operations per second. A kernel moves bytes while it computes.
#
# <!-- hints 12.3 -->


# %%
def my_seconds(kernels, n, v, size, bandwidth, peak):
    # BEGIN SOLUTION
    reads, writes, operations = (n * v * column for column in kernels.T)
    by_bytes, by_operations = (reads + writes) * size / bandwidth, operations / peak
    fused = max(2 * n * v * size / bandwidth, by_operations.sum().item())
    return torch.maximum(by_bytes, by_operations).sum(), fused
    # END SOLUTION


check.exercise("12.3", my_seconds)

# %% [markdown]
# ### Open question
#
# An abstract says: "Our fused loss is 3.2× faster and uses 83 % less memory (A100, bf16)." You review the paper. What do you ask for, and how would
# you measure it yourself in an afternoon?
#
# *What a good answer contains:* faster than what, and doing the same work, forward *and* backward (2 points); sizes, and how the gain depends on $V$ and $N$
# (1); repetitions, order and spread (1); error against float64 beside that of the baseline (1); memory of what, beyond what (1); a floor to
# compare with (1); an afternoon's plan that takes turns and has a unit (2).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# I ask: against which code (eager, compiled, another fused one)? Does the baseline compute the same statistics, and are both passes in the
# number? For which $N$, $V$, $H$? One size can be chosen; I want the gain against $V$. How many repetitions, in which order, with what range? Is the gradient as
# close to float64 as the baseline's in bf16? Is the 83 % of the peak of the loss or of the training step? Its floor on an A100 is
# known from bytes and products: at what share of it do they arrive, and does 3.2 exceed what (12.11) and (12.12) allow?
#
# In an afternoon: both ways and a matrix product of the same shape, warmed up and checked against float64 on a few rows; twenty repetitions in turns, each
# between two products; medians of units and a bootstrap interval of their ratio; peak memory by the allocator; three sizes of $V$. Then one sentence with all
# of it, or none.
#
# </details>

# %% [markdown]
# ## Remember
#
# Warm up, wait, let both do the same work on the same inputs, take turns, look at the result. Time in products taken before and after (12.1): a steady
# drift cancels (12.2), as it does by turns (12.4), and never by blocks (12.3). Three repetitions cover their median with 75 % if they are independent (12.5), else with less. Errors are against
# float64 and judged beside the naive one's (12.8, 12.9). Bytes bound what can be gained (12.11 to 12.13), and a bound is a model, not a
# measurement. A claim has a machine, a size, a spread, an error and a baseline.
#
# *In the library:* `klq_edu.bench.measure` (`measure_point`, `interleave`, `errors`, `peak_memory`), `klq_edu.bench.roofline`; `klq bench` measures all
# workloads, `klq inspect` has the model's table. *Next:* run `klq bench` on your machine, and write the sentence.

# %%
check.ledger()
