# %% [markdown]
# # 10 · Kernels II: backwards, and a scan
#
# **How does one gradient kernel serve every loss, and how does a recursion, in which each step waits for the next, run in
# parallel?**
#
# *After this notebook you can* derive the gradient of log-prob, entropy and Kullback–Leibler divergence (KL) in the logits
# as one formula; say which numbers a forward pass must keep for it, and count the bytes; take KLQ's loss and its gradient
# in one go (KLQ is KL-regularised Q-learning); write the λ-returns as a scan; and say how wrong a sum becomes in half precision.
#
# *You need* notebooks 05 (λ-returns, and their maps), 06 (the KLQ loss) and 09 (kernels in Triton for a graphics processing unit, GPU; the
# maximum $m$ and the sum $s$ of a row). *Time:* <!-- minutes --> minutes. *Symbols:* $z$, $r$ a row of logits of policy and
# reference, $V$ numbers each (or $V(s)$, a value: the brackets tell); $\kappa = 1/\text{temperature}$; $p = \text{softmax}(\kappa z)$, $q$ likewise of $r$; $y$ the token
# that was sampled; $\ell = \log p_y$ its log-prob; $H$ entropy of $p$; $D$ the KL $D(p\|q)$; $N$ rows; $T$ tokens of a completion.
#
# Without a GPU, kernels run in Triton's interpreter, as in notebook 09: slow, and right or wrong in the same places.

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import triton
import triton.language as tl

from klq_edu.bench.roofline import KERNELS, floor_seconds
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c10_backwards_and_scan import (
    SCAN,
    brent_kung,
    draw_sums,
    hillis_steele,
    pairwise_sum,
    run_scan,
    running_sum,
    traffic,
)
from klq_kernels import (
    lambda_returns,
    logits_klq_loss,
    token_stats,
    torch_logits,
    triton_logits,
)
from klq_kernels.loss import klq_terms
from klq_kernels.reference import klq_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
check = start("10")

# %% [markdown]
# ## One derivative for everything
#
# A loss on a language model looks at a row of logits through three numbers: the log-prob of the token, the entropy, the
# KL. We could derive three gradients and write three kernels. But all three are functions of the probabilities $p$, and
# those depend on the logits in one way only. Raise $z_v$ a little: $p_v$ grows, and all others shrink to make room:
#
# $$\frac{\partial p_u}{\partial z_v} = \kappa\,p_u\left(1[u=v] - p_v\right) \tag{10.1}$$

# %%
N, V, temperature = 5, 16, 0.7
kappa = 1 / temperature
z, r = torch.randn(N, V), torch.randn(N, V)
p = torch.softmax(kappa * z, -1)

auto = torch.autograd.functional.jacobian(lambda z: torch.softmax(kappa * z, -1), z[0])
check.equation("10.1", auto, kappa * (torch.diag(p[0]) - torch.outer(p[0], p[0])))

# %% [markdown]
# Now any function $f$ of the probabilities. Write $\phi_u$ for its slope $\partial f/\partial p_u$, and insert (10.1) into the chain rule
# $\sum_u \phi_u\,\partial p_u/\partial z_v$. The one-hot leaves $\kappa p_v \phi_v$, the rest is $-\kappa p_v$ times a sum that is the same for all $v$:
#
# $$\frac{\partial f}{\partial z_v} = \kappa\,p_v\left(\phi_v - \sum_u p_u \phi_u\right) \tag{10.2}$$
#
# In words: take the slope, subtract its mean under $p$, weigh by $p$. We try it on a function that nobody needs.

# %%
x = z.clone().requires_grad_()
auto = torch.autograd.grad((torch.softmax(kappa * x, -1) ** 3).sum(), x)[0]
slope = 3 * p**2
mean = (p * slope).sum(-1, keepdim=True)
check.equation("10.2", auto, kappa * p * (slope - mean))

# %% [markdown]
# For our three numbers the means are easy, since they are made of the numbers themselves:
#
# | $f$ | $\phi_v$ | its mean under $p$ | $\partial f/\partial z_v$ |
# |---|---|---|---|
# | $\ell = \log p_y$ | $1[v=y]/p_y$ | $1$ | $\kappa\,(1[v=y] - p_v)$ |
# | $H = -\sum_u p_u\log p_u$ | $-\log p_v - 1$ | $H - 1$ | $-\kappa\,p_v\,(\log p_v + H)$ |
# | $D = \sum_u p_u\log(p_u/q_u)$ | $\log(p_v/q_v) + 1$ | $D + 1$ | $\kappa\,p_v\,(\log(p_v/q_v) - D)$ |
#
# A loss $L$ hands each row three numbers back, its *upstream gradients* $g_\ell = \partial L/\partial\ell$, $g_H = \partial L/\partial H$ and $g_D = \partial L/\partial D$.
# Add up:
#
# $$\frac{\partial L}{\partial z_v} = \kappa\left\{g_\ell\,1[v=y] + p_v\left[-g_\ell - g_H\,(\log p_v + H) + g_D\left(\log\frac{p_v}{q_v} - D\right)\right]\right\} \tag{10.3}$$
#
# **Predict.** For which $p$ is each of the three gradients zero in the whole row?
#
# <details><summary>Compare</summary>
#
# That of $\ell$ where $p_y = 1$: there is nothing left to gain. That of $H$ where $\log p_v = -H$ for every token with $p_v > 0$, so on a
# uniform distribution over some of the tokens. That of $D$ where $\log(p_v/q_v)$ is the same for all of them, as at $p = q$.
#
# </details>
#
# The check has four independent routes: autograd through the definition; the library's fused gradient; finite differences, which know
# no calculus; and the Triton kernel, which computes in float32 (fp32, single precision: 24 significant bits).

