# %% [markdown]
# # 03 · Text generation is an MDP
#
# **What are the states, actions and rewards of a language model?**
#
# *After this notebook you can* read a text as a path through a Markov decision process (MDP); compute its probability and its
# Kullback–Leibler divergence (KL) token by token; put the reward where it belongs; and handle end and padding
# without mistakes.
#
# *You need* notebooks 01 and 02. *Time:* <!-- minutes --> minutes. *Symbols:* $x$ prompt, $y$ completion, $s_t = (x, y_{1:t})$ state,
# $a_t = y_{t+1}$ action, $R(x,y)$ score of a whole completion, $\Pr(s)$ probability that $\pi$ reaches $s$, $D(\pi\|\pi_b)(s)$ KL in a
# state. Here $\gamma = 1$ throughout.

# %%
import pandas as pd
import torch

from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, source, start
from klq_edu.course.chapters.c03_text_as_mdp import PATH, WORDS, small_tree
from klq_kernels.reference import masked_mean

check = start("03")

# %% [markdown]
# ## Prefixes and next tokens
#
# A language model writes from left to right. What it knows when it chooses is the **prefix**: that is the state.
# What it chooses is the **next token**: that is the action. And the next state is the prefix with the token
# appended, with certainty. No dice are thrown except by the model itself. (*Markov* means: the future depends on the present
# state only. Here that is true by construction, because the state is everything written so far.)
#
# Here is a language with three tokens, one of which, *end of sequence* (EOS), ends the text; after three tokens it ends anyway.

# %%
tree, policy = small_tree()
texts = tree.completions()
print(f"{len(tree.prefixes)} states, {len(texts)} possible texts, for example")
for text in texts[:3] + texts[-2:]:
    print("   ", " ".join(WORDS[token] for token in text))

# %% [markdown]
# **Predict.** The tree branches three ways at each of three steps. Why are there not 27 texts?
#
# <details><summary>Compare</summary>
#
# After EOS nothing branches. One text is EOS alone, two have one word before it, and 4 · 3 = 12 have two words and any third
# token: 15 texts, and 1 + 2 + 4 = 7 states in which there is something to choose.
#
# </details>
#
# ## How likely is a text?
#
# Step by step: the probability of the first token, times that of the second after it, and so on. In logarithms,
# a sum:
#
# $$\log\pi(y|x) = \sum_{t} \log\pi(a_t|s_t) \tag{3.1}$$
#
# The library multiplies its way down the tree, for all texts at once. We walk each path by hand.


# %%
def walk(text):
    """(state, token) pairs of a text."""
    state, path = 0, []
    for token in text:
        path.append((state, token))
        state = tree.children[state, token].item()
    return path


by_hand = torch.stack([sum(policy[s, a].log() for s, a in walk(y)) for y in texts])
check.equation("3.1", tree.sequence_distribution(policy).log(), by_hand)

# %% [markdown]
# Every way of going on is counted once, early ends included, so all texts together have probability one:
#
# $$\sum_y \pi(y|x) = 1 \tag{3.2}$$

# %%
check.equation("3.2", by_hand.exp().sum(), 1.0)
explore(PATH)

# %% [markdown]
# ## What a text is worth
#
# A reward model reads whole texts. So the score $R$ arrives once, with the last token, and every other reward is 0.
# The expected score sums over texts, or, equally, over steps weighted by how often they are taken:
#
# $$\mathbb{E}_{y\sim\pi}[R(x,y)] = \sum_{s,a} \Pr(s)\,\pi(a|s)\,r(s,a) \tag{3.3}$$

# %%
scores = torch.tensor([sum({1: 1.0, 2: -1.0}.get(a, 0.0) for a in y) for y in texts])
check.equation("3.3", tree.expected_reward(policy), (by_hand.exp() * scores).sum())

# %% [markdown]
# > **People ask: why is the reward only on the last token?**
# >
# > Because that is when it is known. With γ = 1 only the sum of a text's rewards matters to the objective: shares that add up to
# > the score leave the best policy as it is, others may change it. And no shares are needed, since values carry the score back to
# > earlier states. Here are the values of the prefixes on the way to one text.

