# %% [markdown]
# # 05 · λ-returns and GAE
#
# **How far ahead should a target look?**
#
# *After this notebook you can* compute temporal-difference errors for a language model; sum them over many steps in
# three equivalent ways; say what λ trades; and keep padding out of all of it.
#
# *You need* notebooks 01 (the Q of a policy), 02 (values) and 03 (text as a decision process, masks). *Time:* <!-- minutes --> minutes. *Symbols:* index $t$
# holds the action $a_t$, the value $V(s_t)$ and the reward $r_{t+1}$ that follows; $\gamma$ discount, $\lambda$ how far to look,
# $\delta$ temporal-difference (TD) error, $\Delta$ its λ-sum, $\hat G$ target, $\alpha$ how far it goes; $\tau$ price of the Kullback–Leibler divergence (KL).

# %%
import torch

from klq_edu.core.improvement import action_values
from klq_edu.core.returns import forward_view, gae, kl_shaped_rewards, lambda_returns
from klq_edu.course import explore, source, start
from klq_edu.course.chapters.c05_lambda_returns import (
    LAMBDA,
    bias_and_variance,
    every_completion,
    mean_given,
)
from klq_kernels import reference

check = start("05")

# %% [markdown]
# ## One step ahead
#
# The model has written a few tokens and gets a score at the end. Was the second token a good one? Suppose we have a *value head*: a
# second output of the model, which guesses what each prefix is worth, $V(s_t)$, one number beside the logits. (Whatever does that,
# a head or a network of its own, is called a *critic*.) Then we also have a guess of what the token
# was worth, which by (1.10) is $Q(s_t,a_t) = \tau\log\frac{\pi(a_t|s_t)}{\pi_b(a_t|s_t)} + V(s_t)$. One step later we know a little more: the reward
# $r_{t+1}$, and the value of where we are now. The difference between the two is the TD error, the paper's (14):
#
# $$\delta_t = r_{t+1} + \gamma V(s_{t+1}) - \left(\tau \log\frac{\pi(a_t|s_t)}{\pi_b(a_t|s_t)} + V(s_t)\right) \tag{5.1}$$
#
# The sum of such errors is what this notebook is about. It is called *generalised advantage estimation* (GAE) in *proximal policy
# optimisation* (PPO), the usual algorithm for training language models by a reward: that makes tokens that went better
# than expected more likely, and takes the sum for *how much better*. Notebook 07 compares the two in full.
#
# After the last token there is no state, so its value is 0. Our batch has three completions of different lengths, with
# padding that is filled with NaN (not a number) on purpose: what is padding must never be read.

# %%
B, T, tau, gamma, lam = 3, 6, 0.4, 0.95, 0.8
lengths = torch.tensor([6, 2, 4])
mask = torch.arange(T) < lengths[:, None]
values, logp, logq = torch.randn(B, T), -torch.rand(B, T), -torch.rand(B, T)
rewards = torch.zeros(B, T)
rewards[torch.arange(B), lengths - 1] = torch.tensor([1.0, -0.5, 2.0])
for x in (rewards, values, logp, logq):
    x[~mask] = torch.nan

out = lambda_returns(rewards, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam)
delta = torch.zeros(B, T)
for b in range(B):
    for t in range(lengths[b]):
        after = values[b, t + 1] if t + 1 < lengths[b] else 0.0
        q = tau * (logp[b, t] - logq[b, t]) + values[b, t]
        delta[b, t] = rewards[b, t] + gamma * after - q
check.equation("5.1", out.td_errors, delta)