# %%
y, g = torch.randint(V, (N,)), torch.randn(3, N)  # every row has its own g


def row_losses(z, r, y, g, **options):
    """One number per row, from its three statistics."""
    stats = token_stats(z, y, r, temperature=temperature, **options)
    return g[0] * stats.logprob + g[1] * stats.entropy + g[2] * stats.kl


def gradient(z, r, y, g, **options):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(row_losses(z, r, y, g, **options).sum(), z)[0]


def typed(z, r, y, g):
    logp, logq = torch.log_softmax(kappa * z, -1), torch.log_softmax(kappa * r, -1)
    p, one_hot = logp.exp(), torch.nn.functional.one_hot(y, z.shape[1])
    H, D = -(p * logp).sum(-1), (p * (logp - logq)).sum(-1)
    H, D, g_l, g_H, g_D = (x[:, None] for x in (H, D, *g))  # one per row
    weight = -g_l - g_H * (logp + H) + g_D * (logp - logq - D)
    return kappa * (g_l * one_hot + p * weight)


by_hand = typed(z, r, y, g)
for backend in ("reference", "torch"):
    check.equation("10.3", gradient(z, r, y, g, backend=backend), by_hand)

h = 1e-5
differences = [
    (row_losses(z + x, r, y, g) - row_losses(z - x, r, y, g)) / (2 * h)
    for x in h * torch.eye(V)
]
check.equation("10.3", torch.stack(differences, 1), by_hand, tol=1e-8)

single = [x.to(device, torch.float32) for x in (z, r, g)]
kernel = gradient(*single[:2], y.to(device), single[2], backend="triton")
error = (kernel.double().cpu() - by_hand).abs().max()
print(f"Triton's kernel, in fp32: largest error {error:.1g}")
check.inequality("10.3", error, 1e-5)

# %% [markdown]
# > **People ask: the loss is a mean, so every upstream gradient is $1/N$. Why carry one per row?**
# >
# > Because losses change. A weight per token, a clip that binds for some tokens, an entropy bonus, a mask: each makes the
# > rows' factors differ, and a kernel that took them for equal is wrong without an error message. Published kernels have
# > had this very bug; it hides as long as tests call `.mean().backward()`. Test with a random upstream gradient in every row.
#
# So a loss needs no kernel of its own. It is arithmetic on a few numbers per row, in front of *one* kernel for (10.3).
#
# There is a test of such a kernel that costs one line. Add the same number to all logits of a row: $p$ does not change, so
# no statistic changes. What does that say about the sum of a row's gradient?
#
# $$\sum_v \frac{\partial L}{\partial z_v} = 0 \tag{10.4}$$

# %%
check.equation("10.4", gradient(z, r, y, g, backend="torch").sum(1), torch.zeros(N))

# %% [markdown]
# ## Where the formula breaks, and the gradient does not
#
# A logit of $-\infty$ forbids a token (a grammar, a pruned vocabulary). Its $p$ is 0, so it contributes nothing. Computed as it is
# written, (10.3) says something else there.
#
# **Predict.** What do the typed formula and autograd through a plain softmax say at a forbidden token?

# %%
forbidden = (y[0] + 1) % V
z_bar, r_bar = z.clone(), r.clone()
z_bar[0, forbidden] = r_bar[0, forbidden] = -torch.inf
x = z_bar.clone().requires_grad_()
logp = torch.log_softmax(kappa * x, -1)
entropy = -(logp.exp() * logp).sum(-1)
plain = torch.autograd.grad(entropy.sum(), x)[0]
fused = gradient(z_bar, r_bar, y, g, backend="torch")
print("typed formula:", typed(z_bar, r_bar, y, g)[0, forbidden].item())
print("plain autograd, of the entropy alone:", plain[0, forbidden].item())
print("the library:", fused[0, forbidden].abs().item())

# %% [markdown]
# $0 \cdot \infty$ is NaN, not a number, and one NaN spoils the row, then the weights. The cure is to make $\log p$ and $\log q$ *finite* before $p$ meets them: the
# library replaces $-\infty$ by $-10^{30}$, and 0 times that is 0. (Choosing 0 with `where` *afterwards* helps a kernel that writes its
# own gradient, but not autograd: the NaN is made again on the way back.) How do we know that what the library says is right? A
# forbidden token must be as good as none: in the vocabulary without it, the other gradients are the same.
#
# Two neighbours of this case: if $q = 0$ where $p > 0$, the KL is infinite, and the library lets no gradient through it (as if $g_D = 0$ in that row). And
# masked rows may hold anything, so they are not even read.

# %%
keep = torch.arange(V) != forbidden
without = y[:1] - (y[:1] > forbidden).long()  # the token's number in that vocabulary
smaller = typed(z_bar[:1, keep], r_bar[:1, keep], without, g[:, :1])
check.equation("10.3", fused[0, keep], smaller[0])
check.equation("10.3", fused[1:], by_hand[1:])

