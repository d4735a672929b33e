# %% [markdown]
# # 01 · One state: KL-regularised bandits
#
# **What is the best policy near one that you trust?**
#
# *After this notebook you can* derive the policy that best trades reward against straying from a reference; compute
# its value without overflow; go back from a policy to the rewards it is optimal for; say what the coefficient τ
# costs, in which units; and explain why one direction of the divergence is charged and not the other.
#
# *You need* probabilities, logarithms, a little Python. *Time:* <!-- minutes --> minutes. *Symbols:* $\pi$ policy, $\pi_b$ reference
# policy, $Q$ action value (here: reward), $\tau$ price of divergence, $D$ Kullback–Leibler divergence (KL), $V$ value.

# %%
import torch

from klq_edu.core.improvement import action_values, boltzmann, kl_penalised_argmax
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, source, start
from klq_edu.course.chapters.c01_one_state import BANDIT, REF, REWARDS, WORDS, trade
from klq_kernels.reference import kl_divergence

check = start("01")

# %% [markdown]
# ## A scorer with one blind spot
#
# A language model has written *"The soup was"* and is about to write one last word. Four are possible. The model that
# we were given, the **reference** $\pi_b$, has learnt from people and says *fine* half of the time. A **reward model**
# scores the word. It likes praise, and it has a blind spot: the gibberish *zxqv*, which hardly anybody ever says, happens
# to get the highest score of all.

# %%
ref, q = torch.tensor(REF), torch.tensor(REWARDS)
for word, p, reward in zip(WORDS, ref.tolist(), q.tolist()):
    print(f"{word:>8}  reference {p:4.2f}  reward {reward:+.1f}")
print(f"\nThe reference earns {(ref * q).sum():.2f} on average.")

# %% [markdown]
# **Predict.** If we looked for the policy with the highest expected reward and nothing else, what would it say after
# *"The soup was"*? And if it may not stray too far from $\pi_b$, what would you want it to say?
#
# <details><summary>Compare</summary>
#
# Reward alone: *zxqv*, always. That is called reward hacking, and it is why one rarely trains on a learnt reward alone.
# What we want is *superb*, often, and *zxqv* rarely: rewards are believed where the reference gives them a chance, and
# doubted where it does not.
#
# </details>
#
# ## What straying costs
#
# We need a number for "how far is $\pi$ from $\pi_b$". The Kullback–Leibler divergence is the average, over what $\pi$
# *says*, of the logarithm of how many times more likely $\pi$ finds it than $\pi_b$ does:
#
# $$D(\pi\|\pi_b) = \sum_a \pi(a)\,\log\frac{\pi(a)}{\pi_b(a)} \tag{1.1}$$
#
# Here $0\log 0 = 0$, and throughout $\pi_b > 0$. Its unit is the *nat* (the natural logarithm's bit). The library's function uses another, numerically safer form;
# let us see whether it agrees with the formula as it stands here.

# %%
policy = torch.softmax(torch.randn(4), 0)
typed = sum(p * torch.log(p / b) for p, b in zip(policy, ref))
check.equation("1.1", kl_divergence(policy.log(), ref.log()), typed)

# %% [markdown]
# It is never negative, and the reason is one line. The logarithm lies below its tangent at 1, that is
# $\log x \le x - 1$. Put $x = \pi_b(a)/\pi(a)$ and average over $\pi$:
#
# $$-D(\pi\|\pi_b) = \sum_a \pi(a)\,\log\frac{\pi_b(a)}{\pi(a)} \;\le\; \sum_a \pi(a)\left(\frac{\pi_b(a)}{\pi(a)} - 1\right) = 1 - 1 = 0 \tag{1.2}$$
#
# The tangent touches only at $x = 1$, so the divergence is 0 only where $\pi = \pi_b$. A thousand random policies agree:

# %%
policies = torch.softmax(3 * torch.randn(1000, 4), -1)
divergences = kl_divergence(policies.log(), ref.log().expand(1000, 4))
check.inequality("1.2", -divergences, (policies * (ref / policies - 1)).sum(-1))
print(f"smallest of them: {divergences.min():.4f} nats")
print(f"π_b against itself: {kl_divergence(ref.log(), ref.log()):.4f} nats")