# %%
values = tree.evaluate(policy, tau=0.5)[1]
for state, token in walk((1, 1, 2)):
    prefix = " ".join(WORDS[a] for a in tree.prefixes[state]) or "nothing"
    print(f"V({prefix}) = {values[state]:+.3f}, then {WORDS[token]}")

# %% [markdown]
# ## The divergence of texts
#
# How far is $\pi$ from the reference $\pi_b$, over whole texts? Insert (3.1) into the definition: the logarithm of a ratio of
# products is a sum of log-ratios, one for each token. Average each over its own choice, given the state in which it is
# made, and it becomes the KL of that state, $D(\pi\|\pi_b)(s) = \sum_a \pi(a|s)\log\frac{\pi(a|s)}{\pi_b(a|s)}$. So the KL of texts is the
# KL of states, summed along the way:
#
# $$D\left(\pi(y|x)\,\|\,\pi_b(y|x)\right) = \mathbb{E}_\pi\left[\sum_t D(\pi\|\pi_b)(s_t)\right] = \sum_s \Pr(s)\,D(\pi\|\pi_b)(s) \tag{3.4}$$

# %%
source(TokenTree.sequence_kl)
reference = torch.stack([sum(tree.ref[s, a].log() for s, a in walk(y)) for y in texts])
over_texts = (by_hand.exp() * (by_hand - reference)).sum()
check.equation("3.4", tree.sequence_kl(policy), over_texts)

# %% [markdown]
# The KL of one state is a sum over tokens, with nothing random left in it:
#
# $$D(\pi\|\pi_b)(s) = \sum_a \pi(a|s)\,\log\frac{\pi(a|s)}{\pi_b(a|s)} \tag{3.5}$$

# %%
check.equation(
    "3.5", tree.state_kl(policy), (policy * (policy / tree.ref).log()).sum(-1)
)

# %% [markdown]
# Reward and KL together are the objective of reinforcement learning from human feedback (RLHF), the paper's (4). Since both
# add up along the text, it is the value of the first state that notebook 02 computed backwards:
#
# $$\mathbb{E}_{y\sim\pi}\left[R(x,y) - \tau\log\frac{\pi(y|x)}{\pi_b(y|x)}\right] = V_\pi(s_0) \tag{3.6}$$

# %%
tau = 0.5
net = scores - tau * (by_hand - reference)
check.equation("3.6", tree.evaluate(policy, tau)[1][0], (by_hand.exp() * net).sum())

# %% [markdown]
# Before we let tensors do it for many texts, one text line by line. The columns that belong to tokens add up to what belongs to
# the text; the values do not, they say what is still to come.

# %%
y = (1, 1, 0)
lines = [
    {
        "s_t": " ".join(WORDS[a] for a in tree.prefixes[s]) or "nothing",
        "a_t": WORDS[a],
        "π(a_t|s_t)": policy[s, a].item(),
        "log π": policy[s, a].log().item(),
        "log π/π_b": (policy[s, a] / tree.ref[s, a]).log().item(),
        "r_{t+1}": tree.rewards[s, a].item(),
        "V(s_t)": values[s].item(),
    }
    for s, a in walk(y)
]
table = pd.DataFrame(lines)
total = table[["log π", "log π/π_b", "r_{t+1}"]].sum()
table.loc[len(table)] = {"s_t": "the text", "a_t": "sum", **total}
table.style.hide(axis="index").format(precision=3, na_rep="", escape="html")

# %% [markdown]
# ## Batches: ends and padding
#
# Texts have different lengths, tensors do not. Short rows are filled up with padding (PAD), and a boolean **mask** is True on
# real tokens, EOS included. Ending is an action like any other. What stands on padding is rubbish and must not be read.

# %%
batch = tree.rollout(policy, 400, torch.Generator().manual_seed(0))
for row in range(3):
    words = [WORDS[a] for a in batch.tokens[row].tolist()]
    print([w if real else "PAD" for w, real in zip(words, batch.mask[row])])

# %% [markdown]
# Averages over tokens divide by the number of *real* tokens $N = \sum_{b,t} m_{bt}$:
#
# $$\overline{x} = \frac{1}{N}\sum_{b,t:\,m_{bt}} x_{bt} \tag{3.7}$$
#
# We put NaN (not a number) on the padding, so that anyone who reads it gives itself away.