r_zero, g_zero = r.clone(), g.clone()
r_zero[1, 0], g_zero[2, 1] = -torch.inf, 0.0
infinite = gradient(z, r_zero, y, g, backend="torch")
check.equation("10.3", infinite, typed(z, r, y, g_zero))

mask = torch.arange(N) != 2
z_nan = torch.where(mask[:, None], z, torch.nan)
masked = gradient(z_nan, r, y, g, mask=mask, backend="torch")
check.equation("10.3", masked, torch.where(mask[:, None], by_hand, 0.0))

# %% [markdown]
# ## What must be kept
#
# Look at (10.3) from the kernel's side. $z$ and $r$ are still in memory. $H$ and $D$ are one number per row. The upstream gradients are one number per row each. What
# is missing is $p$, and for that the forward pass needs to keep two numbers per row, those of (9.4): the largest logit $m$, and $\log s$ with
# $s = \sum_u e^{\kappa(z_u - m)}$.
#
# $$p_v = e^{\,\kappa(z_v - m) - \log s} \tag{10.5}$$
#
# (Why not the one number $\kappa m + \log s$? With logits near 300 it would be rounded to steps of 3e-5 in fp32, and $p$ with it. Two numbers keep the
# large part and the fine part apart. The library's `shift` and `lse` are such a pair.)

# %%
kept = torch_logits.logits_stats(z, y, r, temperature, torch.ones(N, dtype=torch.bool))
again = ((z - kept.shift[:, None]) * kappa - kept.lse[:, None]).exp()
check.equation("10.5", again, p)
names = [name for name, x in kept._asdict().items() if len(x) == N]
print("kept per row:", ", ".join(names))
near = torch.tensor([300.0, torch.inf], dtype=torch.float32)
print(f"from 300 to the next number in fp32: {near[0].nextafter(near[1]) - 300:.1g}")

# %% [markdown]
# To compute $p$ again costs one exponential per logit. To have stored it would cost a write and a read of $V$ numbers, and on a GPU
# arithmetic is cheap and memory is not. FlashAttention made that trade famous. Here is the kernel; find (10.3) in it: `A`, `B`, `C` are the
# three upstream gradients, `weight` is what is the same in all of the row, and the loads of `Z` and `R` are the only large ones. (Powers are of 2, not of e,
# because that is what the hardware has: `LOG2E` and `LN2` translate.) In (10.3)'s words: `a`, `b`, `c` are $g_\ell$, $g_H$, $g_D$ of this row; `x` is $\log p_v$ in base
# 2, so `tl.exp2(x)` is $p_v$; the kernel's `g` is $\kappa$ times the square bracket: first `weight`, then the part of $\log p_v$, then that of the two rows of logits.

# %%
source(triton_logits.grad_kernel.fn)

# %% [markdown]
# **Predict, then count.** Below is what one writes in PyTorch, with the [N, V] tensors that each line reads and writes (notebook 09's passes). On the way
# back, autograd needs what the forward pass computed. How many [N, V] tensors does it *keep*, beside $z$ and $r$? (A product keeps
# its two factors; `log_softmax` and `exp` keep their result; a difference keeps nothing.) And how many must a kernel move at least, that reads
# both rows to get the statistics, and both again to write a gradient? The cell also counts what forward and backward pass move.
#
# <details><summary>Compare</summary>
#
# Kept are 3: $\log p$, $p$ and $\log p - \log q$. ($\log q$ is not: the reference asks for no gradient.) The kernel moves 2 for the statistics and 3 for the gradient: both rows again, and what it writes.
#
# </details>


# %%
def naive(z, r):
    logp = torch.log_softmax(z, -1)  # reads 1, writes 1
    logq = torch.log_softmax(r, -1)  # reads 1, writes 1
    p = logp.exp()  # reads 1, writes 1
    H = -(p * logp).sum(-1)  # reads 2, writes 1; reads 1
    D = (p * (logp - logq)).sum(-1)  # reads 2, writes 1; reads 2, writes 1; reads 1
    logprob = logp.gather(-1, y[:, None]).squeeze(-1)  # reads N numbers
    return (g[0] * logprob + g[1] * H + g[2] * D).sum()


def one_visit(z, r):
    stats = token_stats(z, y, r, backend="torch")
    return (g[0] * stats.logprob + g[1] * stats.entropy + g[2] * stats.kl).sum()


table = traffic({"naive": naive, "fused": one_visit}, z, r)
table["moved"] = table.iloc[:, 1:].sum(axis=1)
table.T

# %% [markdown]
# This is a count, not a measurement: every operation was watched, and a tensor counted each time it was read or written, as if
# no cache kept it for the next operation. On a GPU, with rows of a hundred thousand logits, that is close to what happens,
# and such operations take as long as their bytes take. With numbers of $c$ bytes the fused pair moves
#
# $$M = 2\,N V c + 3\,N V c = 5\,N V c \tag{10.6}$$
#
# bytes: to get the statistics it reads $z$ and $r$; to get the gradient it reads both again, and writes $\partial L/\partial z$.

# %%
c = z.element_size()
shapes = (N, V, 0, c)
moved = (
    KERNELS["token_stats"](*shapes)[0] + KERNELS["token_stats, gradient"](*shapes)[0]
)
check.equation("10.6", moved, 5.0 * N * V * c)
check.equation("10.6", float(table["moved"]["fused"] * N * V * c), 5.0 * N * V * c)