# %% [markdown]
# ## The objective
#
# Reward, minus the divergence at a price of $\tau$ per nat:
#
# $$J(\pi) = \sum_a \pi(a)\,Q(a) \;-\; \tau\, D(\pi\|\pi_b) \tag{1.3}$$
#
# A word is the smallest "text" there is, so the library can compute the same number from the other end: as the
# objective of a token tree of depth one, the class that later notebooks will grow into whole sentences.

# %%
tau = 1.2
tree = TokenTree.grow(
    4, 1, ref=lambda prefix: ref, reward=lambda text: q[text[-1]].item()
)
check.equation(
    "1.3", tree.objective(policy[None], tau), (policy * q).sum() - tau * typed
)

# %% [markdown]
# ## The best policy, in three moves
#
# No calculus and no Lagrange multipliers are needed. **First move:** put everything under one sum. Since
# $Q = \tau \log e^{Q/\tau}$, reward and divergence merge into one logarithm:
#
# $$J(\pi) = -\tau \sum_a \pi(a)\,\log\frac{\pi(a)}{\pi_b(a)\,e^{Q(a)/\tau}} \tag{1.4}$$

# %%
one_sum = (policy * (policy / (ref * (q / tau).exp())).log()).sum()
check.equation("1.4", tree.objective(policy[None], tau), -tau * one_sum)

# %% [markdown]
# That looks like a divergence, but what stands in the denominator does not sum to 1. **Second move:** make it. Divide
# by its sum $Z$ and call the result the **Boltzmann policy** of $Q$:
#
# $$\pi_Q(a) = \frac{\pi_b(a)\,e^{Q(a)/\tau}}{Z}, \qquad Z = \sum_a \pi_b(a)\,e^{Q(a)/\tau} \tag{1.5}$$

# %%
weights = ref * (q / tau).exp()
Z = weights.sum()
check.equation("1.5", boltzmann(q, ref, tau)[0], weights / Z)

# %% [markdown]
# **Third move:** write $\pi_b\,e^{Q/\tau} = Z\,\pi_Q$ in (1.4). The logarithm of $Z$ comes out of the sum, because
# $\sum_a \pi(a) = 1$, and what stays behind is a divergence:
#
# $$J(\pi) = \tau \log Z \;-\; \tau\, D(\pi\|\pi_Q) \tag{1.6}$$
#
# This line is worth learning by heart. It holds for *every* policy, and it has only one place where $\pi$ occurs.

# %%
best = boltzmann(q, ref, tau)[0]
every = torch.stack([tree.objective(p[None], tau) for p in policies])
to_best = kl_divergence(policies.log(), best.log().expand(1000, 4))
check.equation("1.6", every, tau * Z.log() - tau * to_best)

# %% [markdown]
# By (1.2) the divergence is at least 0, and 0 only at $\pi = \pi_Q$. So $\pi_Q$ is *the* best policy, and what it
# attains is called the **soft value**, or Boltzmann value, of $Q$:
#
# $$V_Q = \max_\pi J(\pi) = \tau \log \sum_a \pi_b(a)\,e^{Q(a)/\tau} \tag{1.7}$$
#
# "Soft", because it is a smooth relative of the maximum: words with small reward or small reference probability count
# a little, not nothing. The check evaluates the objective at the Boltzmann policy; then a thousand rivals try.

# %%
soft_value = boltzmann(q, ref, tau)[1]
check.equation("1.7", tree.objective(best[None], tau), soft_value)
print(f"soft value {soft_value:.4f}, best of 1000 random rivals {every.max():.4f}")
assert (every <= soft_value).all()

# %% [markdown]
# ## In the library
#
# Two functions: the Boltzmann policy, and below it the workhorse, which allows several references $p_i$, each with a price
# $c_i$ of its own. With one reference it is (1.5) and (1.7). Notebook 07 needs two, for proximal policy optimisation (PPO).

# %%
source(boltzmann)
source(kl_penalised_argmax)

# %% [markdown]
# ## Try it
#
# **Predict** before you move the sliders: at which price $\tau$ does *zxqv* take over? What happens to that price if
# its reward rises by 1?

# %%
explore(BANDIT)

