# %% [markdown]
# # 04 · Measuring KL from samples
#
# **Why did my KL go negative, and which estimator belongs where?**
#
# *After this notebook you can* estimate a Kullback–Leibler divergence (KL) from samples in three ways and say how far
# each is to be trusted; tell an estimator of the *value* from a loss with the right *gradient*; and avoid two bugs that
# make a KL negative.
#
# *You need* notebook 01. *Time:* <!-- minutes --> minutes. *Symbols:* $\ell = \log\frac{\pi(a)}{\pi_b(a)}$ log-ratio of a sampled action, $D$
# KL, $k_1, k_2, k_3$ the estimators.

# %%
import torch

from klq_edu.core.estimators import k1, k2, k3
from klq_edu.course import explore, source, start
from klq_edu.course.chapters.c04_measuring_kl import ESTIMATORS, pair
from klq_kernels import token_stats
from klq_kernels.reference import kl_divergence

check = start("04")

# %% [markdown]
# ## A dashboard that worries people
#
# You train a language model, watch "KL to the reference", and one day it reads −0.03. But notebook 01 proved that
# a KL is never negative. Let us make it happen, with nine actions and two policies that are close.

# %%
policy, ref = pair(0.3)
exact = kl_divergence(policy.log(), ref.log())
ell = (policy / ref).log()
rng = torch.Generator().manual_seed(5)
sample = torch.multinomial(policy, 8, replacement=True, generator=rng)
print(f"exact KL {exact:.4f} nats")
print(f"mean of log π(a)/π_b(a) over 8 samples: {ell[sample].mean():+.4f} nats")

# %% [markdown]
# **Predict.** Is that a bug? Would a thousand samples help? Is there an estimator that cannot do this?
#
# ## Three estimators
#
# By definition the KL is a mean over what $\pi$ does, so the log-ratio itself is an unbiased estimate:
#
# $$k_1 = \ell, \qquad \mathbb{E}_{a\sim\pi}[k_1] = D(\pi\|\pi_b) \tag{4.1}$$
#
# We check expectations exactly: with nine actions there is no need to sample, we sum over all.

# %%
check.equation("4.1", (policy * k1(ell)).sum(), exact)

# %% [markdown]
# A single $\ell$ is negative whenever the sampled action is *less* likely under $\pi$ than under $\pi_b$, and there must be
# such actions. So a negative mean over a few samples is no bug. It is noise: a thousand samples instead of eight would shrink it by
# $\sqrt{1000/8} \approx 11$. Or one squares it away:
#
# $$k_2 = \tfrac12\ell^2 \;\ge\; 0 \tag{4.2}$$
#
# The price is a bias. Write $\mathbb{E}_\pi[e^{-\ell}] = \sum_a \pi_b(a) = 1$ and expand $e^{-\ell}$: the KL is
# $\mathbb{E}[\ell] = \mathbb{E}[\tfrac12\ell^2] - \mathbb{E}[\tfrac16\ell^3] + \dots$, so $k_2$ is right to second order, and
# wrong by a third-order term.

# %%
check.inequality("4.2", torch.zeros(9), k2(ell))
check.equation("4.2", k2(ell), 0.5 * (policy / ref).log() ** 2)
for distance in (0.1, 0.3, 1.0):
    p, b = pair(distance)
    true = kl_divergence(p.log(), b.log())
    bias = ((p * k2((p / b).log())).sum() / true - 1).item()
    print(f"distance {distance}: KL {true:.4f}, k2 is off by {bias:+.1%}")

# %% [markdown]
# Can we have both, no bias and no negative values? Add something to $k_1$ that is 0 on average. We just met it:
# $e^{-\ell} - 1$ has mean 0. And $e^{-\ell} - 1 + \ell \ge 0$, by the tangent line of notebook 01.
#
# $$k_3 = e^{-\ell} - 1 + \ell, \qquad \mathbb{E}_{a\sim\pi}[k_3] = D(\pi\|\pi_b) \tag{4.3}$$

# %%
check.equation("4.3", (policy * k3(ell)).sum(), (policy * (policy / ref).log()).sum())
check.inequality("4.3", torch.zeros(9), k3(ell))
source(k3)

# %% [markdown]
# It also varies less, as long as the policies are close. Near $\pi_b$, $k_1 \approx \ell$ but $k_3 \approx \tfrac12\ell^2$, and the
# variance of a square of small numbers is of fourth order:
#
# $$\mathrm{Var}[k_3] \le \mathrm{Var}[k_1] \qquad \text{for close policies} \tag{4.4}$$


# %%
def variance(k):
    return (policy * (k - (policy * k).sum()) ** 2).sum()


check.inequality("4.4", variance(k3(ell)), variance(k1(ell)))
for distance in (0.1, 0.3, 1.0, 3.0):
    policy, ref = pair(distance)
    ell = (policy / ref).log()
    spreads = variance(k1(ell)), variance(k3(ell))
    print("distance {}: variance of k1 {:.4f}, of k3 {:.4f}".format(distance, *spreads))