naive_moved, fused_moved = table["moved"]["naive"], table["moved"]["fused"]
rows, vocab = 8192, 128_256
floor = sum(
    floor_seconds(k, "H100", "bf16", rows, vocab, 0)
    for k in ("token_stats", "token_stats, gradient")
)
print(f"naive moves {naive_moved / fused_moved:.1f} times as much as fused")
print(f"{rows} rows of {vocab} logits: what naive keeps, in fp32, is", end=" ")
print(f"{table['kept']['naive'] * rows * vocab * 4 / 1e9:.1f} GB; fused:", end=" ")
print(f"{len(names) * rows * 4 / 1e6:.2f} MB")
print(
    f"the model's floor for fused, on a GPU of type H100, in bf16: {1e3 * floor:.1f} ms"
)

# %% [markdown]
# **Change.** Take the line of the KL out of `naive` (and $D$ out of its sum). Predict the six numbers of its column before you run the cell again.
#
# ## Loss and gradient in one go
#
# Usually a gradient has to wait. The backward pass starts when the whole loss is known, and by then the logits have left the cache. Must
# KLQ wait? Write (6.4) once more, $L = \frac1N\sum_t \tfrac12 e_t^2$ with the error $e_t = \tau\log\frac{\pi(a_t)}{\pi_b(a_t)} + V(s_t) - \hat G_t$. The upstream gradient of
# a token's log-prob is $g_\ell = \tau e_t/N$. It needs the log-prob of *this* token, and the number of tokens, which is known
# before anything starts. It needs no other row. So as soon as a row's statistics are there, its gradient can be written:
#
# $$\frac{\partial L}{\partial z_{t,v}} = \kappa\,\frac{\tau\,e_t}{N}\left(1[v = a_t] - \pi_v\right), \qquad \frac{\partial L}{\partial V(s_t)} = \frac{e_t}{N} \tag{10.7}$$

# %%
tau = 0.4
mask = torch.tensor([True, True, False, True, True])
ref_logprobs, values, targets = torch.randn(3, N)
for x in (ref_logprobs, values, targets):
    x[~mask] = torch.nan
logits = torch.where(mask[:, None], z, torch.nan).requires_grad_()
critic = values.clone().requires_grad_()
rest = (y, ref_logprobs, critic, targets, mask)

loss = logits_klq_loss(logits, *rest, tau=tau, temperature=temperature, backend="torch")
found = torch.autograd.grad(loss, (logits, critic))

n = mask.sum()
logprob = torch.log_softmax(kappa * z, -1)[torch.arange(N), y]
e = torch.where(mask, tau * (logprob - ref_logprobs) + values - targets, 0.0)
one_hot = torch.nn.functional.one_hot(y, V)
by_hand = kappa * tau * (e / n)[:, None] * (one_hot - p)
check.equation("10.7", found[0], by_hand)
check.equation("10.7", found[1], e / n)

x, v = z.clone().requires_grad_(), critic.detach().clone().requires_grad_()
logprob = torch.log_softmax(kappa * x, -1)[torch.arange(N), y]
plain = klq_loss(logprob, ref_logprobs, v, targets, mask, tau=tau)
check.equation("10.7", torch.autograd.grad(plain, x)[0], by_hand)

# %% [markdown]
# In the library the derivative of every variant of the loss stands beside the loss, for $N$ numbers; the kernel behind it is
# (10.3) with $g_H = g_D = 0$.

# %%
source(klq_terms)

# %% [markdown]
# And where does the gradient go? After it is written nobody needs the logits. So it may take their place, and the second [N, V] tensor is
# never made. At 8192 tokens and 128,256 logits in bf16 (half precision, 2 bytes) that is 2.1 gigabytes. If the loss is scaled later, by a weight or by gradient accumulation, the stored
# gradient is multiplied by that one factor, since the loss enters everything after it as one number.

# %%
work = z.clone().requires_grad_()
scores = work * 1.0  # what a model's head returns: no leaf
address = scores.data_ptr()
loss = logits_klq_loss(
    scores, *rest, tau=tau, temperature=temperature, inplace=True, backend="torch"
)
print("the same memory:", scores.data_ptr() == address)
check.equation("10.7", scores, by_hand)
(3 * loss).backward()
check.equation("10.7", work.grad, 3 * by_hand)
print(f"saved at that size: {8192 * 128_256 * 2 / 1e9:.1f} GB")

# %% [markdown]
# > **People ask: "one of the variables needed for gradient computation has been modified by an inplace operation". What did I do?**
# >
# > Something else still needs the logits that were overwritten: a second loss on them, say. Autograd notices, because the
# > library tells it that the memory changed. Use the separate gradient (`inplace=False`), or put the second loss into the upstream gradients.

# %%
scores = z.clone().requires_grad_() * 1.0
other = (scores**2).mean()
loss = logits_klq_loss(scores, *rest, tau=tau, inplace=True, backend="torch")
try:
    (loss + other).backward()
except RuntimeError as error:
    print(str(error).split(":")[0])