# %% [markdown]
# **Explain.** Between *superb* and *zxqv* the odds are $\tfrac{0.19}{0.01}\,e^{(2-4)/\tau}$. They are even where
# $\tau = 2/\log 19 \approx 0.68$: above, the reference's doubt wins, below, the reward's enthusiasm. A reward higher by 1
# moves that price to $3/\log 19 \approx 1.02$. So a penalty protects only if it is high enough, and nothing in the
# mathematics says what is enough: it depends on how far the reward can be trusted.
#
# At the two ends the soft value becomes something familiar:
#
# $$\lim_{\tau\to 0} V_Q = \max_a Q(a), \qquad \lim_{\tau\to\infty} V_Q = \sum_a \pi_b(a)\,Q(a) \tag{1.8}$$
#
# The first, because the largest exponential dwarfs all others. The second, because $e^x \approx 1 + x$ and
# $\log(1 + x) \approx x$ for small $x$: $\tau\log\sum_a\pi_b e^{Q/\tau} \approx \tau\log(1 + \sum_a\pi_b Q/\tau) \approx \sum_a\pi_b Q$.
# The check stops at $\tau = 10^{-13}$ and $10^6$, where what is left is of the order of $10^{-6}$.

# %%
cold, hot = boltzmann(q, ref, 1e-13)[1], boltzmann(q, ref, 1e6)[1]
ends = torch.stack([q.max(), (ref * q).sum()])
check.equation("1.8", torch.stack([cold, hot]), ends, tol=1e-5)

# %% [markdown]
# ## What τ is: the exchange rate of a nat
#
# Walk along the grey curve of the figure. Each $\tau$ gives a point: KL paid, $D(\tau)$, and reward earned, $R(\tau)$.
# At the optimum of $R - \tau D$ no small step along the curve may help, so the slope of the curve there must be $\tau$:
#
# $$\frac{\mathrm{d}R}{\mathrm{d}D} = \frac{R'(\tau)}{D'(\tau)} = \tau \tag{1.9}$$
#
# Both derivatives can be had: $D'(\tau) = -\mathrm{Var}_{\pi_Q}(Q)/\tau^3$, which is negative (a higher price buys less
# KL, always), and $R'(\tau) = -\mathrm{Var}_{\pi_Q}(Q)/\tau^2$. One more nat of KL buys $\tau$ of reward, at the margin. That is what you choose when you set `kl_coef` in a trainer.
# We check it by finite differences, which know nothing of the argument.

# %%
slopes = []
for t in (0.3, 0.5, 1.0, 3.0):
    kl_low, reward_low = trade(q, ref, t * (1 - 1e-4))
    kl_high, reward_high = trade(q, ref, t * (1 + 1e-4))
    slopes.append((reward_high - reward_low) / (kl_high - kl_low))
check.equation(
    "1.9", torch.tensor(slopes), torch.tensor([0.3, 0.5, 1.0, 3.0]), tol=1e-6
)

# %% [markdown]
# ## The way back: every policy is optimal for something
#
# So far: rewards in, policy out. Solve (1.5) for $Q$, with $\tau \log Z = V$:
#
# $$Q(a) = \tau \log\frac{\pi(a)}{\pi_b(a)} + V \tag{1.10}$$
#
# Read it from right to left. Take *any* policy $\pi > 0$ and *any* number $V$. They make an action-value function $Q$, whose
# Boltzmann policy is $\pi$ and whose soft value is $V$. Nothing is lost in either direction: four values $Q$ on one side, and
# on the other a policy (three free numbers, since it sums to 1) and a $V$. The paper's equation (13) says just this,
# and KLQ (KL-regularised Q-learning) lives on it: **a language model with a number for each state *is* a Q-function**.

# %%
V = torch.tensor(-1.7)
Q = action_values(policy, V, ref, tau)
policy_again, V_again = boltzmann(Q, ref, tau)
check.equation("1.10", policy_again, policy)
check.equation("1.10", V_again, V)

# %% [markdown]
# > **People ask: is KL a distance? Does its direction matter?**
# >
# > It is no distance: $D(\pi\|\pi_b) \ne D(\pi_b\|\pi)$. The one we charge averages over what *our* policy says. A policy
# > that never says *fine* pays a finite price for it; with the arguments swapped it would pay infinitely much.

# %%
silent = torch.tensor([0.0, 0.4, 0.6, 0.0])
print(f"D(π‖π_b) = {kl_divergence(silent.log(), ref.log()):.3f} nats")
print(f"D(π_b‖π) = {kl_divergence(ref.log(), silent.log()):.3f} nats")

