# %% [markdown]
# # 02 · Soft Bellman equations
#
# **What is the best policy when each choice decides which choices come next?**
#
# *After this notebook you can* evaluate a policy step by step from the end; say where the divergence is charged and why;
# compute the optimal soft values; and prove that alternating evaluation and improvement gets there.
#
# *You need* notebook 01. *Time:* <!-- minutes --> minutes. *Symbols:* $s$ state, $a$ action, $s'$ the state that follows, $r(s,a)$ reward,
# $\gamma \le 1$ discount (a reward one step later counts $\gamma$ times as much; for texts usually 1), $Q_\pi, V_\pi$ values of a policy, $Q^*, V^*$ optimal values, $\tau$ price of the Kullback–Leibler divergence
# (KL) $D$ to the reference $\pi_b$.

# %%
import torch

from klq_edu.core.improvement import boltzmann, soft_policy_iteration
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, source, start
from klq_edu.course.chapters.c02_soft_bellman import VALUES, maze

check = start("02")

# %% [markdown]
# ## A prize behind a door
#
# Two tokens, 0 and 1, four steps, and the score is paid with the last token. Every 0 in a text earns 0.25. But the text 1111
# earns 3. The reference starts with a 1 in one text out of five; after that both tokens are equally likely.
#
# A `TokenTree` holds all prefixes of such texts: row $i$ of `tree.ref` and `tree.rewards` is the state `tree.prefixes[i]`, a column
# is a token; `tree.children[i, a]` is the row of the state that follows, or −1 where the text ends; `tree.leaves` are the
# (state, token) pairs that end a text. With so few texts every expectation is a sum.

# %%
tree, tau, gamma = maze(), 0.5, 0.9
texts = tree.completions()
states, tokens = tree.leaves
scores, prior = tree.rewards[states, tokens], tree.sequence_distribution(tree.ref)
for text, r, p in zip(texts, scores.tolist(), prior.tolist()):
    if text in ((0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 0), (1, 1, 1, 1)):
        print(text, f"earns {r:.2f}, probability under the reference {p:.3f}")
path = [tree.ref[tree.prefixes.index((1,) * t), 1].item() for t in range(4)]
print("token by token along 1111:", path)
prize = texts.index((1, 1, 1, 1))
chance, others = prior[prize], torch.arange(16) != prize
print(f"all other texts: probability {1 - chance:.3f}", end=", ")
mean = (prior * scores)[others].sum() / (1 - chance)
print(f"mean score {mean:.2f}, at most {scores[others].max()}")

# %% [markdown]
# **Predict:** at which price $\tau$ does the best policy still go for the prize, that is, write 1111 more often than all other
# texts together? Take $\gamma = 1$, where only the score of a text counts. A pencil will do: treat the others as *one* word that earns
# their mean. Notebook 01 had the odds of two words, $\tfrac{\pi_b(a)}{\pi_b(a')}\,e^{(Q(a) - Q(a'))/\tau}$. (The estimate is below.)
#
# ## What a policy is worth
#
# In notebook 01 a state was worth its expected reward, less the KL at price $\tau$. Now a token earns its reward $r$ *and*
# brings us to another state, which has a worth of its own. Put that into $Q$:
#
# $$Q_\pi(s,a) = r(s,a) + \gamma\,V_\pi(s') \tag{2.1}$$
#
# $$V_\pi(s) = \sum_a \pi(a|s)\,Q_\pi(s,a) - \tau\,D(\pi\|\pi_b)(s) \tag{2.2}$$
#
# Each needs the other, one step later. At the end of a text there is no later, so we start there and work back.

# %%
policy = torch.softmax(tree.ref.log() + torch.randn(tree.ref.shape), -1)
Q, V = tree.evaluate(policy, tau, gamma)
follows = torch.where(tree.children >= 0, V[tree.children], 0.0)
check.equation("2.1", Q, tree.rewards + gamma * follows)
divergence = (policy * (policy / tree.ref).log()).sum(-1)
check.equation("2.2", V, (policy * Q).sum(-1) - tau * divergence)

# %% [markdown]
# These two lines only say that the numbers are consistent. Are they what we want: the average, over all texts, of
# what is earned and paid along the way (the *return*)? From a first token on, the paper's (1) charges the KL of the *next*
# states, those after the end being worth 0:
#
# $$Q_\pi(s_0,a_0) = \mathbb{E}_\pi\left[\,\sum_{k \ge 0} \gamma^k\left(r_{k+1} - \tau\gamma\,D(\pi\|\pi_b)(s_{k+1})\right)\,\middle|\,s_0,a_0\right] \tag{2.3}$$
#
# We enumerate all texts that begin with each token, and add up by hand (here only the last token earns anything).

# %%
where = {prefix: state for state, prefix in enumerate(tree.prefixes)}
returns = torch.zeros(2)
for text in texts:
    path = [where[text[:t]] for t in range(4)]
    probability = torch.stack([policy[s, a] for s, a in zip(path, text)])[1:].prod()
    G = gamma**3 * tree.rewards[path[3], text[3]]
    for k in range(3):
        G = G - gamma**k * tau * gamma * divergence[path[k + 1]]
    returns[text[0]] += probability * G