# %% [markdown]
# ## A recursion in parallel
#
# The targets of KLQ come from $\Delta_t = \delta_t + a_t\,\Delta_{t+1}$ with $a_t = \gamma\lambda$, each step waiting for the next. Notebook 05 saw each step as a map
# $f_t: x \mapsto b_t + a_t x$ with $b_t = \delta_t$, and two of them in a row as one, by (5.5): $(a_1, b_1)\circ(a_2, b_2) = (a_1a_2,\; b_1 + a_1b_2)$. All that
# follows rests on one property. **Prove** it in one line: compose three, first the left two or first the right two;
# both give the pair $(a_1a_2a_3,\; b_1 + a_1b_2 + a_1a_2b_3)$.
#
# $$\left(f_1\circ f_2\right)\circ f_3 = f_1\circ\left(f_2\circ f_3\right) \tag{10.8}$$
#
# So brackets may stand anywhere, and who composes with whom, and when, is ours to choose. (The order may *not* change: $f_1\circ f_2$ and
# $f_2\circ f_1$ differ.)


# %%
def compose(first, then):
    """The pair of x ↦ first(then(x))."""
    return torch.stack([first[0] * then[0], first[1] + first[0] * then[1]])


f1, f2, f3 = torch.randn(3, 2, 100)  # a hundred triples of pairs
left, right = compose(compose(f1, f2), f3), compose(f1, compose(f2, f3))
check.equation("10.8", left, right)
x = torch.randn(100)
one_by_one = f1[1] + f1[0] * (f2[1] + f2[0] * (f3[1] + f3[0] * x))
check.equation("10.8", left[1] + left[0] * x, one_by_one)

# %% [markdown]
# What a row needs is *all* compositions from some $t$ to the end. That is called a *scan*:
#
# $$\Delta_t = \left(f_t\circ f_{t+1}\circ\dots\circ f_{T-1}\right)(0) \tag{10.9}$$
#
# Two famous ways to bracket. **Hillis and Steele**: in each round everybody composes with whoever stands 1, then 2, then 4
# to the right. **A tree, up and down** (Brent and Kung 1982; Blelloch 1990 has the exclusive form, in which a position does not count itself): pairs, then
# pairs of pairs, and down again to serve those that were left out.
#
# **Predict**, for $T = 16$: how many rounds does each take, and how many compositions? **Change.** Then move the slider, round by round.

# %%
explore(SCAN)

# %% [markdown]
# Both bracketings must give what the recursion gives. We let weights vary from step to step (Retrace's $c_t$, trace weights), so that a kept decay
# in the place of a composed one would show.

# %%
T, gamma, lam = 16, 0.98, 0.9
rewards, v, logp, logq = torch.randn(4, 1, T)
weights = torch.rand(1, T)
everything = torch.ones(1, T, dtype=torch.bool)
given = (rewards, v, logp, logq, everything)
settings = dict(tau=tau, gamma=gamma, lam=lam, trace_weights=weights)
out = lambda_returns(*given, **settings)

delta = out.td_errors[0]
decay = gamma * lam * torch.cat([weights[0, 1:], torch.zeros(1)])
for rounds in (hillis_steele(T), brent_kung(T)):
    check.equation("10.9", run_scan(rounds, decay, delta), out.advantages[0])
tiled = lambda_returns(*given, **settings, backend="torch")
check.equation("10.9", run_scan(brent_kung(T), decay, delta), tiled.advantages[0])

# %% [markdown]
# Now count in general. In Hillis and Steele's round with step $2^j$ all but the last $2^j$ positions work, and there are $\log_2 T$ rounds:
#
# $$W_{HS} = \sum_{j=0}^{\log_2 T - 1} (T - 2^j) = T\log_2 T - T + 1 \tag{10.10}$$
#
# Brent and Kung's tree has $T - 1$ inner nodes, each composed once on the way up. On the way down all positions are served that are not final yet, once
# each; those that are: position 0, and the $\log_2 T$ others at which the tree's right edge stood.
#
# $$W_{BK} = (T - 1) + (T - 1 - \log_2 T) = 2T - 2 - \log_2 T \tag{10.11}$$
#
# in $2\log_2 T - 1$ rounds: less than twice the work of the plain loop, $T - 1$, and about twice the rounds of Hillis and Steele.


# %%
def work(scan):
    """How many compositions it makes for T = 2, 4, … 1024."""
    return torch.tensor([sum(map(len, scan(2**j))) for j in range(1, 11)]).double()


log_T = torch.arange(1.0, 11)
check.equation("10.10", work(hillis_steele), 2**log_T * log_T - 2**log_T + 1)
check.equation("10.11", work(brent_kung), 2 * 2**log_T - 2 - log_T)
print("rounds at T = 1024:", len(hillis_steele(1024)), "and", len(brent_kung(1024)))
print("compositions:", *(int(work(s)[-1]) for s in (hillis_steele, brent_kung)))

