# %% [markdown]
# # 00 · Map, notation and doctor
#
# **What is in this course, how do its checks work, and is my machine ready?**
#
# *After this notebook you can* say in a few sentences what KL-regularised Q-learning (KLQ) is about; find your way through the
# notebooks; read the notation; and use the checks that come with every equation and exercise. KL stands for the
# Kullback–Leibler divergence, a measure of how far one distribution is from another.
#
# *You need* a little Python and one course on machine learning. *Time:* <!-- minutes --> minutes. *Symbols:* two tables below have
# those that return; nothing in them has to be learnt now.

# %%
import pandas as pd
import torch

from klq_edu.app.doctor import examine
from klq_edu.core.improvement import action_values, boltzmann
from klq_edu.course import explore, start
from klq_edu.course.chapters import c00_map_and_doctor as course
from klq_kernels.reference import kl_divergence, masked_mean

check = start("00")
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## What this is about
#
# A language model that was trained to imitate people can be trained further to please them: reinforcement learning from
# human feedback (RLHF). A reward model scores what it writes, and an algorithm makes high scores more likely, without
# letting the model stray far from where it started, the *reference*.
#
# Four words of reinforcement learning are enough to begin. Take the prompt *"The soup was"*. The text so far is the
# **state** $s$; the next token, say *good*, is the **action** $a$; the model, which gives each action a probability
# $\pi(a|s)$, is the **policy**. An **action value** $Q(s,a)$ says how much reward to expect, less the price of straying,
# if $a$ is chosen in $s$; a **value** $V(s)$ says it before anything is chosen.
#
# The usual algorithm is proximal policy optimisation (PPO): it pushes up the probability of tokens that turned out
# better than expected. KLQ goes another way: it reads the language model itself as a table of action values, $Q$, and
# fits them by least squares. The surprise, at the end of the theory (notebook 07), is that this is PPO in disguise, in a
# sense that can be made exact; and we shall see where exactly it ends. "The paper" is from here on J. R. Brown, L. Wells, E. J. Young
# and S. Bacallado, *KL-Regularised Q-Learning* (arXiv 2508.17000); "the paper's (13)" is its equation 13.
#
# ## The map

# %%
explore(course.map_widget())

# %% [markdown]
# What you have done so far, on this machine:

# %%
course.progress().style.hide(axis="index")

# %% [markdown]
# ## Is the machine ready?
#
# The course needs no graphics processing unit (GPU) and no network. `klq doctor` in a terminal shows the same table.

# %%
pd.DataFrame(
    [(f.what, "✔" if f.fine else "✘", f.advice) for f in examine()],
    columns=["what", "fine", "advice"],
).style.hide(axis="index")

# %% [markdown]
# ## Notation
#
# The same things have other names in papers on PPO and in libraries such as TRL and verl. This much is needed for notebooks
# 01 to 04, which bring each symbol in where the last column says:

# %%
course.notation().style.hide(axis="index")

# %% [markdown]
# And this comes later. Skip it now, and come back when a notebook sends you here.

# %%
course.notation(later=True).style.hide(axis="index")

# %% [markdown]
# One convention saves many mistakes. **Index $t$ holds what belongs to one decision**: the token $a_t$, the value $V(s_t)$ of
# the prefix *before* it, and the reward $r_{t+1}$ that *follows* it. A completion of two tokens, in a batch of length
# three:

# %%
pd.DataFrame(
    {
        "a_t": ["good", "<eos>", "(padding)"],
        "V(s_t): value of": ["the prompt", "the prompt, good", "–"],
        "r_{t+1}": [0.0, 1.0, "–"],
        "mask": [True, True, False],
    }
)

# %% [markdown]
# ## How equations are checked
#
# Every numbered equation is followed by a check: both sides are computed by different routes, in double precision, and compared.
# For example the heart of the course. Take a policy $\pi$, a reference $\pi_b$ and a number $V$, and define
#
# $$Q(a) = \tau\log\frac{\pi(a)}{\pi_b(a)} + V \tag{0.1}$$

# %%
tau, V = 0.5, torch.tensor(1.5)
policy, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
Q = action_values(policy, V, ref, tau)
check.equation("0.1", Q, tau * (policy / ref).log() + V)