check.equation("2.3", Q[0], returns)

# %% [markdown]
# > **People ask: why is the KL of the present choice not part of $Q$? Is it forgotten, or paid twice?**
# >
# > $Q(s,a)$ asks: suppose $a$ is chosen, what then? The price of choosing concerns the whole distribution $\pi(\cdot|s)$, not
# > one token, so it is paid in $V(s)$, once. Count: each state's KL is charged with its own discount, exactly once.

# %%
first_kl = tau * divergence[0]
print(
    f"V(s0) = {V[0]:.4f}, mean of Q − τD = {(policy[0] * returns).sum() - first_kl:.4f}"
)

# %% [markdown]
# ## The best policy
#
# If we knew the best values of all later states, each state would be a bandit with rewards $Q^*$, and notebook 01 tells
# what to do: take the Boltzmann policy. Its soft value is the value of the state:
#
# $$V^*(s) = \tau \log \sum_a \pi_b(a|s)\,e^{Q^*(s,a)/\tau}, \qquad Q^*(s,a) = r(s,a) + \gamma V^*(s') \tag{2.4}$$
#
# Again from the end to the start, once. No iteration.

# %%
source(TokenTree.optimum)
Q_best, V_best, best = tree.optimum(tau, gamma)
check.equation("2.4", V_best, tau * (tree.ref * (Q_best / tau).exp()).sum(-1).log())
after = torch.where(tree.children >= 0, V_best[tree.children], 0.0)
check.equation("2.4", Q_best, tree.rewards + gamma * after)

# %% [markdown]
# Is that really the best of all policies, and not only in each state by itself?
#
# $$V_\pi(s) \le V^*(s) \qquad \text{for all } \pi, s \tag{2.5}$$
#
# Yes, by working back from the end. Suppose $V_\pi \le V^*$ holds in all next states. Then $Q_\pi \le Q^*$ by (2.1), so
# $V_\pi(s) = \sum_a \pi Q_\pi - \tau D \le \sum_a \pi Q^* - \tau D$, and by (1.6) no policy makes the right side larger than $V^*(s)$. Two
# hundred random rivals agree in every state:

# %%
rivals = [torch.softmax(2 * torch.randn(tree.ref.shape), -1) for _ in range(200)]
worths = torch.stack([tree.evaluate(p, tau, gamma)[1] for p in rivals])
check.inequality("2.5", worths, V_best.expand_as(worths))
check.equation("2.5", tree.evaluate(best, tau, gamma)[1], V_best)

# %%
explore(VALUES)

# %% [markdown]
# Now the price. The pencil first: the odds are even where the logarithm of how much rarer the prize is equals what it earns
# more, divided by $\tau$. Then the truth.

# %%
more, rarer = scores[prize] - mean, (1 - chance) / chance
pencil = more / rarer.log()
print(f"pencil: τ = {more:.2f} / log {rarer:.0f} = {pencil:.2f}")


def share(price):
    """How often the best policy writes 1111, at γ = 1."""
    return tree.sequence_distribution(tree.optimum(price)[2])[prize].item()


for price in (0.4, 0.5, 0.6, 0.7, 0.8):
    print(f"τ = {price}: 1111 with probability {share(price):.2f}")
assert share(0.6) > 0.5 > share(pencil)

# %% [markdown]
# **Explain.** The prize is as likely as all other texts together at a price between 0.6 and 0.7, a little below the pencil's: the
# best policy does not take the others as they come, it prefers those that earn more than their mean. Above that price, the first
# step that the reference dislikes costs more than the prize is worth.
#
# ## With γ = 1 it is a bandit after all
#
# There is a second way to look at texts: one choice among all of them, with the score $R(y)$ as reward. For $\gamma = 1$ rewards and
# log-ratios simply add up along a text, so both views must agree. The best distribution over *texts* is Boltzmann's,
#
# $$\pi^*(y) = \frac{\pi_b(y)\,e^{R(y)/\tau}}{\sum_{y'} \pi_b(y')\,e^{R(y')/\tau}} \tag{2.6}$$

# %%
_, V_one, best_one = tree.optimum(tau)
weights = prior * (scores / tau).exp()
check.equation("2.6", tree.sequence_distribution(best_one), weights / weights.sum())

# %% [markdown]
# and the value of the beginning is the soft value of the scores:
#
# $$V^*(s_0) = \tau\log\sum_y \pi_b(y)\,e^{R(y)/\tau} \tag{2.7}$$
#
# The best language model is the reference, reweighted by the exponential of the reward. Everything in reinforcement learning from
# human feedback (RLHF) with a KL penalty is a way to get near this distribution without summing over all texts.

# %%
check.equation("2.7", V_one[0], tau * weights.sum().log())