# %% [markdown]
# **Explain.** Which is better? It depends on who would be idle. The 32 threads of a *warp* run in step; if five rounds are enough for 32
# positions, it costs nothing that all of them work in each. There Hillis and Steele's way wins. With more data than threads, work counts, and
# one saves it: each thread first runs through a few neighbours by itself, the warps scan what the threads found, and the few results
# of the warps are scanned last. That is what Triton makes of `tl.associative_scan`: it wants a function that composes, and trusts us that it is
# associative.
#
# ## Rows that end
#
# Completions have different lengths. Must the kernel know them? Look at the last token: what comes after it must not count. So
# set its decay to 0: the map $x \mapsto \delta + 0\,x$ forgets $x$, whatever stands there. And on padding let $\delta = 0$. Then rows
# need no special case, and could even stand one behind the other in one long row:
#
# $$\text{scan}\left(f^{(1)} \,\|\, f^{(2)}\right) = \text{scan}\left(f^{(1)}\right) \,\|\, \text{scan}\left(f^{(2)}\right) \qquad\text{if } a^{(1)}_{\text{last}} = 0 \tag{10.12}$$
#
# where $\|$ puts rows one behind the other.

# %%
lengths = [7, 1, 8]
parts = list(zip(torch.rand(16).split(lengths), torch.randn(16).split(lengths)))
decays = [torch.cat([a[:-1], torch.zeros(1)]) for a, _ in parts]
packed = run_scan(brent_kung(16), torch.cat(decays), torch.cat([b for _, b in parts]))
alone = []
for a, (_, b) in zip(decays, parts):
    sums, tail = torch.zeros(len(b)), 0.0
    for t in reversed(range(len(b))):
        tail = b[t] + a[t] * tail
        sums[t] = tail
    alone.append(sums)
check.equation("10.12", packed, torch.cat(alone))

# %% [markdown]
# Here is the library's kernel. One program takes one row, block by block from the end; within a block it scans, and what is known at the
# block's first position is carried into the next one, weighted by the composed decays. `T` is an ordinary argument: a `constexpr` would be compiled anew for each
# length, and a training run meets many. Only the size of a block is fixed, and the mask does the rest.

# %%
source(triton_logits._compose.fn)
source(triton_logits.returns_kernel.fn)

# %% [markdown]
# It computes in fp32. Three rows of different lengths, NaN on padding, against the float64 recursion:

# %%
mask = torch.arange(T) < torch.tensor([16, 1, 11])[:, None]
batch = [torch.where(mask, torch.randn(3, T), torch.nan) for _ in range(4)]
exact = lambda_returns(*batch, mask, tau=tau, gamma=gamma, lam=lam)
single = [x.float().to(device) for x in batch]
kernel = lambda_returns(
    *single, mask.to(device), tau=tau, gamma=gamma, lam=lam, backend="triton"
)
for name, x in kernel._asdict().items():
    error = (x.double().cpu() - getattr(exact, name)).abs().max()
    print(f"{name}: largest error {error:.1g}")
    check.inequality("10.9", error, 1e-5)

# %% [markdown]
# ## Sums that drift
#
# Every statistic above is a sum of $V$ terms. Logits come in half precision, bf16 (8 significant bits) or fp16 (11), so why not add in
# half precision? One addition is harmless. It rounds its result to the nearest number there is, and that is near:
#
# $$\left|\mathrm{fl}(x + y) - (x + y)\right| \le u\left|x + y\right| \tag{10.13}$$
#
# $\mathrm{fl}$ means: as computed. The *unit roundoff* $u$ is $2^{-8}$ in bf16, $2^{-11}$ in fp16 and $2^{-24}$ in fp32.

# %%
units = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
for dtype, u in units.items():
    a, b = torch.randn(2, 10_000).to(dtype)
    true = a.double() + b.double()
    check.inequality("10.13", ((a + b).double() - true).abs(), u * true.abs())

# %% [markdown]
# **Predict.** Add a thousand ones in bf16, one after another. What comes out? (Eight significant bits: after 1 come 2, 3, … Which is the first
# whole number that bf16 does not have?)

# %%
for dtype in (torch.bfloat16, torch.float16):
    for n in (1000, 5000):
        total = running_sum(torch.ones(n, dtype=dtype)).item()
        print(f"{n} ones in {dtype}: {total:g}")

# %% [markdown]
# 257 needs nine bits. $256 + 1$ is rounded to 256, and there the sum stays forever. This is the general picture: the error of each addition
# is relative to the *sum so far*, which grows. Chain (10.13) through $n - 1$ additions, and each term has been multiplied by at most $n - 1$ factors between $1 - u$ and $1 + u$:
#
# $$\left|\hat s - s\right| \le \left((1+u)^{n-1} - 1\right)\sum_{i=1}^{n}\left|x_i\right| \tag{10.14}$$
#
# For small $nu$ that is about $n u$. In bf16, $nu = 1$ at 256 terms: beyond that the bound promises nothing, and a
# vocabulary has a hundred thousand.


# %%
def errors_and_bounds(add, factors):
    """For all three precisions and 10, 100 and 1000 terms; factors: what n terms meet."""
    found = []
    for dtype, u in units.items():
        for n in (10, 100, 1000):
            terms = torch.randn(n, 32).exp().to(dtype)
            exact = terms.double().sum(0)
            bound = ((1 + u) ** factors(n) - 1) * exact
            found.append(torch.stack([(add(terms).double() - exact).abs(), bound]))
    return torch.cat(found, 1)


check.inequality("10.14", *errors_and_bounds(running_sum, lambda n: n - 1))

