# %% [markdown]
# # 11 · Kernels III: never build the logits
#
# **What does it take to train on a large vocabulary without ever having its logits in memory?**
#
# *After this notebook you can* say what the logits cost before you run out of memory, compute log-probs and gradients from hidden states in
# tiles, say when that is slower, predict from a tile's size whether a GPU (graphics processing unit) can feed it, and read in machine code whether the compiler did what you meant.
#
# *You need* notebooks 09 (programs, masks, running statistics) and 10 (gradients of logits). *Time:* <!-- minutes --> minutes. *Symbols:* $h$ [N, H] hidden states, $w$ [V, H] weight of
# the head, $z = h w^\top$ logits, $y$ sampled tokens, $a$ [N] upstream gradients, $G$ gradient of the logits, $b$ bytes per element, $B_M \times B_N$ a tile of logits and $B_K$ its step along H.
#
# As in notebook 09, kernels run in Triton's interpreter where there is no GPU.

# %%
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from klq_edu.bench.roofline import (
    DEVICES,
    KERNELS,
    SHAPE,
    SHARED,
    floor_seconds,
    predict,
)
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c09_one_pass import Traffic
from klq_edu.course.chapters.c11_never_build_the_logits import (
    MEMORY,
    compiled_tiles,
    draw_tiles,
    linear_bytes,
    lines,
    naive_bytes,
    predictions,
    spent,
)
from klq_kernels import linear_klq_loss, linear_token_stats
from klq_kernels.triton_linear import MatmulTile, linear_stats_kernel, tile

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of masked lanes
check = start("11")
where = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## The wall
#
# A language model ends in a matrix product: hidden states [N, H] times the head's weight [V, H] gives logits [N, V]. The two factors are small, the
# product is not. This is how one trains on the log-probs of sampled tokens without thinking of memory. The softmax is in float32, as it should be.


# %%
def naive(h, w, tokens):
    logp = (h @ w.T).float().log_softmax(-1)
    return logp.gather(-1, tokens[:, None]).sum()


def operands(n, v, size, dtype=torch.float32):
    """Hidden states, weight, tokens."""
    h, w = torch.randn(n, size).to(dtype), torch.randn(v, size).to(dtype)
    return h.requires_grad_(), w.requires_grad_(), torch.randint(v, (n,))


def step(loss, *given):
    loss(*given).backward()


# %% [markdown]
# **Predict.** How many tensors of size [N, V] are there at once, at the worst moment of forward and backward pass? Go through it: the logits, their
# float32 copy, the log-probs; backwards, the gradient of the log-probs (zeros but for one number per row), then the gradient of the logits. The
# backward pass of the log-softmax needs its own result. What is no longer needed is freed at once.
#
# We ask torch's profiler, which sees every allocation, for several sizes, and in bfloat16 too.

# %%
SIZES = [(512, 4096, 64), (512, 8192, 64), (1024, 8192, 32)]
peaks = {
    (dtype, size): spent(step, naive, *operands(*size, dtype)).peak
    for dtype in (torch.float32, torch.bfloat16)
    for size in SIZES
}
for (dtype, (N, V, _)), peak in peaks.items():
    print(
        f"{dtype}, N = {N}, V = {V}: the peak is {peak / (4 * N * V):.3f} · 4NV bytes"
    )

# %% [markdown]
# At the worst moment three are there, each in float32: log-probs, their gradient, the logits' gradient. So, in bfloat16 too,
#
# $$M_{\text{naive}} = 3 \cdot 4\,N V \text{ bytes} \tag{11.1}$$

# %%
for (_, (N, V, _)), peak in peaks.items():
    check.equation("11.1", peak / (N * V), naive_bytes(N, V) / (N * V), tol=1e-4)
print(
    f"8192 tokens, 128,256 in the vocabulary: {naive_bytes(8192, 128_256) / 2**30:.1f} GiB"
)

# %% [markdown]
# > **People ask: does gradient checkpointing not solve this?**
# >
# > It forgets the logits after the forward pass and computes them again in the backward pass, all of them. The worst moment is in the backward pass, and stays. What
# > helps is to compute *few of them at a time*.

# %%
N, V, H = SIZES[0]
given = operands(N, V, H)
again = spent(lambda: checkpoint(naive, *given, use_reentrant=False).backward())
print(f"with checkpointing: {again.peak / (N * V):.1f} bytes per logit, (11.1) says 12")