# %% [markdown]
# ## Two Qs
#
# In notebook 02 a $Q$ was something else: $Q_\pi(s,a) = r(s,a) + \gamma V_\pi(s')$ by (2.1) is what a token *is* worth if $\pi$ goes on from
# there. The $Q$ in (5.1) is what model and value head *say* it is worth: it is read off $\pi$, $\pi_b$ and $V$, and no reward occurs in
# it. Training is to make the second like the first, and $\delta$ sees the difference. If $V$ is right, it *is* the
# difference; otherwise it is off by $V$'s error at $s'$ (5.3 gives the mean):
#
# $$\delta(s,a) = Q_\pi(s,a) - Q(s,a) \qquad (V = V_\pi) \tag{5.2}$$
#
# **Predict.** Let $V$ be right. Do the two then agree, for every token? On average?
#
# <details><summary>Compare</summary>
#
# On average, yes; for every token, only at the optimum. $Q$ says of *any* model that its choices are the best there are: by (1.10) $\pi$ is
# the Boltzmann policy of $Q$. If $Q = Q_\pi$ throughout, $\pi$ is the Boltzmann policy of its own $Q_\pi$, and that is $\pi^*$ (notebook 02).
#
# </details>
#
# The check takes every state and every token of a small tree, for a random policy.

# %%
tree = every_completion()[0]
other = torch.softmax(tree.ref.log() + torch.randn(tree.ref.shape), -1)
price, discount = 0.3, 0.9

Q_pi, V_pi = tree.evaluate(other, price, discount)
Q_said = action_values(other, V_pi, tree.ref, price)
errors = tree.td_errors(other, V_pi, price, discount)
check.equation("5.2", errors, Q_pi - Q_said)
print("V right: largest |Q_π − Q|", (Q_pi - Q_said).abs().max().item())

Q_star, V_star, best = tree.optimum(price, discount)
check.equation("5.2", action_values(best, V_star, tree.ref, price), Q_star)
print(
    "at the optimum:", tree.td_errors(best, V_star, price, discount).abs().max().item()
)

# %% [markdown]
# For the average take (2.2) and its like for $Q$: the mean of $\tau\log\frac{\pi}{\pi_b}$ under $\pi$ is $\tau D$, in both, and cancels.
#
# $$\sum_a \pi(a|s)\left(Q_\pi(s,a) - Q(s,a)\right) = V_\pi(s) - V(s) \tag{5.3}$$
#
# The check takes values that are wrong.

# %%
nonsense = torch.randn(len(tree.ref))
wrong = Q_pi - action_values(other, nonsense, tree.ref, price)
check.equation("5.3", (other * wrong).sum(-1), V_pi - nonsense)

# %% [markdown]
# ## Many steps ahead
#
# One step ahead we still rely on $V$, which may be wrong. We could wait $n$ steps. Waiting adds the errors that we meet on
# the way, discounted; the values in between cancel in pairs. So an $n$-step estimate of how much better it went is
#
# $$\Delta^{(n)}_t = \sum_{k=0}^{n-1} \gamma^k\,\delta_{t+k} \tag{5.4}$$
#
# **Predict.** What is left of all the values $V$ if $n$ reaches the end of the completion? (The answer is (5.10).)
#
# The check writes out what really happened over two steps in the first completion, without any $\delta$: two rewards, two
# penalties (the one of the first token is in $Q$), and the value two states on.

# %%
q = tau * (logp - logq) + values
two_steps = rewards[0, 0] + gamma * (rewards[0, 1] - tau * (logp[0, 1] - logq[0, 1]))
two_steps = two_steps + gamma**2 * values[0, 2] - q[0, 0]
check.equation("5.4", out.td_errors[0, 0] + gamma * out.td_errors[0, 1], two_steps)

# %% [markdown]
# Which $n$? Instead of choosing, mix them all, with weights that fall by $\lambda$ at each step:
# $(1-\lambda)\lambda^{n-1}$ for $n = 1, 2, \dots$ They sum to 1. Collect what each $\delta_{t+k}$ gets: it occurs in all
# $\Delta^{(n)}$ with $n > k$, whose weights sum to $\lambda^k$. The mixture becomes simple:
#
# $$\Delta_t = \sum_{k \ge 0} (\gamma\lambda)^k\,\delta_{t+k} \tag{5.5}$$
#
# A completion ends. If $M$ errors are left, the estimates with $n \ge M$ are all the same, so the last one gets all the
# remaining weight, $\lambda^{M-1}$.