# %% [markdown]
# What helps? Add in pairs, then pairs of pairs. Now no term goes through more than $\lceil\log_2 n\rceil$ additions, so
#
# $$\left|\hat s_{\text{pairs}} - s\right| \le \left((1+u)^{\lceil\log_2 n\rceil} - 1\right)\sum_{i=1}^{n}\left|x_i\right| \tag{10.15}$$
#
# A tree again, for another reason: above it was fast, here it is accurate. Or add in fp32, whose $u$ is 65,536 times smaller.

# %%
check.inequality(
    "10.15", *errors_and_bounds(pairwise_sum, lambda n: (n - 1).bit_length())
)
print("u of bf16 over u of fp32:", units[torch.bfloat16] / units[torch.float32])

# %%
show(draw_sums())

# %% [markdown]
# **Explain.** Two different things are rounded: the *terms*, when logits are stored in bf16, and the *sum*. Rounding a term is one error of at
# most $u$, up for some and down for others, and over many terms it averages out. Rounding the sum repeats, and drifts. So kernels
# *load* bf16, which halves the bytes, and *add* in fp32, which costs nothing on the way: `.to(tl.float32)` follows every load above. What would drift do to a log-prob,
# which contains $\log s$? And fp16 has one more trap: its largest number is smaller than a vocabulary.

# %%
terms = (torch.randn(20_000, 1) / 4).exp()
sums = {
    "float64": terms.sum(),
    "bf16 terms, fp32 sum": terms.bfloat16().float().sum(),
    "all in bf16": running_sum(terms.bfloat16()).squeeze(),
}
for name, x in sums.items():
    print(f"{name}: log s = {x.double().log():.4f}")
print("128,256 in fp16:", torch.tensor(128_256.0).half().item())

# %% [markdown]
# ## Exercises
#
# The first three answers launch a Triton kernel. Arguments are float32 (lengths and tokens: int64), and so is the result, which you make with
# `new_empty`. Rows may lie further apart than they are long: use the strides you are given. The check puts NaN around everything, so
# that what is read or written beyond an end shows. `BLOCK` is 16, small on purpose: rows have several blocks, and the last is ragged.
#
# ### Exercise 10.1 · The gradient of a log-prob
#
# `logits` [N, V], `tokens` [N]; `top`, `lse` [N] are $m$ and $\log s$ of (10.5) for this `temperature`; `upstream` [N] is $g_\ell$. Return
# the gradient [N, V]. Some logits are $-\infty$. One program does one block of one row.
#
# <!-- hints 10.1 -->