# %% [markdown]
# `linear_klq_loss` takes hidden states and weight, not logits. A *workspace* holds a chunk of logits, of a size that does not depend on N or V. What
# remains are the gradients, which no way of computing can avoid; in 16 bits, $dW$ is summed in a float32 copy ($[\cdot]$ is 1 where that holds, else 0). The promise, with room for what is computed from the workspace's logits:
#
# $$M_{\text{linear}} \le 4\,\text{workspace} + b\,(N + V)\,H + [b = 2]\;4\,V H \tag{11.2}$$
#
# **Predict.** By which factor do the two peaks grow if the vocabulary doubles? And if $H$ is halved while N doubles? (In the cell below the workspace is 1 MiB.)


# %%
def linear(h, w, tokens, workspace=2**20):
    """The KLQ loss, with arbitrary numbers from elsewhere."""
    other, mask = torch.zeros(3, len(h)), torch.ones(len(h), dtype=torch.bool)
    more = dict(tau=0.1, backend="torch", workspace_bytes=workspace)
    return linear_klq_loss(h, w, tokens, *other.to(h.dtype), mask, **more)


for N, V, H in SIZES:
    given = operands(N, V, H)
    peak = spent(step, linear, *given).peak
    most = linear_bytes(N, V, H, 4, 2**20)
    check.inequality("11.2", peak / 2**20, most / 2**20)
    gradients = 4 * (N + V) * H / 2**20
    print(
        f"N = {N}, V = {V}: {naive_bytes(N, V) / 2**20:.0f} MiB by all logits; "
        f"{peak / 2**20:.1f} MiB from hidden states, {gradients:.1f} of it gradients"
    )

# %% [markdown]
# **Change.** Find the largest batch for your GPU (the workspace is the library's default there). Which two sliders leave the height of the upper dot as it is, and why? The picture counts this loss alone: the rest of the model needs room too.

# %%
explore(MEMORY)

# %% [markdown]
# ## Tiles: the forward pass
#
# Notebook 09 read a row of logits in blocks and kept running statistics, equation (9.3). It never went back to a block. So nobody has to *store* the logits: compute those of a tile
# by a small product, $z_c = h\,w_c^\top$ for a tile $c$ with weight rows $w_c$, fold them into $m$ and $s$, and forget them. With $m' = \max(m, \max z_c)$:
#
# $$s' = e^{m - m'}\,s + \sum_{v \in c} e^{h \cdot w_v - m'}, \qquad \text{and at the end}\quad \log\pi(y) = h\cdot w_y - m - \log s \tag{11.3}$$
#
# The sampled token's logit $h \cdot w_y$ is a product of its own. Looking for $y$ in every tile would cost a comparison per logit.


# %%
def log_probs(h, w, tokens, width):
    """(log π [N], log-normaliser [N]) from tiles of the vocabulary."""
    m, s = h.new_full((len(h),), -1e30), h.new_zeros(len(h))
    for part in w.split(width):
        z = h @ part.T  # [N, width]: all the logits there ever are
        new = torch.maximum(m, z.amax(1))
        s = (m - new).exp() * s + (z - new[:, None]).exp().sum(1)
        m = new
    lse = m + s.log()
    return (h * w[tokens]).sum(1) - lse, lse


N, V, H = 50, 1000, 24
h, w, y = operands(N, V, H, torch.float64)
for width in (1, 64, 1000):
    check.equation(
        "11.3", linear_token_stats(h, w, y).logprob, log_probs(h, w, y, width)[0]
    )

# %% [markdown]
# The library's kernel is that, with a tile of rows as well: each program owns some rows and goes over a span of the vocabulary; for each tile, a loop over H adds up the
# product. You will write its parts in the exercises. Here it runs on a few rows in float32, against float64, and below it stands as it is. Look for the loop over tiles (the one over H is in `_logits`), the tail of the vocabulary (`_until`), and the row number
# in 64 bits.

# %%
f32 = [x.detach().float().to(where) for x in (h, w)]
fused = linear_token_stats(*f32, y.to(where), backend="triton").logprob
off = fused.double().cpu() - linear_token_stats(h, w, y).logprob
print(f"the Triton kernel's log-probs are off by at most {off.abs().max():.0e}")
source(linear_stats_kernel.fn)