# %% [markdown]
# Both are used in practice, and confused. The first lets a policy drop what earns little, but hardly lets it say what
# the reference never says; the second insists that it keep saying everything. Reinforcement learning from human
# feedback (RLHF) charges the first, for three reasons: it is an average over texts that the policy itself writes, so it can be
# estimated while training; over the tokens of a text it adds up (notebook 03); and its best policy has the closed form (1.5).
#
# ## Exercises
#
# Write the function, run the cell, read what the check says. A wrong answer that others gave before you is recognised.
#
# ### Exercise 1.1 · The soft value, without overflow
#
# Compute $V_Q$ of (1.7) from tensors `q` and `ref` of shape [A] (one entry per action) and a number `tau`. Real rewards may be large: the
# check tries some near 1000, where $e^{Q/\tau}$ is infinite for a computer.
#
# <!-- hints 1.1 -->


# %%
def my_soft_value(q, ref, tau):
    # BEGIN SOLUTION
    return tau * torch.logsumexp(ref.log() + q / tau, -1)
    # END SOLUTION


check.exercise("1.1", my_soft_value)

# %% [markdown]
# ### Exercise 1.2 · The best policy
#
# Compute $\pi_Q$ of (1.5), a tensor of shape [A].
#
# <!-- hints 1.2 -->


# %%
def my_best_policy(q, ref, tau):
    # BEGIN SOLUTION
    return torch.softmax(ref.log() + q / tau, -1)
    # END SOLUTION


check.exercise("1.2", my_best_policy)

# %% [markdown]
# ### Exercise 1.3 · Which τ spends the budget?
#
# People who train language models often think in KL ("stay within 10 nats") and not in prices. Find, for a given
# `budget` in nats, the $\tau$ between 0.001 and 1000 at which $D(\pi_Q\|\pi_b)$ equals the budget, to six significant
# digits. Return a number. (The check only asks for budgets that can be spent.)
#
# <!-- hints 1.3 -->


# %%
def my_temperature(q, ref, budget):
    # BEGIN SOLUTION
    low, high = torch.tensor(1e-3).log(), torch.tensor(1e3).log()
    for _ in range(60):
        middle = (low + high) / 2
        policy = torch.softmax(ref.log() + q / middle.exp(), -1)
        if (policy * (policy / ref).log()).sum() > budget:
            low = middle
        else:
            high = middle
    return middle.exp()
    # END SOLUTION


check.exercise("1.3", my_temperature)
# %% [markdown]
# ### Open question
#
# A colleague says: "I set $\tau = 0$ and stop training early, before the policy has gone far. That is the same as a
# small KL penalty, and simpler." Agree or disagree, in five sentences, with a computation on our four words.
#
# *What a good answer contains:* where training with $\tau = 0$ would end (1 point); that early stopping and a penalty
# both bound the KL, so the idea is not foolish (1); that the paths differ, and which point of the grey curve each
# reaches (2); a computation (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# Both keep the KL finite, and on this bandit they even follow the same curve if the steps are exact: repeated steps
# $\pi \propto \pi_{old}\,e^{\eta Q}$ from $\pi_b$ give $\pi_b\,e^{k\eta Q}$ after $k$ of them, which is the Boltzmann policy at
# $\tau = 1/(k\eta)$. So stopping after $k$ steps chooses a $\tau$. But the colleague must know when to stop, and if nobody
# stops it the policy ends at *zxqv*; with a penalty it ends at the Boltzmann policy of that τ, and training longer does no harm. With
# sampled, clipped or adaptive steps the path leaves the curve, and then it earns less reward for the same KL. The computation:
# `trade(q, ref, 1 / (k * eta))` for k = 1, 2, 3 and η = 0.5 gives the points where stopping after k steps ends; they are
# points of the grey curve, at τ = 2, 1 and 0.67, and the last is where *zxqv* takes over.
#
# </details>

# %% [markdown]
# ## Remember
#
# $J(\pi) = \tau \log Z - \tau D(\pi\|\pi_Q)$ for every policy (1.6): that gives the best policy, its value, and the proof
# that nothing is better. The price $\tau$ is the reward that one more nat must earn. And (1.10): a policy and a value
# *are* a Q-function.
#
# *In the library:* `klq_edu.core.improvement.boltzmann`, `action_values`, `kl_penalised_argmax`;
# `klq_kernels.reference.kl_divergence`. *Next:* in notebook 02 a word is followed by another, and the soft value of the
# next state becomes part of the reward of this one.

# %%
check.ledger()