policy, ref = pair(0.3)
ell = (policy / ref).log()

# %% [markdown]
# At the largest distance the order has turned: $e^{-\ell}$ explodes for an action that the policy has nearly given up. Move the
# sliders to distance 3 and watch the tail of $k_3$.

# %%
explore(ESTIMATORS)

# %% [markdown]
# > **People ask: why did my KL go negative?**
# >
# > Either noise of $k_1$ on few samples, which is harmless; or a real bug: the samples do not come from the
# > distribution whose log-probs you use. Restrict sampling to the likeliest tokens (top-k), and keep the log-probs
# > of the full model: then the estimate is wrong however many samples you take.

# %%
b, p = pair(0.3)  # roles exchanged: now p samples, and b is the reference
top = p >= p.sort(descending=True).values[2]
restricted = torch.where(top, p, 0.0) / p[top].sum()
believed = (restricted * (p / b).log()).sum()  # infinitely many samples from the top 3
print(f"what the dashboard shows: {believed:+.4f} nats, with no noise left")
print(f"KL of what was really sampled: {kl_divergence(restricted.log(), b.log()):+.4f}")

# %% [markdown]
# ## As losses they are three different things
#
# Now the trap. People take an estimator and put it into the *loss*, to keep the policy close. Automatic
# differentiation sees sampled actions as constants: it differentiates $\log\pi$ and not the sampling. What the KL needs is this:
# differentiate $\sum_a \pi\,\ell$, use $\nabla\pi = \pi\,\nabla\log\pi$, and note that $\mathbb{E}[\nabla\log\pi] = \sum_a\nabla\pi = \nabla 1 = 0$:
#
# $$\nabla D(\pi\|\pi_b) = \mathbb{E}_{a\sim\pi}\left[\ell\;\nabla\log\pi(a)\right] \tag{4.5}$$

# %%
logits = policy.log().clone().requires_grad_()


def gradient(of_log_policy, weights=policy):
    """Gradient of an expectation with fixed sampling weights."""
    value = (weights * of_log_policy(torch.log_softmax(logits, -1))).sum()
    return torch.autograd.grad(value, logits)[0]


true_kl = kl_divergence(torch.log_softmax(logits, -1), ref.log())
true_gradient = torch.autograd.grad(true_kl, logits)[0]
check.equation("4.5", true_gradient, gradient(lambda logp: ell * logp))

# %% [markdown]
# **Predict** which of $k_1, k_2, k_3$ has this gradient when it is used as a loss.
#
# $k_1$: its gradient is $\nabla\log\pi$, whose mean is zero. A loss that does nothing on average but add noise:
#
# $$\mathbb{E}[\nabla k_1] = 0 \tag{4.6}$$

# %%
check.equation("4.6", gradient(lambda logp: k1(logp - ref.log())), torch.zeros(9))

# %% [markdown]
# $k_2$: its gradient is $\ell\,\nabla\log\pi$. Exactly (4.5)! The "biased" estimator has the right gradient:
#
# $$\mathbb{E}[\nabla k_2] = \nabla D(\pi\|\pi_b) \tag{4.7}$$

# %%
check.equation("4.7", gradient(lambda logp: k2(logp - ref.log())), true_gradient)

# %% [markdown]
# $k_3$: its gradient is $(1 - e^{-\ell})\nabla\log\pi$, and $\pi e^{-\ell} = \pi_b$. So it is the gradient of the *other* KL:
#
# $$\mathbb{E}[\nabla k_3] = \nabla D(\pi_b\|\pi) \tag{4.8}$$

# %%
forward = kl_divergence(ref.log(), torch.log_softmax(logits, -1))
forward_gradient = torch.autograd.grad(forward, logits)[0]
check.equation("4.8", gradient(lambda logp: k3(logp - ref.log())), forward_gradient)

# %% [markdown]
# > **People ask: so which one goes into the loss?**
# >
# > $k_3$ (or the exact KL) on the dashboard, $k_2$ in the loss, provided the samples come from the current $\pi$. And $k_1$ in
# > the *reward*: there it is not differentiated, it weighs $\nabla\log\pi$, and that is (4.5). Where the policies are close, the
# > gradients of the *reverse* KL $D(\pi\|\pi_b)$ and of the *forward* KL $D(\pi_b\|\pi)$ hardly differ, so the mistake often goes
# > unnoticed. KLQ (KL-regularised Q-learning) has a $k_2$ towards $\pi_{old}$ built into its square, as notebook 07 shows.
#
# | where | use | because |
# |---|---|---|
# | dashboard | $k_3$, or the exact sum (4.9) | right on average, never negative |
# | reward | $k_1$ | it weighs $\nabla\log\pi$: the right gradient by (4.5) |
# | loss | $k_2$, or the exact sum | its derivative is the right one (4.7) |