# %%
mixture = torch.zeros(B, T)
for b in range(B):
    for t in range(lengths[b]):
        M = int(lengths[b]) - t
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, M)] + [lam ** (M - 1)]
        n_step = [
            sum(gamma**k * delta[b, t + k] for k in range(n)) for n in range(1, M + 1)
        ]
        mixture[b, t] = sum(w * x for w, x in zip(weights, n_step))
check.equation("5.5", out.advantages, mixture)
summed = forward_view(out.td_errors, mask, gamma=gamma, lam=lam)
check.equation("5.5", summed, mixture)

# %% [markdown]
# ## Backwards is faster
#
# The sum costs $T^2$. But it contains itself: take out the first term, and a factor $\gamma\lambda$ from the rest.
#
# $$\Delta_t = \delta_t + \gamma\lambda\,\Delta_{t+1} \tag{5.6}$$
#
# One pass from the end to the start. That is the definition in the library:

# %%
source(reference.lambda_returns)
later = torch.cat([out.advantages[:, 1:], torch.zeros(B, 1)], 1)
check.equation("5.6", out.advantages, delta + gamma * lam * later)

# %% [markdown]
# ## In parallel, faster still
#
# A graphics processing unit (GPU) hates waiting for $t+1$. Look at one step of (5.6) as a map, $x \mapsto \delta_t + a\,x$ with
# $a = \gamma\lambda$. Two maps in a row are again such a map:
#
# $$(a_1, b_1)\circ(a_2, b_2) = (a_1 a_2,\; b_1 + a_1 b_2) \tag{5.7}$$
#
# This operation is associative, so one may compose in any grouping, and in parallel. In the first round every position composes its
# map with that of its right neighbour, in the second with what then stands 2 to the right, then 4, then 8. For $T = 4$: position 0
# holds first $\delta_0$, then $\delta_0 + a\delta_1$, then $\delta_0 + a\delta_1 + a^2(\delta_2 + a\delta_3)$. After $\log_2 T$ rounds every
# $\Delta$ is there. Such a *scan* is what the library's GPU kernel does. The check composes two real steps and applies them to the third $\Delta$.

# %%
a1, b1, a2, b2 = gamma * lam, delta[0, 0], gamma * lam, delta[0, 1]
a, b = a1 * a2, b1 + a1 * b2
check.equation("5.7", b + a * out.advantages[0, 2], out.advantages[0, 0])

# %% [markdown]
# ## The target, and PPO's name for it
#
# KLQ (KL-regularised Q-learning) goes a part $\alpha$ of the way from $Q$ to what it saw, the paper's (7):
#
# $$\hat G_t = Q(s_t,a_t) + \alpha\,\Delta_t \tag{5.8}$$

# %%
alpha = 0.3
goals = lambda_returns(
    rewards, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam, alpha=alpha
).targets
check.equation("5.8", goals[mask], (q + alpha * mixture)[mask])

# %% [markdown]
# PPO calls the same sum GAE, and takes it as its advantage $\hat A$: how much better the token was than the state it was chosen in.
# It subtracts the KL from the reward instead of putting it into $Q$. Notebook 07 proves that this is the same; here is a first look.
#
# $$\hat A^{GAE}_t\left(r - \tau\log\tfrac{\pi}{\pi_b}\right) = \Delta_t \tag{5.9}$$

# %%
shaped = kl_shaped_rewards(rewards, logp, logq, tau)
check.equation("5.9", gae(shaped, values, mask, gamma=gamma, lam=lam), mixture)

# %% [markdown]
# > **People ask: is the critic a Q or a V? Why is there a value for every token?**
# >
# > The value head gives $V(s_t)$: what the *prefix* before token $t$ is worth. The Q of a token is that, plus $\tau$ times
# > its log-ratio. There is one value for each token because each token has a prefix. Under the reference itself all Q in a
# > state equal V:

# %%
same = lambda_returns(rewards, values, logp, logp, mask, tau=tau, alpha=0.5)
q_at_reference = same.targets - 0.5 * same.advantages
print("largest |Q − V|:", (q_at_reference - values)[mask].abs().max().item())

# %% [markdown]
# ## What λ trades
#
# $\lambda = 0$ believes $V$ at the next state. $\lambda = 1$ waits for the end and believes one sampled completion. The first is biased
# if $V$ is wrong; the second is right on average but noisy. How biased, how noisy? On a small tree we need not sample: we take
# *all* completions with their probabilities. First, that $\lambda = 1$ is right on average, however wrong $V$ is. Write out the sum
# (5.5) at $\lambda = 1$: each $V(s_{t+1})$ enters once with $+\gamma$ and once, a step later, with a minus. They cancel in pairs (the sum
# *telescopes*) and $V(s_t) + \Delta_t = \sum_k \gamma^k\left(r_{t+k+1} - \tau\log\frac{\pi}{\pi_b}(a_{t+k}|s_{t+k})\right)$. No value is left: that
# answers the question at (5.4). The average of what is left is what the policy is worth from here, in *every* state:
#
# $$\mathbb{E}\left[V(s_t) + \Delta_t \,\middle|\, s_t = s\right] = V_\pi(s) \qquad (\lambda = 1) \tag{5.10}$$
#
# Know the token as well, and its own log-ratio is no longer averaged: it stays, in $Q$. So $\Delta$ at $\lambda = 1$ is a sample of the
# difference between the two Qs, with no need for (5.2)'s true values:
#
# $$\mathbb{E}\left[\Delta_t \,\middle|\, s_t = s,\, a_t = a\right] = Q_\pi(s,a) - Q(s,a) \qquad (\lambda = 1) \tag{5.11}$$
#
# Both are checked in all states, with the same random policy and the same nonsense for $V$.

# %%
tree, states, tokens, tree_rewards, probability = every_completion()
ones = torch.ones_like(states, dtype=torch.bool)
lp, other_lp = tree.ref[states, tokens].log(), other[states, tokens].log()
long = lambda_returns(
    tree_rewards, nonsense[states], other_lp, lp, ones,
    tau=price, gamma=discount, lam=1.0,
).advantages  # fmt: skip
chance = other_lp.sum(1, keepdim=True).exp().expand_as(long)
mean = mean_given((states,), chance, nonsense[states] + long, V_pi.shape)
check.equation("5.10", mean, V_pi)
mean = mean_given((states, tokens), chance, long, Q_pi.shape)
check.equation("5.11", mean, wrong)

# %% [markdown]
# And with $\lambda < 1$? Look at the first token, under the reference itself. The error of the estimate $\hat V = V(s_0) + \Delta_0$ (which is $\hat G$ at $\alpha = 1$, less the log-ratio's part of $Q$) is the sum of
# two parts, for every λ:
#
# $$\mathbb{E}\left[(\hat V - V_\pi)^2\right] = \left(\mathbb{E}[\hat V] - V_\pi\right)^2 + \mathrm{Var}[\hat V] \tag{5.12}$$
#
# **Predict** where the sum is smallest when $V$ is perfect, and when it is useless.

# %%
truth = tree.evaluate(tree.ref, 0.3)[1]
noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
guess = (truth + 0.5 * noise)[states]
mid = lambda_returns(tree_rewards, guess, lp, lp, ones, tau=0.3, lam=0.7)
target = guess[:, 0] + mid.advantages[:, 0]
squared_error = (probability * (target - truth[0]) ** 2).sum()
check.equation("5.12", squared_error, torch.tensor(bias_and_variance(0.7)).sum())

# %%
explore(LAMBDA)