# %% [markdown]
# ## Getting there by improvement
#
# In practice we know the best values of no state. But we can **evaluate** the policy we have (from texts that it writes:
# notebook 05), and then **improve** it: in each state take the Boltzmann policy of $Q_\pi$. That never hurts:
#
# $$V_\pi(s) \le V_{\pi'}(s), \qquad \pi' \propto \pi_b\,e^{Q_\pi/\tau} \tag{2.8}$$
#
# By (1.6), $V_\pi(s) \le \sum_a \pi' Q_\pi - \tau D(\pi'\|\pi_b)(s)$: choose by $\pi'$ now and by $\pi$ afterwards, and nothing is lost. But
# $Q_\pi$ contains $\gamma V_\pi(s')$. Bound that in the same way: $\pi'$ now and once more, $\pi$ afterwards. And so on to the end, where
# $\pi$ has nothing left to choose and what stands there is $V_{\pi'}(s)$.

# %%
improved = boltzmann(Q, tree.ref, tau)[0]
check.inequality("2.8", V, tree.evaluate(improved, tau, gamma)[1])

# %% [markdown]
# And it arrives. States before the last token are bandits: one *sweep* (evaluate, then improve every state) makes them
# optimal. Then the states before those, and so on. On a tree of depth $T$ it takes $T$ sweeps, exactly:
#
# $$\pi_T = \pi^* \tag{2.9}$$

# %%
source(soft_policy_iteration)
policies = soft_policy_iteration(tree, tau, 4, gamma)
for k, p in enumerate(policies):
    gap = V_best[0] - tree.objective(p, tau, gamma)
    print(f"after {k} sweeps: {gap:.2e} below the optimum")
check.equation("2.9", policies[4], best)

# %% [markdown]
# Where texts never end there is no last token, but $\gamma < 1$ helps. Write $(\mathcal{B}V)(s)$ for the soft value (2.4) of $s$ when a
# guess $V$ stands in the place of $V^*(s')$: a soft *backup*. Applied to two different guesses it brings them closer by a factor of
# $\gamma$ at least, because the logarithm of a mean of exponentials changes no more than its arguments do, and those change by
# $\gamma\,|V - V'|$. So repeated backups converge to $V^*$ from any start:
#
# $$\max_s\left|(\mathcal{B}V)(s) - (\mathcal{B}V')(s)\right| \le \gamma\,\max_s\left|V(s) - V'(s)\right| \tag{2.10}$$


# %%
def soft_backup(V):
    after = torch.where(tree.children >= 0, V[tree.children], 0.0)
    return boltzmann(tree.rewards + gamma * after, tree.ref, tau)[1]


one, other = torch.randn(2, len(V))
gap_after = (soft_backup(one) - soft_backup(other)).abs().max()
check.inequality("2.10", gap_after, gamma * (one - other).abs().max())

# %% [markdown]
# ## Exercises
#
# ### Exercise 2.1 · One soft backup
#
# For one state: from `rewards` $r(s,a)$, `next_values` $V^*(s')$ and `ref`, each of shape [A], the optimal soft value $V^*(s)$, a number.
#
# <!-- hints 2.1 -->


# %%
def my_backup(rewards, next_values, ref, tau, gamma):
    # BEGIN SOLUTION
    Q = rewards + gamma * next_values
    return tau * torch.logsumexp(ref.log() + Q / tau, -1)
    # END SOLUTION


check.exercise("2.1", my_backup)

# %% [markdown]
# ### Exercise 2.2 · The best distribution over texts
#
# From the `scores` and reference probabilities `ref` of all texts, each [n], and `tau`: return the pair (best distribution (2.6), its
# value (2.7)).
#
# <!-- hints 2.2 -->


# %%
def my_best_texts(scores, ref, tau):
    # BEGIN SOLUTION
    weights = ref.log() + scores / tau
    return torch.softmax(weights, -1), tau * torch.logsumexp(weights, -1)
    # END SOLUTION


check.exercise("2.2", my_best_texts)

# %% [markdown]
# ### Open question
#
# (2.6) suggests another way to the best policy: sample many texts from the reference and keep them with
# probability proportional to $e^{R/\tau}$. Why train at all?
#
# *What a good answer contains:* when this is exact (1 point); how many samples it needs, in terms of the KL (2); what training
# gives that it does not (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# Keeping a text with probability $e^{(R-R_{max})/\tau}$ is rejection sampling, exact for every text that is kept, if the largest score
# is known. But a text that the best policy likes is rare under the reference: it takes $\max_y \pi^*(y)/\pi_b(y)$ samples per kept text on
# average. A maximum is at least a mean, so that is at least $e^{D}$, where $D$ is the KL of the best policy: for ten nats 22,000 samples
# or more for each text written, every time.
# Training pays once, and its network carries what it learnt over to new prompts.
#
# </details>

# %% [markdown]
# ## Remember
#
# $Q$ looks one step ahead (2.1), $V$ averages and pays for the choice (2.2). The best values are soft maxima (2.4); over whole
# texts the best policy is the reference times $e^{R/\tau}$ (2.6). Evaluating and improving in turns never makes things worse (2.8) and
# arrives (2.9).
#
# *In the library:* `klq_edu.core.tree.TokenTree` (`evaluate`, `optimum`), `klq_edu.core.improvement.soft_policy_iteration`.
# *Next:* notebook 03 takes a closer look at texts as such trees.

# %%
check.ledger()