# %%
@triton.jit
def logprob_kernel(
    Z, TOKENS, TOP, LSE, G, OUT, z_row, out_row, V, inverse, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row · V can exceed 2³¹
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # BEGIN SOLUTION
    inside = column < V
    z = tl.load(Z + row * z_row + column, mask=inside, other=-float("inf"))
    p = tl.exp((z - tl.load(TOP + row)) * inverse - tl.load(LSE + row))
    one = tl.where(column == tl.load(TOKENS + row), 1.0, 0.0)
    dz = tl.load(G + row) * inverse * (one - p)
    tl.store(OUT + row * out_row + column, dz, mask=inside)
    # END SOLUTION


def logprob_gradient(logits, tokens, top, lse, upstream, temperature):
    out = logits.new_empty(logits.shape)
    rows, V = logits.shape
    logprob_kernel[(rows, triton.cdiv(V, 16))](
        logits, tokens, top, lse, upstream, out,
        logits.stride(0), out.stride(0), V, 1 / temperature, BLOCK=16,
    )  # fmt: skip
    return out


check.exercise("10.1", logprob_gradient)

# %% [markdown]
# ### Exercise 10.2 · The gradient of a KL
#
# As before, now for $D(p\|q)$, and with a reference: `ref_logits`, `ref_top`, `ref_lse` belong to $q$; `kl` [N] is $D$; `upstream` is $g_D$. What is
# forbidden for $q$ is forbidden for $p$ too, so $D$ is finite. Your gradient must be 0 where $p$ is 0, and not NaN.
#
# <!-- hints 10.2 -->


# %%
@triton.jit
def kl_kernel(
    Z, R, TOP, LSE, REF_TOP, REF_LSE, KL, G, OUT,
    z_row, r_row, out_row, V, inverse, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # BEGIN SOLUTION
    inside = column < V
    z = tl.load(Z + row * z_row + column, mask=inside, other=-float("inf"))
    r = tl.load(R + row * r_row + column, mask=inside, other=0.0)
    logp = (z - tl.load(TOP + row)) * inverse - tl.load(LSE + row)
    logq = (r - tl.load(REF_TOP + row)) * inverse - tl.load(REF_LSE + row)
    logp, logq = tl.maximum(logp, -1e30), tl.maximum(logq, -1e30)
    centred = logp - logq - tl.load(KL + row)
    dz = tl.load(G + row) * inverse * tl.exp(logp) * centred
    tl.store(OUT + row * out_row + column, dz, mask=inside)
    # END SOLUTION


def kl_gradient(
    logits, ref_logits, top, lse, ref_top, ref_lse, kl, upstream, temperature
):
    out = logits.new_empty(logits.shape)
    rows, V = logits.shape
    kl_kernel[(rows, triton.cdiv(V, 16))](
        logits, ref_logits, top, lse, ref_top, ref_lse, kl, upstream, out,
        logits.stride(0), ref_logits.stride(0), out.stride(0), V, 1 / temperature,
        BLOCK=16,
    )  # fmt: skip
    return out


check.exercise("10.2", kl_gradient)

# %% [markdown]
# ### Exercise 10.3 · λ-returns, block by block
#
# `delta` [B, T] holds $\delta$, and NaN on padding; `lengths` [B] says how many steps of a row are real (0 is possible); `decay` is $\gamma\lambda$, one number. Return $\Delta$
# [B, T], 0 on padding. One program does one row. A loop over single steps is right, and passes; `tl.associative_scan` on blocks is the
# way that is fast.
#
# <!-- hints 10.3 -->


# %%
@triton.jit
def compose_pairs(a_later, b_later, a, b):
    """Joins a step to what is known of the steps after it: with reverse=True these come first."""
    return a * a_later, b + a * b_later


@triton.jit
def returns_kernel(DELTA, LENGTHS, OUT, d_row, out_row, T, decay, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, BLOCK)
    # BEGIN SOLUTION
    length = tl.load(LENGTHS + row)
    tail = 0.0
    for block in range(tl.cdiv(T, BLOCK) - 1, -1, -1):
        t = block * BLOCK + steps
        b = tl.load(DELTA + row * d_row + t, mask=t < length, other=0.0)
        a = tl.where(t < length, decay, 0.0)
        decays, sums = tl.associative_scan((a, b), 0, compose_pairs, reverse=True)
        sums += decays * tail
        tail = tl.sum(tl.where(steps == 0, sums, 0.0), 0)
        tl.store(OUT + row * out_row + t, sums, mask=t < T)
    # END SOLUTION


def block_returns(delta, lengths, decay):
    out = delta.new_empty(delta.shape)
    rows, T = delta.shape
    returns_kernel[(rows,)](
        delta, lengths, out, delta.stride(0), out.stride(0), T, decay, BLOCK=16
    )
    return out


check.exercise("10.3", block_returns)

# %% [markdown]
# ### Exercise 10.4 · Loss and gradient in one pass
#
# In PyTorch, float64, without autograd and without a temperature: from `logits` [B, T, V] and `tokens`, `ref_logprobs`, `values`, `targets`, `mask` [B, T] and $\tau$ return KLQ's
# loss, its gradient in the logits [B, T, V], and its gradient in the values [B, T]. Padding holds NaN, and −100 for tokens; the gradients are 0 there.
#
# <!-- hints 10.4 -->


# %%
def klq_at_once(logits, tokens, ref_logprobs, values, targets, mask, tau):
    # BEGIN SOLUTION
    logp = torch.where(mask[..., None], logits, 0.0).log_softmax(-1)
    chosen = torch.where(mask, tokens, 0)[..., None]
    logprob = logp.gather(-1, chosen).squeeze(-1)
    e = tau * (logprob - ref_logprobs) + values - targets
    e, n = torch.where(mask, e, 0.0), mask.sum()
    one_hot = torch.zeros_like(logp).scatter_(-1, chosen, 1.0)
    dlogits = (tau * e / n)[..., None] * (one_hot - logp.exp())
    return 0.5 * (e**2).sum() / n, dlogits, e / n
    # END SOLUTION


check.exercise("10.4", klq_at_once)

# %% [markdown]
# ### Open question
#
# A colleague wants to write each loss (plain, clipped, with an entropy bonus, with a KL penalty) as a kernel of its own that goes from logits to
# gradient, "because one launch is faster than three". What do you answer?
#
# *What a good answer contains:* what a loss needs of a row, and what (10.3) needs of a loss (1 point); the bytes of [N] against those of [N, V] tensors (1);
# what has to be derived and tested again for each loss (1); where the colleague is right (1); a measurement that decides (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# All these losses see a row through log-prob, entropy and KL, and the row's gradient needs from them three upstream gradients. The arithmetic between is on
# [N] tensors, which are smaller than the logits by a factor $V$: fusing it saves almost no bytes. Each kernel of one's own would contain the
# softmax, the tail, $-\infty$, masks and the loss's derivative again, and each would have to be tested with random upstream gradients; such copies are
# where published bugs sit. The colleague is right where launches dominate: few rows, or a small vocabulary; and where the gradient can be
# written while the row is still in cache, as KLQ's can, (10.7). To decide: time forward plus backward at the real N and V, and compare with the floor (10.6); if
# the three launches are within a few per cent of it, there is nothing to gain.
#
# </details>

# %% [markdown]
# ## Remember
#
# Any function of the probabilities has the gradient $\kappa\,p \odot (\phi - \mathbb{E}_p \phi)$ (10.2); log-prob, entropy and KL together are one formula with three upstream gradients per
# row (10.3), and its rows sum to 0 (10.4). Keep a few numbers per row and compute $p$ again (10.5): 5 visits to an [N, V] tensor instead of 44 (10.6). KLQ's gradient is known with the loss (10.7). A
# recursion of affine maps is a scan, because composing is associative (10.8), and a decay of 0 ends a row (10.12). Load in half precision, add in fp32 (10.14).
#
# *In the library:* `klq_kernels.token_stats`, `logits_klq_loss`, `lambda_returns`; `klq_kernels.triton_logits` holds the kernels, `klq_kernels.torch_logits` the same for a central processing unit (CPU).
# *Next:* the same statistics from hidden states, without any logits in memory: `klq_kernels.linear_token_stats`.

# %%
check.ledger()