# %% [markdown]
# Then the policy that makes the best of this $Q$, at price $\tau$ per unit of KL, is the one we started from:
#
# $$\frac{\pi_b(a)\,e^{Q(a)/\tau}}{\sum_{a'}\pi_b(a')\,e^{Q(a')/\tau}} = \pi(a) \tag{0.2}$$
#
# Why, you will see in notebook 01. That it is so, you see here.

# %%
weights = ref * (Q / tau).exp()
check.equation("0.2", weights / weights.sum(), policy)
check.equation("0.2", boltzmann(Q, ref, tau)[0], policy)

# %% [markdown]
# And if an equation were wrong? **Predict** what happens if the $\tau$ is forgotten.

# %%
try:
    check.equation("0.1", Q, (policy / ref).log() + V)
except AssertionError as problem:
    print(problem)

# %% [markdown]
# A notebook with a wrong equation does not run to its end. (A check is evidence, on the numbers it was given; the proof is
# the argument in the text.) Averages in this course run over real tokens only, those where a
# mask $m$ is true, and padding may hold anything:
#
# $$\overline{x} = \frac{\sum_t m_t\,x_t}{\sum_t m_t} \tag{0.3}$$

# %%
x = torch.tensor([1.0, 4.0, torch.nan])
mask = torch.tensor([True, True, False])
check.equation("0.3", masked_mean(x, mask), (x[0] + x[1]) / 2)

# %% [markdown]
# > **People ask: do I need a GPU? And why double precision (float64)?**
# >
# > No. And because an exact identity then holds to many digits, far more than any slip would leave; limits and finite
# > differences state how many they claim. In float32 a small true number can drown in rounding, and one cannot tell. Here is
# > a small KL, computed from its definition in both (`start` has made float64 the default of this notebook):

# %%
near = torch.log_softmax(policy.log() + torch.tensor([1e-4, 0.0, -1e-4]), -1)
for dtype in (torch.float64, torch.float32):
    p, q = near.to(dtype), policy.log().to(dtype)
    print(f"{dtype}: {(p.exp() * (p - q)).sum().item():+.3e}")
print(f"exact:         {kl_divergence(near, policy.log()).item():+.3e}")

# %% [markdown]
# ## How exercises are checked
#
# You write a function, the check calls it with fresh random numbers. It knows the usual mistakes and names them. There are two
# editions of each notebook: one with holes to fill in, which `make lab` opens, and one with the solutions. Try these two.
#
# ### Exercise 0.1 · A mean without padding
#
# The mean of `x` over the entries where `mask` is True. Padding holds anything: NaN (not a number) or leftovers.
#
# <!-- hints 0.1 -->


# %%
def my_mean(x, mask):
    # BEGIN SOLUTION
    return torch.where(mask, x, 0.0).sum() / mask.sum()
    # END SOLUTION


check.exercise("0.1", my_mean)

# %% [markdown]
# ### Exercise 0.2 · The value of the next state
#
# From `values` of shape [B, T] (a batch of B completions, padded on the right to T tokens) and the mask: $V(s_{t+1})$ for
# every real token, 0 after the last one, and 0 on padding. Padding holds leftovers.
#
# <!-- hints 0.2 -->


# %%
def my_next_values(values, mask):
    # BEGIN SOLUTION
    real = torch.where(mask, values, 0.0)
    return torch.cat([real[:, 1:], torch.zeros(len(real), 1)], 1)
    # END SOLUTION


check.exercise("0.2", my_next_values)

# %% [markdown]
# ### Open question
#
# Before you start: in what sense could a regression and a policy gradient be "the same algorithm"? Write down what you would
# accept as a proof, and read it again after notebook 07.
#
# *What a good answer contains:* same what (estimates, gradients, steps, results)? under which conditions? and how one would find out that it is not so.

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# I would accept: for every batch both compute the same numbers from it, or their updates agree to the last digit, for all parameters, and a list
# of the conditions. I would not accept two learning curves that look alike.
#
# </details>

# %% [markdown]
# ## Glossary

# %%
course.glossary().style.hide(axis="index")

# %% [markdown]
# ## Remember
#
# Index $t$ holds $a_t$, $V(s_t)$ and $r_{t+1}$; padding is never read; equations are checked where they stand.
#
# *In the library:* `klq_edu.course`, `klq doctor`. *Next:* notebook 01, one state and one word.

# %%
check.ledger()