# %% [markdown]
# ## Tiles: the backward pass
#
# The loss depends on the log-probs; let $a_n$ be its derivative in the $n$-th. The gradient of the logits then is, tile by tile, with the log-normaliser $\log Z$ kept from the forward pass
# (one number per row):
#
# $$G_{nv} = a_n\,\big(1[v = y_n] - e^{z_{nv} - \log Z_n}\big) \tag{11.4}$$
#
# **Prove.** Differentiate $\log\pi(y) = z_y - \log\sum_v e^{z_v}$ in $z_v$.


# %%
def tile_gradient(h, w, tokens, a, lse, start, width):
    """G of the tokens from `start` on."""
    v = torch.arange(start, min(start + width, len(w)))
    p = (h @ w[v].T - lse[:, None]).exp()
    return a[:, None] * ((v == tokens[:, None]).double() - p)


a = torch.randn(N)
lse = log_probs(h, w, y, 64)[1]
z = (h @ w.T).detach().requires_grad_()  # all of them, to check
(a * z.log_softmax(1).gather(1, y[:, None])[:, 0]).sum().backward()
tiles = [tile_gradient(h, w, y, a, lse, start, 64) for start in range(0, V, 64)]
check.equation("11.4", torch.cat(tiles, 1), z.grad)

# %% [markdown]
# And since $z_c = h\,w_c^\top$, the chain rule needs two more products per tile. The hidden states' gradient collects from all tiles; each tile's rows of the weight get theirs at once, complete:
#
# $$dH = \sum_c G_c\,w_c, \qquad dW_c = G_c^\top h \tag{11.5}$$
#
# **Predict.** A row is masked: its hidden state is NaN (not a number), its $a$ is 0. How many rows of $dH$ and of $dW$ does it spoil? How many if $G$ is set to 0 there? And if $h$ is, too?

# %%
dh = sum(g @ part for g, part in zip(tiles, w.split(64)))
dw = torch.cat([g.T @ h for g in tiles])
for loss in (
    (a * (h @ w.T).log_softmax(1).gather(1, y[:, None])[:, 0]).sum(),
    (a * linear_token_stats(h, w, y, backend="torch").logprob).sum(),
):
    true_dh, true_dw = torch.autograd.grad(loss, (h, w))
    check.equation("11.5", true_dh, dh)
    check.equation("11.5", true_dw, dw)

a[3] = 0.0
bad, here = h.detach().clone(), torch.arange(N)[:, None] == 3
bad[3] = torch.nan
spoilt = torch.cat(
    [tile_gradient(bad, w, y, a, lse, i, 64) for i in range(0, V, 64)], 1
)
zeroed = torch.where(here, 0.0, spoilt)
for case, g, x in (
    ("as it is", spoilt, bad),
    ("G = 0", zeroed, bad),
    ("G = 0, h = 0", zeroed, torch.where(here, 0.0, bad)),
):
    count = [y.isnan().any(1).sum().item() for y in (g @ w, g.T @ x)]
    print(f"{case}: NaN in {count[0]} of {N} rows of dH, in {count[1]} of {V} of dW")

# %% [markdown]
# $0 \cdot \text{NaN}$ is NaN, and $dW$ adds up over all rows. So the library sets masked hidden states to 0 *before* the product.
#
# ## Keep or compute again
#
# Memory has been saved; what was paid? A product of [N, H] and [H, V] takes $2NVH$ operations. The naive way needs one forward and two backward. In tiles, the backward pass must
# compute the logits once more. But a *loss* whose derivative $a_n$ is known as soon as the row's log-prob is can make gradients in the same visit, chunk by chunk of rows, as `linear_klq_loss` does.
#
# **Predict** the three factors of $2NVH$: all logits, tiles, one visit. The profiler counts.


# %%
def in_tiles(h, w, tokens):
    stats = linear_token_stats(h, w, tokens, backend="torch", workspace_bytes=2**20)
    return stats.logprob.sum()


N, V, H = 512, 4096, 64
operations = {
    loss.__name__: spent(step, loss, *operands(N, V, H)).operations
    for loss in (naive, in_tiles, linear)
}
for name, done in operations.items():
    print(f"{name}: {done / (2 * N * V * H):g} · 2NVH operations")

# %% [markdown]
# $$F_{\text{naive}} = 3 \cdot 2NVH, \qquad F_{\text{tiles}} = 4 \cdot 2NVH, \qquad F_{\text{one visit}} = 3 \cdot 2NVH \tag{11.6}$$