# %%
cosine = torch.nn.functional.cosine_similarity(true_gradient, forward_gradient, dim=0)
print(f"angle between the two gradients, as a cosine: {cosine:.4f}")

# %% [markdown]
# ## Or do not estimate
#
# A language model computes the probabilities of *all* tokens anyway, to sample one. Then the KL of the state is a sum, not an
# estimate, and this library's kernels return it with the log-prob, in one pass:
#
# $$D(\pi\|\pi_b)(s) = \sum_a \pi(a|s)\,\log\frac{\pi(a|s)}{\pi_b(a|s)} \tag{4.9}$$

# %%
token = torch.tensor([2])
stats = token_stats(policy.log()[None], token, ref.log()[None])
check.equation("4.9", stats.kl[0], (policy * ell).sum())

# %% [markdown]
# One more way to a negative KL, this time by arithmetic. In float32 the sum (4.9) of a small KL drowns in rounding. The
# library adds up $k_3$-like terms instead, none of which is negative, and which add $\sum_a\pi e^{-\ell} - \sum_a\pi = 1 - 1 = 0$:
#
# $$\sum_a \pi\,\ell = \sum_a \pi\left(e^{-\ell} - 1 + \ell\right) \tag{4.10}$$

# %%
check.equation("4.10", kl_divergence(policy.log(), ref.log()), (policy * ell).sum())
near = torch.log_softmax(policy.log() + 1e-4 * torch.randn(9), -1)
exactly = (near.exp() * k3(near - policy.log())).sum()
near32, policy32 = near.float(), policy.log().float()
naive = (near32.exp() * (near32 - policy32)).sum()
print(f"true {exactly:.2e}, naive float32 {naive:+.2e}", end=", ")
print(f"library float32 {kl_divergence(near32, policy32):.2e}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 4.1 · k3, to the last digit
#
# Return $k_3$ for a tensor of log-ratios $\ell$. Some in the check are $10^{-7}$, and it has to be right to a thousandth even there.
#
# <!-- hints 4.1 -->


# %%
def my_k3(log_ratio):
    # BEGIN SOLUTION
    return torch.expm1(-log_ratio) + log_ratio
    # END SOLUTION


check.exercise("4.1", my_k3)

# %% [markdown]
# ### Exercise 4.2 · Samples from an older policy
#
# A batch is often used for several steps. From the second step on its actions come from an older policy $\pi_{old}$, and $\pi$ has
# moved on, while (4.5) to (4.8) are means over $\pi$. From `logprobs`, `old_logprobs` and `ref_logprobs` of the sampled
# actions, that is $\log\pi$, $\log\pi_{old}$ and $\log\pi_b$, each [N], return a loss, the mean of something over the samples, whose
# expected gradient is $\nabla D(\pi\|\pi_b)$ at the *present* $\pi$. Gradients flow through `logprobs` only. (In the check each action
# occurs exactly as often as $\pi_{old}$ says, so that there is no noise.)
#
# <!-- hints 4.2 -->


# %%
def my_penalty(logprobs, old_logprobs, ref_logprobs):
    # BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp().detach()
    return (ratio * 0.5 * (logprobs - ref_logprobs) ** 2).mean()
    # END SOLUTION


check.exercise("4.2", my_penalty)

# %% [markdown]
# ### Open question
#
# Your training log shows a mean KL per token of 0.02 with $k_1$ and of 0.9 with $k_3$, on the same samples. What may have
# happened, and what would you look at first?
#
# *What a good answer contains:* that both are unbiased, so either rare samples dominate or the samples are not from $\pi$ (2 points);
# where $e^{-\ell}$ is large (1); the exact KL, or the largest terms, as the next thing to look at (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# Both have the same mean: $k_3 - k_1 = e^{-\ell} - 1$ averages 0 over samples from $\pi$, and here it averages 0.88. So the gap is
# noise or a bug. $k_3$ has a heavy tail: a token that $\pi$ gives $10^{-4}$ of what
# $\pi_b$ gives it, sampled once, contributes $10^4$. Sort the terms: if a handful makes up the mean, it is the tail. If many
# are large, the samples do not come from $\pi$ (another temperature, top-k, stale weights). The exact KL over the vocabulary decides.
#
# </details>

# %% [markdown]
# ## Remember
#
# $k_1$ and $k_3$ are right on average as values, and $k_3$ is never negative (4.1, 4.3). As losses only $k_2$ has the gradient of
# $D(\pi\|\pi_b)$ (4.7); $k_1$ has none (4.6), $k_3$ that of the other direction (4.8). With all probabilities at hand, sum (4.9).
#
# *In the library:* `klq_edu.core.estimators`, `klq_kernels.reference.kl_divergence`, `klq_kernels.token_stats`. *Next:*
# notebook 05 follows a reward back through a completion.

# %%
check.ledger()