# %% [markdown]
# **Explain.** With a perfect $V$ (wrong = 0) the best λ is 0: why wait for noise? The worse $V$, the more it pays to wait.
# Value heads start out bad: one reason why values near 1, such as 0.95, are common.
#
# ## Exercises
#
# ### Exercise 5.1 · Δ on a padded batch
#
# All tensors have shape [B, T], `mask` is True on real tokens and rows are padded on the right, with NaN or leftovers. `rewards[:, t]`
# holds $r_{t+1}$. Return $\Delta$, zero on padding.
#
# <!-- hints 5.1 -->


# %%
def my_advantages(rewards, values, logprobs, ref_logprobs, mask, tau, gamma, lam):
    # BEGIN SOLUTION
    q = torch.where(mask, tau * (logprobs - ref_logprobs) + values, 0.0)
    r, v = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    next_values = torch.cat([v[:, 1:], torch.zeros(len(v), 1)], 1)
    delta = r + gamma * next_values - q
    result, tail = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        tail = delta[:, t] + gamma * lam * tail
        result[:, t] = tail
    return result
    # END SOLUTION


check.exercise("5.1", my_advantages)

# %% [markdown]
# ### Exercise 5.2 · The scan
#
# From `delta` [T] and a `decay` for each step [T] (0 where an episode ends), return all
# $\Delta_t = \delta_t + \mathrm{decay}_t\,\Delta_{t+1}$ in $\lceil\log_2 T\rceil$ rounds of whole-tensor operations. A loop over $t$ is right, and too
# slow: each step waits for the one before. So the check counts operations, and forbids what takes numbers out of the tensor
# (`.tolist()`, `.numpy()`, `.item()` …): a GPU would have to stop for each of these, and the loop that follows is not counted.
# One round too few is noticed as well, because the decays are close to 1.
#
# <!-- hints 5.2 -->


# %%
def my_scan(delta, decay):
    # BEGIN SOLUTION
    a, b, step = decay, delta, 1
    while step < len(b):
        zeros = torch.zeros(step, dtype=b.dtype)
        b = b + a * torch.cat([b[step:], zeros])
        a = a * torch.cat([a[step:], zeros])
        step *= 2
    return b
    # END SOLUTION


check.exercise("5.2", my_scan)

# %% [markdown]
# ### Open question
#
# In chat models $\gamma = 1$ is usual and the reward comes once, at the end. Is λ still needed, and what would you try first if
# rewards stay flat: raising or lowering it?
#
# *What a good answer contains:* that λ and γ do different things (1 point); bias at an early, bad value head (1); variance
# that grows with length (1); a measurement that decides (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# $\gamma$ changes what we want, λ only how we estimate it, so λ matters at $\gamma = 1$ too. With a reward at the end, small
# λ lets it travel back one state per update through $V$; while $V$ is bad this is slow, so raise λ first. For long texts
# λ = 1 gives every early token the noise of all later ones; when $V$ predicts well, lower it. Compare how much of the targets'
# variance $V$ explains, and the rewards reached, for several λ and seeds.
#
# </details>

# %% [markdown]
# ## Remember
#
# $Q$ is what model and value head say, $Q_\pi$ what a token is worth; on average over the policy they differ by the error of $V$ (5.3).
# $\delta_t$ compares $Q$ with one step of reality (5.1). $\Delta$ adds up later errors with weights $(\gamma\lambda)^k$, as a sum, as a
# recursion, or as a scan (5.5 to 5.7), and at $\lambda = 1$ it is a sample of $Q_\pi - Q$, however wrong $V$ is (5.11); the target goes
# $\alpha$ of the way (5.8). After the last token the value is 0, and padding is never read.
#
# *In the library:* `klq_kernels.lambda_returns`; `klq_edu.core.returns` (`gae`, `forward_view`, `kl_shaped_rewards`).
# *Next:* notebook 06 makes a loss of the target.

# %%
check.ledger()