# %%
for name, factor in (("naive", 3), ("in_tiles", 4), ("linear", 3)):
    check.equation("11.6", operations[name], factor * 2 * N * V * H)
check.equation("11.6", KERNELS["linear_klq_loss"](N, V, H, 4)[1], 3 * 2 * N * V * H)

# %% [markdown]
# So tiles compute a third more. Are they slower? The naive way pays for memory instead: it moves [N, V] tensors back and forth. We count the bytes per logit, as notebook 09 did, with the backward pass.
# Say $c$ bytes per logit are moved at $B$ bytes a second, and the matrix units do $R$ operations a second. One product more takes $2NVH/R$, the moving $cNV/B$. Both grow with $NV$; they are equal at
#
# $$H^* = \frac{c\,R}{2\,B} \tag{11.7}$$
#
# whatever N and V. Below, computing again is cheaper than moving. **Predict** for an H100, which does about 300 operations in the time of a byte, and $c = 42$: is $H = 4096$ above or below?

# %%
N, V, H = 256, 1000, 64
with Traffic(lambda x: x.nbytes * (x.numel() == N * V)) as moved:
    step(naive, *operands(N, V, H, torch.bfloat16))
c = (moved.read + moved.written) / (N * V)
print(f"naive in bfloat16: {c:g} bytes per logit")
gpu = DEVICES["H100"]
print(f"H100: {gpu.rate('bf16') / gpu.bandwidth:.0f} operations per byte")
N, V = 8192, 128_256
for name, gpu in DEVICES.items():
    even = {}
    for way, per_logit in (("naive", c), ("a fused loss on stored logits", 12.0)):
        even[way] = per_logit * gpu.rate("bf16") / (2 * gpu.bandwidth)
        product = floor_seconds(
            "linear_token_stats, one model", name, "bf16", N, V, even[way]
        )
        visit = floor_seconds("token_stats, one model", name, "bf16", N, V, 1)
        check.equation("11.7", product * 1e3, per_logit / 2 * visit * 1e3)
    print(f"{name}: " + ", ".join(f"H* = {x:.0f} ({way})" for way, x in even.items()))

# %% [markdown]
# The second figure is for the best that *stored* logits allow: written by the product, read for the statistics, read and overwritten by the gradient, read by two products, six times two bytes. Against that,
# computing again loses on most large models. This is a model, of kernels that reach their limits. So the rule: **use the one-visit loss, which computes nothing twice. Compute again where a row's
# gradient depends on other rows (through the ratio of a whole sequence, say), or where memory decides.** With a small vocabulary or a small batch the logits fit, and none of this matters.
#
# ## Why a tile of 64 × 64 is slow
#
# Now the tile's size. On paper a tile is a tile; on a GPU it decides everything. A multiprocessor of an H100 can do $f = 2048$ multiply-adds per clock in bfloat16. A step along H loads $(B_M + B_N)\,B_K$ elements and does $B_M B_N B_K$
# multiply-adds: the *intensity* of a tile is $B_M B_N/(B_M + B_N)$ per element. To keep the matrix units busy, per clock there must arrive
#
# $$\beta_{\text{L2}} = f\,b\;\frac{B_M + B_N}{B_M B_N} \text{ bytes} \tag{11.8}$$
#
# from the L2 cache, which all multiprocessors share. **Predict** it for 64 × 64 with $b = 2$. The L2 of an H100 delivers something between 25 and 38 bytes per clock to each multiprocessor (the first by micro-benchmarks, the second by what published products reach): which share of its speed can this tile reach at best? And 128 × 256?
#
# We compile the library's kernel for an H100 with three tiles, here, without one: Triton and the assembler do not need the GPU. They need a process without the interpreter, hence the helper. What is counted below is read from the machine code.

# %%
own = tile("sm_90", torch.bfloat16, "one")
TILES = [MatmulTile(64, 64, 64, warps=8, stages=3), own, own._replace(warps=4)]
RECORDS = compiled_tiles(*TILES)
small, library, spilling = RECORDS
f, b = DEVICES["H100"].fma, 2
print(f"{f} multiply-adds per clock, and bytes per clock:")
for t, record in zip(TILES, RECORDS):
    needed = predict(record, "H100", *SHAPE)["l2_needed"]
    check.equation("11.8", needed, f * b * (t.rows + t.vocab) / (t.rows * t.vocab))
    low, high = (x / needed for x in DEVICES["H100"].l2)
    print(f"{record['tile']}: needs {needed:g}, may reach {low:.0%} to {high:.0%}")