# %%
ratios = (policy / tree.ref).log()[batch.states, batch.tokens]
ratios[~batch.mask] = torch.nan
real = [ratios[b, t] for b, t in batch.mask.nonzero().tolist()]
check.equation("3.7", masked_mean(ratios, batch.mask), sum(real) / len(real))

# %% [markdown]
# > **People ask: token KL or sequence KL?**
# >
# > Training curves often show the mean per *token*, (3.7). The objective is about the sum per *text*, (3.4). They differ by the mean
# > length, and when lengths change during training, they tell different stories.

# %%
per_text = torch.where(batch.mask, ratios, 0.0).sum(1)
length = batch.mask.sum(1).double().mean()
print(
    f"per token {masked_mean(ratios, batch.mask):.4f}, per text {per_text.mean():.4f}"
)
print(
    f"mean length {length:.3f}, and the product {masked_mean(ratios, batch.mask) * length:.4f}"
)

# %% [markdown]
# With samples we get an estimate, and its standard error falls like $1/\sqrt{n}$. For one text the variance is
#
# $$\mathrm{Var}\left[\log\tfrac{\pi(y)}{\pi_b(y)}\right] = \mathbb{E}\left[\left(\log\tfrac{\pi(y)}{\pi_b(y)}\right)^2\right] - D^2 \tag{3.8}$$

# %%
weights, log_ratio = tree.sequence_distribution(policy), by_hand - reference
spread = (weights * (log_ratio - over_texts) ** 2).sum()
check.equation(
    "3.8", spread, (weights * log_ratio**2).sum() - tree.sequence_kl(policy) ** 2
)
print(f"KL of a text: D = {over_texts:.2f} nats")
print(f"mean square of its log-ratio: {(weights * log_ratio**2).sum():.2f}")

# %% [markdown]
# **Predict** from these two numbers how many texts it takes until the standard error of the mean, $\sqrt{\mathrm{Var}/n}$, is ten per
# cent of $D$. Are our 400 enough?

# %%
print(f"variance {spread:.2f}: one text is off by {spread.sqrt() / over_texts:.1f} D")
print(f"exact KL {over_texts:.4f}, our 400 texts say {per_text.mean():.4f}")
print(f"texts needed for 10 %: about {spread / (0.1 * over_texts) ** 2:.0f}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 3.1 · Where does the reward go?
#
# From `scores` [B], one for each of B texts, and a right-padded `mask` [B, T] make the rewards [B, T].
#
# <!-- hints 3.1 -->


# %%
def my_rewards(scores, mask):
    # BEGIN SOLUTION
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    return rewards
    # END SOLUTION


check.exercise("3.1", my_rewards)

# %% [markdown]
# ### Exercise 3.2 · How likely is the text?
#
# From `logprobs` [B, T], NaN or leftovers on padding, and the mask: the log-probability of each text, [B].
#
# <!-- hints 3.2 -->


# %%
def my_text_logprob(logprobs, mask):
    # BEGIN SOLUTION
    return torch.where(mask, logprobs, 0.0).sum(1)
    # END SOLUTION


check.exercise("3.2", my_text_logprob)

# %% [markdown]
# ### Open question
#
# Many tokenizers have no padding token, so people set PAD = EOS and find the mask as `tokens != pad`. What goes wrong, and
# how would you notice?
#
# *What a good answer contains:* which real token is lost (1 point); what that does to log-probability, reward and the learning of when to
# stop (2); a way to see it in a log or a test (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# The real EOS is masked as if it were padding. The text's log-probability then lacks the factor $\pi(\mathrm{EOS}|s)$, and the
# probabilities of all texts no longer sum to 1. The decision to stop is never trained and the score, if it goes to the
# "last unmasked" token, goes to the token before. Texts tend to grow until the length limit. In a test: the mask of a
# text that ended must be True on exactly one EOS. In a log: mean length creeping up.
#
# </details>

# %% [markdown]
# ## Remember
#
# State: prefix. Action: next token. Transition: append. Reward: once, on the last real token. Log-probabilities and KLs
# add up along a text (3.1, 3.4), so the objective of RLHF is a value (3.6). Padding is never read.
#
# *In the library:* `klq_edu.core.tree.TokenTree`; `klq_kernels.reference.masked_mean`; sampling from a real model:
# `klq_edu.rlhf.rollout`. *Next:* notebook 04 measures KL from samples.

# %%
check.ledger()