# %% [markdown]
# The small tile cannot get past a third of the speed, before anything else goes wrong. The wide one may.

# %%
shapes = [(32, 32), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
needed = {
    name: [DEVICES[name].fma * b * (m + n) / (m * n) for m, n in shapes]
    for name in ("H100", "A100", "B200")
}
show(draw_tiles(shapes, needed, DEVICES["H100"].l2, SHARED))

# %% [markdown]
# Something else goes wrong. From L2 the operands go to *shared memory*, 128 bytes per clock, and from there to the matrix units. An H100's matrix instruction, `wgmma`, multiplies 64 rows by $n$ columns for a group of
# four warps (a warp is 32 threads), and reads both operands from shared memory: $64 + n$ rows of them. Eight warps on 64 × 64 are two groups that split the columns: $n = 32$, and the 64 rows of $h$ are read twice. With $q$ such products per step,
#
# $$\beta_{\text{shared}} = f\,b\;\frac{q\,(64 + n) + B_M + B_N}{B_M B_N} \text{ bytes}, \qquad q = \frac{B_M B_N}{64\,n} \tag{11.9}$$
#
# The second part is the writing of what came from L2. **Predict** for $n = 32$: which share of the matrix units' speed is left, at 128 bytes per clock?

# %%
for t, record in zip(TILES, RECORDS):
    (instruction,) = record["matrix"]  # such as HGMMA.64x32x16.F32.BF16
    n = int(instruction.split("x")[1])
    q = t.rows * t.vocab / (64 * n)
    said = predict(record, "H100", *SHAPE)
    typed = f * b * (q * (64 + n) + t.rows + t.vocab) / (t.rows * t.vocab)
    check.equation("11.9", said["shared_needed"], typed)
    print(
        f"{record['tile']}: {instruction}, {typed:g} bytes, so at most {SHARED / typed:.0%}"
    )

# %% [markdown]
# So why not larger still? Because a tile must fit. Its operands wait in shared memory, in $S$ *stages*: while one is multiplied, the next are on their way. (Where the hardware copies whole tiles, a barrier of 8 bytes per stage is added.) An H100 has 227 KiB for a block:
#
# $$\sigma = S\,\big[(B_M + B_N)\,B_K\,b + 8\,[\text{descriptors}]\big] \le 232{,}448 \tag{11.10}$$

# %%
for t, record in zip(TILES, RECORDS):
    sigma = t.stages * ((t.rows + t.vocab) * t.hidden * b + 8 * t.descriptors)
    check.equation("11.10", record["shared_bytes"], sigma)
    check.inequality("11.10", sigma / 1024, record["shared_limit"] / 1024)
    print(
        f"{record['tile']}: {sigma / 1024:.0f} of {record['shared_limit'] / 1024:g} KiB"
    )

# %% [markdown]
# And the sums stay in *registers*: one float32 each, spread over the threads. A thread has 255 registers, a multiprocessor 65,536 (they are given out by eights per thread), 228 KiB of shared memory (1 KiB of it taken by each block) and room for 2048 threads. With $T$ threads, of $r$ registers each,
# it holds so many blocks at a time:
#
# $$A = \frac{B_M B_N}{T} < r \le 255, \qquad \text{blocks} = \min\left(\left\lfloor\frac{65536}{8\lceil r/8\rceil\,T}\right\rfloor, \left\lfloor\frac{233472}{\sigma + 1024}\right\rfloor, \left\lfloor\frac{2048}{T}\right\rfloor\right) \tag{11.11}$$
#
# **Predict** $A$ for the three tiles. One of them cannot hold its sums: which? What will the compiler do?

# %%
for t, record in zip(TILES, RECORDS):
    r, T, sigma = record["registers"], 32 * t.warps, record["shared_bytes"]
    blocks = min(65536 // (-(-r // 8) * 8 * T), 233_472 // (sigma + 1024), 2048 // T)
    check.equation("11.11", record["work"]["blocks"], blocks)
    fits = t.rows * t.vocab / T < 255
    if fits:
        check.inequality("11.11", t.rows * t.vocab / T, r)
    assert fits == (record["spill_bytes"] == 0)
    print(
        f"{record['tile']}: A = {t.rows * t.vocab // T}, {r} registers, "
        f"blocks: {blocks}, {record['spill_bytes']} bytes spilled"
    )

# %% [markdown]
# Several blocks at a time hide each other's waiting: that is *occupancy*. The small tile has more of it and is slower all the same: another block can fill a wait, but not widen a pipe that is full. The large tile has one block, and hides its loads by stages instead. And 256 × 256, which the figure likes, has as many sums as a multiprocessor has registers.
#
# Put together: **a model, not a measurement**. It takes the slowest of matrix units, L2, shared memory and instructions per step (`SHAPE`: N = 8192, V = 128,256, H = 4096). It only counts the instructions of a spill, not the waiting for it, so believe its last row least. Where this notebook finds a GPU, it measures.

# %%
predictions(RECORDS, [predict(record, "H100", *SHAPE) for record in RECORDS])

# %%
if where == "cuda":
    h, w, y = (x.detach().to("cuda") for x in operands(*SHAPE, torch.bfloat16))
    for backend in ("triton", "torch"):
        with torch.no_grad():
            ms = triton.testing.do_bench(
                lambda b=backend: linear_token_stats(h, w, y, backend=b)
            )
        print(f"{backend}: {ms:.1f} ms measured")
else:
    print("no GPU here, so nothing is measured: the table above stays a model")

# %% [markdown]
# ## Read the machine code
#
# A kernel passes through several languages. *PTX* (parallel thread execution) is portable assembly; it has as many registers as one likes. An assembler turns it into the GPU's own instructions, *SASS* (streaming assembler), with 255 registers per thread and no more.
# Three things are worth looking for.
#
# **A wide load.** A thread that fetches 16 bytes at a time needs an eighth of the instructions of one that fetches a bfloat16. The small tile copies 16 bytes (`0x10`) from global to shared memory without stopping at a register. In SASS the `.128` are bits.

# %%
wide = lines(small["ptx"], "cp.async.cg.shared.global", 2)
wide += lines(small["sass"], "LDGSTS.E.BYPASS.128", 2)
print(*wide, sep="\n")
assert len(wide) == 4 and "0x10" in wide[0] and small["loads"]["16"] > 0

# %% [markdown]
# The library's tile has none of these: there the hardware's copy engine loads whole tiles, one instruction for the block (`UTMALDG`). Where a load should be wide and is not, the compiler could not prove that addresses are multiples of 16 bytes: look at strides and offsets.
#
# **A matrix instruction.** `wgmma` in PTX, `HGMMA` in SASS. If it is missing, the product runs on ordinary units.

# %%
matrix = lines(library["ptx"], "wgmma.mma_async", 1) + lines(
    library["sass"], "HGMMA", 2
)
engine = lines(library["sass"], "UTMALDG", 2)
print(*matrix, *engine, sep="\n")
assert len(matrix) == 3 and len(engine) == 2 and "m64n256k16" in matrix[0]

# %% [markdown]
# **A spill.** Four warps on 128 × 256: by (11.11) a thread would need 256 registers for its sums alone. What does not fit goes to *local memory*, which is local in name only: it lies in the GPU's main memory, behind caches. `STL` stores, `LDL` loads.

# %%
spill = lines(spilling["sass"], "STL", 2) + lines(spilling["sass"], "LDL", 2)
print(*spill, sep="\n")
print(
    f"{spilling['local_accesses']} accesses, {library['local_accesses']} in the library's tile"
)
assert len(spill) == 4 and spilling["local_accesses"] > library["local_accesses"] == 0
assert not lines(spilling["ptx"], "st.local"), "PTX does not show it"

# %% [markdown]
# **Change.** Compile a tile of your own, `compiled_tiles([128, 128, 64, 8, 4, True, 1])`: predict its bytes, registers and blocks first. `klq inspect` does this for every kernel and four GPUs, and fails if one spills.

# %% [markdown]
# ## Puzzles
#
# As in notebook 09: the launch is given, the kernel is yours. It runs in a process of its own, on ragged sizes, on rows that lie apart, with NaN wherever it has no business. All tensors are float32 unless said otherwise. Give every masked load an `other`: the interpreter puts 0 there, a GPU anything. `tl.dot` wants sides of at least 16, and on a GPU rounds float32 to
# fewer digits unless it is told `input_precision="ieee"`. And mind the offset of a row: 262,144 tokens of 8192 hidden sizes each are $2^{31}$ elements: the row after them starts at an offset that a signed 32-bit number does not have. (Not checked: it needs gigabytes.)
#
# ### Exercise 11.1 · A product in tiles
#
# `hidden` [N, H] and `weight` [V, H]. Return `hidden` times `weight` transposed, [N, V], a tile of 16 × 16 per program, H in steps of 16. None of the sizes is a multiple of 16.
#
# <!-- hints 11.1 -->


# %%
@triton.jit
def product_kernel(HIDDEN, WEIGHT, OUT, N, V, H, h_row, w_row, BLOCK: tl.constexpr):
    # BEGIN SOLUTION
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, H, BLOCK):
        d = first + tl.arange(0, BLOCK)
        inside = (d < H)[None, :]
        at_h = row.to(tl.int64)[:, None] * h_row + d[None, :]
        at_w = token.to(tl.int64)[:, None] * w_row + d[None, :]
        h = tl.load(HIDDEN + at_h, mask=(row < N)[:, None] & inside, other=0.0)
        w = tl.load(WEIGHT + at_w, mask=(token < V)[:, None] & inside, other=0.0)
        total += tl.dot(h, w.T, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * V + token[None, :]
    tl.store(OUT + place, total, mask=(row < N)[:, None] & (token < V)[None, :])
    # END SOLUTION


def my_product(hidden, weight):
    (N, H), V = hidden.shape, len(weight)
    out = hidden.new_empty(N, V)
    grid = (triton.cdiv(N, 16), triton.cdiv(V, 16))
    product_kernel[grid](
        hidden, weight, out, N, V, H, hidden.stride(0), weight.stride(0), BLOCK=16
    )
    return out


check.exercise("11.1", my_product)

# %% [markdown]
# ### Exercise 11.2 · The normaliser without logits
#
# `hidden` [N, H] and `weight` [V, H] with H at most 32, which one block holds. Return $\log Z$ [N] of each row. A program owns 16 rows and goes over the vocabulary in tiles of 16 tokens; no logit is stored. Some rows have logits near −300, some near 300, and they may rise or fall by 150 from one tile to the next.
#
# <!-- hints 11.2 -->


# %%
@triton.jit
def normaliser_kernel(
    HIDDEN,
    WEIGHT,
    OUT,
    N,
    V,
    H,
    h_row,
    w_row,
    BLOCK: tl.constexpr,
    HIDDENS: tl.constexpr,
):
    # BEGIN SOLUTION
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HIDDENS)
    inside = (d < H)[None, :]
    at_h = row.to(tl.int64)[:, None] * h_row + d[None, :]
    h = tl.load(HIDDEN + at_h, mask=(row < N)[:, None] & inside, other=0.0)
    m = tl.full([BLOCK], -1e30, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at_w = token.to(tl.int64)[:, None] * w_row + d[None, :]
        w = tl.load(WEIGHT + at_w, mask=(token < V)[:, None] & inside, other=0.0)
        z = tl.dot(h, w.T, input_precision="ieee")
        z = tl.where((token < V)[None, :], z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
    tl.store(OUT + row, m + tl.log(s), mask=row < N)
    # END SOLUTION


def my_log_normaliser(hidden, weight):
    (N, H), V = hidden.shape, len(weight)
    out = hidden.new_empty(N)
    strides = hidden.stride(0), weight.stride(0)
    normaliser_kernel[(triton.cdiv(N, 16),)](
        hidden, weight, out, N, V, H, *strides, BLOCK=16, HIDDENS=32
    )
    return out


check.exercise("11.2", my_log_normaliser)

# %% [markdown]
# ### Exercise 11.3 · The gradient of the hidden states, tile by tile
#
# `hidden` [N, H], `weight` [V, H], `tokens` [N] int64, `lse` [N] with each row's $\log Z$, `a` [N], and `mask` [N], boolean. Return $dH$ [N, H] of $\sum_n a_n \log\pi(y_n)$ by (11.4) and (11.5), and 0 in rows where the mask is False: there everything is NaN and the token is −100. Sizes as before.
#
# <!-- hints 11.3 -->


# %%
@triton.jit
def gradient_kernel(
    HIDDEN, WEIGHT, TOKENS, LSE, A, MASK, OUT, N, V, H, h_row, w_row,
    BLOCK: tl.constexpr, HIDDENS: tl.constexpr,
):  # fmt: skip
    # BEGIN SOLUTION
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HIDDENS)
    inside = (d < H)[None, :]
    live = tl.load(MASK + row, mask=row < N, other=0) != 0
    at_h = row.to(tl.int64)[:, None] * h_row + d[None, :]
    h = tl.load(HIDDEN + at_h, mask=live[:, None] & inside, other=0.0)
    chosen = tl.load(TOKENS + row, mask=live, other=0)
    lse = tl.load(LSE + row, mask=live, other=0.0)
    a = tl.load(A + row, mask=live, other=0.0)
    total = tl.zeros([BLOCK, HIDDENS], tl.float32)
    for first in range(0, V, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at_w = token.to(tl.int64)[:, None] * w_row + d[None, :]
        w = tl.load(WEIGHT + at_w, mask=(token < V)[:, None] & inside, other=0.0)
        z = tl.dot(h, w.T, input_precision="ieee")
        z = tl.where((token < V)[None, :], z, float("-inf"))
        p = tl.exp(z - lse[:, None])
        hot = tl.where(token[None, :] == chosen[:, None], 1.0, 0.0)
        g = a[:, None] * (hot - p)
        total += tl.dot(g, w, input_precision="ieee")
    total = tl.where(live[:, None], total, 0.0)
    place = row.to(tl.int64)[:, None] * H + d[None, :]
    tl.store(OUT + place, total, mask=(row < N)[:, None] & inside)
    # END SOLUTION


def my_hidden_gradient(hidden, weight, tokens, lse, a, mask):
    (N, H), V = hidden.shape, len(weight)
    out = hidden.new_empty(N, H)
    strides = hidden.stride(0), weight.stride(0)
    gradient_kernel[(triton.cdiv(N, 16),)](
        hidden,
        weight,
        tokens,
        lse,
        a,
        mask,
        out,
        N,
        V,
        H,
        *strides,
        BLOCK=16,
        HIDDENS=32,
    )
    return out


check.exercise("11.3", my_hidden_gradient)

# %% [markdown]
# ### Open question
#
# Your model has a vocabulary of 32,000 and a hidden size of 8192; you train on 4096 tokens at a time, on a GPU with 80 gigabytes of which 20 are free. A colleague wants to replace the naive loss by a kernel that recomputes logits tile by tile "because it is the state of the art". What do you say, and what would you measure?
#
# *What a good answer contains:* the memory of the naive way from (11.1), and that it fits (1 point); that recomputation costs a product more and, by (11.7), with such an H hardly wins in time (2); that a loss in one visit costs no product more, so it is the better
# candidate (1); a measurement of time *and* peak memory of a whole step, at the batch that memory then allows (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# By (11.1) the naive way peaks at 12 · 4096 · 32,000 bytes (the next cell), a small part of the 20 gigabytes that are free. Memory is no reason. Time: recomputing adds one product to three, and by (11.7) an H of 8192 lies above the break-even even of the naive way on an H100; a tile that does not reach the matrix
# units' full speed makes it worse. A loss in one visit, with three products, saves the moving of logits and computes nothing twice, so I would try that first. I would measure a whole training step: median time over interleaved runs, and peak
# memory in a fresh process; then once more at the largest batch that each allows, per token. If the rest of the model dominates the step, I would leave it.
#
# </details>

# %% tags=["solution"]
print(f"{naive_bytes(4096, 32_000) / 1e9:.1f} gigabytes")

# %% [markdown]
# ## Remember
#
# All logits with their gradient cost 12 bytes each (11.1), whatever the precision of the model; from hidden states a workspace and the gradients remain (11.2). Forward, a tile's logits are folded into running statistics (11.3); backward, $G$ comes from one kept number per row (11.4) and
# two products (11.5). Computing again costs a third more operations, one visit costs none (11.6), and H decides what is faster (11.7). A tile is as good as its bytes per clock, from L2 (11.8) and from shared memory (11.9), and as large as shared memory (11.10) and registers (11.11) allow. Read the SASS: wide loads, matrix
# instructions, no spills.
#
# *In the library:* `klq_kernels.linear_token_stats` and `linear_klq_loss`, `klq_kernels.triton_linear` (the kernel and its table of tiles), `klq_kernels.torch_linear` (chunks and gradients), `klq_kernels.offline` and `klq inspect` (machine code), `klq_edu.bench.roofline` (the model). *Next:* what all of this is for, a training run.

# %%
check.ledger()
