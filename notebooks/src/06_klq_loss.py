# %% [markdown]
# # 06 · The KLQ loss
#
# **How does a language model become an action-value function, and what does it regress on?**
#
# *After this notebook you can* write down $Q_\theta$ from a policy, a reference and a value head; say why its soft value
# is $V$ whatever the weights are; build the target; write the loss and derive its gradient; and explain what the step
# size $\alpha$ does.
#
# *You need* notebooks 01 (Boltzmann policies, the Kullback–Leibler divergence or KL) and 05 (λ-returns). *Time:* <!-- minutes -->
# minutes. *Symbols:* $\pi_\theta$, $V_\theta$ policy and value head with weights $\theta$; $\pi_b$ reference; $\tau$ price of
# KL; $\Delta$ λ-sum of temporal-difference errors; $\hat G$ target; $\alpha$ step size; subscript *old*: when the batch was
# sampled. KLQ is KL-regularised Q-learning.

# %%
from dataclasses import replace

import torch

from klq_edu.core.improvement import action_values, klq_step
from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c05_lambda_returns import every_path, mean_given
from klq_edu.course.chapters.c06_klq_loss import (
    STEP,
    draw_cures,
    draw_offset,
    draw_training,
    fit_sampled,
    nothing_to_learn,
    read_model,
    tiny_model,
)
from klq_kernels import logits_klq_loss
from klq_kernels.loss import plain_error
from klq_kernels.reference import kl_divergence, klq_loss, q_values

check = start("06")

# %% [markdown]
# ## No new network
#
# Q-learning needs a network that says how good each action is. For a language model that would be a head with as many
# outputs as the vocabulary has tokens, trained from scratch. KLQ needs none. We have a policy $\pi_\theta$ (the language
# model), the reference $\pi_b$ it started from, and one number per state, $V_\theta$, from a value head (notebook 05). Together they *are* a Q-function,
# the paper's (13):
#
# $$Q_\theta(s,a) = \tau \log\frac{\pi_\theta(a|s)}{\pi_b(a|s)} + V_\theta(s) \tag{6.1}$$
#
# In words: a token is worth more than the state's value if the model has learnt to like it more than the reference does.

# %%
tau, alpha = 0.4, 0.3
tree = TokenTree.random(4, 3, eos=0, seed=5)
policy = torch.softmax(tree.ref.log() + 0.7 * torch.randn(tree.ref.shape), -1)
V = torch.randn(len(policy))
Q = action_values(policy, V, tree.ref, tau)
typed = torch.stack([tau * (p / b).log() + v for p, b, v in zip(policy, tree.ref, V)])
check.equation("6.1", Q, typed)

# %% [markdown]
# **Predict.** At the very beginning, just after supervised fine-tuning (SFT), $\pi_\theta = \pi_b$. What does $Q_\theta$ say then
# about the tokens of a state?
#
# <details><summary>Compare</summary>
#
# Nothing: the logarithm is 0, so $Q_\theta(s, a) = V_\theta(s)$ for every token. All tokens are equally good until
# a reward says otherwise, which is just what "start from the SFT model" should mean.
#
# </details>

# %%
at_start = action_values(tree.ref, V, tree.ref, tau)
print("largest |Q − V| at the SFT model:", (at_start - V[:, None]).abs().max().item())

# %% [markdown]
# Is the name $V$ deserved? By (1.10) $\pi_\theta$ is the Boltzmann policy of $Q_\theta$, the one that makes the most of it. So the
# soft value of $Q_\theta$ is the mean of $Q_\theta$ under $\pi_\theta$, less the KL at price $\tau$. Insert (6.1): the mean of $\tau \log(\pi_\theta/\pi_b)$ under $\pi_\theta$ is $\tau D$, and cancels.
#
# $$\sum_a \pi_\theta(a|s)\,Q_\theta(s,a) - \tau D(\pi_\theta\|\pi_b)(s) = V_\theta(s) \tag{6.2}$$
#
# So the value head *is* the soft value of $Q_\theta$, for every $\theta$, trained or not. Whether $Q_\theta$ is the true $Q_\pi$ is another
# question (the two Qs of notebook 05): *that* is what training must achieve.

# %%
soft = (policy * Q).sum(-1) - tau * kl_divergence(policy.log(), tree.ref.log())
check.equation("6.2", soft, V)

# %% [markdown]
# > **People ask: is the KL penalty applied twice, once in $Q$ and once in the loss?**
# >
# > Once. The log-ratio in $Q$ *is* the penalty, and the reward enters the target without any. Write out two steps, as in the check
# > of (5.4): each token's log-ratio occurs once, with $-\tau$. Shape the reward as well, and it occurs twice (notebook 07).
#
# ## The target
#
# Sample completions with the current model. For each token compute $Q_{old}$, and from it the temporal-difference
# error $\delta$ and its λ-sum $\Delta$, as in notebook 05. $\Delta$ says how much better it went than $Q_{old}$ thought. The
# target, the paper's (7), goes a part $\alpha$ of that way:
#
# $$\hat G_t = Q_{old}(s_t, a_t) + \alpha\,\Delta_t \tag{6.3}$$

# %%
batch = tree.rollout(policy, 100, torch.Generator().manual_seed(0))
mask, at = batch.mask, (batch.states, batch.tokens)
logp, logq = policy[at].log(), tree.ref[at].log()
values = torch.where(mask, V[batch.states], 0.0)
out = lambda_returns(batch.rewards, values, logp, logq, mask, tau=tau, alpha=alpha)
check.equation("6.3", out.targets[mask], (Q[at] + alpha * out.advantages)[mask])

# %% [markdown]
# The target was computed from the old model, and nothing may flow back through it. The library makes sure: give it log-probs and
# values that carry a gradient, and what it returns carries none.

# %%
live = [x.clone().requires_grad_() for x in (values, logp)]
detached = lambda_returns(batch.rewards, *live, logq, mask, tau=tau, alpha=alpha)
check.equation("6.3", float(any(x.requires_grad for x in detached)), 0.0)

# %% [markdown]
# ## The loss
#
# Fit $Q_\theta$ to the target by least squares, over the real tokens of the batch; the paper's (6):
#
# $$L(\theta) = \frac{1}{N}\sum_{\text{tokens}} \tfrac12\left(Q_\theta(s_t,a_t) - \hat G_t\right)^2 \tag{6.4}$$
#
# $N$ counts real tokens, padding excluded. Gradients flow into $\log\pi_\theta$ and $V_\theta$, and *not* into $\hat G$, which
# stays put. This is all that KLQ minimises.

# %%
logits = (policy.log() + 0.2 * torch.randn(policy.shape)).requires_grad_()
critic = (V + 0.2 * torch.randn(V.shape)).requires_grad_()
new_logp = torch.log_softmax(logits, -1)[at]
new_values = critic[batch.states]

loss = klq_loss(new_logp, logq, new_values, out.targets, mask, tau=tau)
total, count = 0.0, 0
for i, t in mask.nonzero().tolist():
    q = tau * (new_logp[i, t] - logq[i, t]) + new_values[i, t]
    total, count = total + 0.5 * (q - out.targets[i, t]) ** 2, count + 1
check.equation("6.4", loss, total / count)

# %% [markdown]
# In the library the loss and its variants share one definition, on top of the one-line $Q$. Which errors compete is a row
# of a table (`klq_kernels.loss.VARIANTS`): for the plain loss there is only one, `plain_error` (with its derivatives in $\log\pi$ and $V$ beside it); for the clipped
# variants the worst counts.

# %%
source(q_values)
source(plain_error)
source(klq_loss)

# %% [markdown]
# ## Where is the policy gradient?
#
# Differentiate (6.4). The chain rule gives the error times the gradient of $Q_\theta$, which has two parts:
#
# $$\nabla L = \frac{1}{N}\sum_{\text{tokens}} (Q_\theta - \hat G)\left(\tau\,\nabla\log\pi_\theta + \nabla V_\theta\right) \tag{6.5}$$
#
# There it is: the first part is a policy gradient, with the error in the place of an advantage. (*Policy gradient*: by
# $\nabla\pi = \pi\nabla\log\pi$ the gradient of $\mathbb{E}_\pi[\hat A]$, with $\hat A$ held, is $\mathbb{E}_\pi[\hat A\,\nabla\log\pi]$: actions with a positive
# $\hat A$ become more likely.) At the old weights the error is $-\alpha\Delta$, and a token that went better than expected becomes
# more likely.

# %%
auto = torch.autograd.grad(loss, (logits, critic), retain_graph=True)
error = (q_values(new_logp, logq, new_values, tau) - out.targets).detach()
surrogate = (error * (tau * new_logp + new_values))[mask].sum() / mask.sum()
typed = torch.autograd.grad(surrogate, (logits, critic), retain_graph=True)
for left, right in zip(auto, typed):
    check.equation("6.5", left, right)

# %% [markdown]
# > **People ask: what if I forget to stop the gradient at the target?**
# >
# > Then the target moves with the prediction, by the same amount, and the gradient of their difference is nothing, as long as
# > $\Delta$ is held. (A $\Delta$ that is live as well leaves $\tfrac12\alpha^2\Delta^2$ to be minimised, which is another algorithm.)
# > The library's loss stops it for you: hand it that same moving target, and its gradient is still (6.5), with the error
# > $-\alpha\Delta$.

# %%
old_logp, old_values = new_logp, new_values  # a target made from the live model
moving = q_values(old_logp, logq, old_values, tau) + alpha * out.advantages
error = q_values(new_logp, logq, new_values, tau) - moving
square = 0.5 * (error[mask] ** 2).mean()
stuck = torch.autograd.grad(square, logits, retain_graph=True)[0]
print("largest gradient without stop-gradient:", stuck.abs().max().item())

stopped = klq_loss(new_logp, logq, new_values, moving, mask, tau=tau)
gain = alpha * out.advantages * (tau * new_logp + new_values)
for loss_and_typed in zip(
    torch.autograd.grad(stopped, (logits, critic), retain_graph=True),
    torch.autograd.grad(-gain[mask].mean(), (logits, critic), retain_graph=True),
):
    check.equation("6.5", *loss_and_typed)

into_target = torch.autograd.grad(
    klq_loss(new_logp, logq, new_values, moving, mask, tau=tau),
    moving, retain_graph=True, allow_unused=True,
)[0]  # fmt: skip
print("gradient that the loss passes to the target:", into_target)
check.equation("6.5", float(into_target is not None), 0.0)

# %% [markdown]
# ## Where it ends
#
# Suppose a table of logits and values can fit every target exactly, for all tokens $a$ of a state. But which target? $\Delta_t$ varies
# with what follows the token, and a regression fits means (what sampling does to this comes below). So let
# $\Delta(s,a)$ be the mean of $\Delta_t$ given $s$ and $a$. Average (5.6) over the next token, and it has a recursion of its own:
#
# $$\Delta(s,a) = \mathbb{E}_{\pi_{old}}\left[\Delta_t \,\middle|\, s_t = s,\, a_t = a\right] = \delta(s,a) + \gamma\lambda \sum_{a'} \pi_{old}(a'|s')\,\Delta(s',a') \tag{6.6}$$
#
# The check enumerates all completions of the tree, and works the recursion back from the ends. At $\lambda = 1$ it must be
# $Q_\pi - Q_{old}$ of (5.11); that is the $\Delta$ of all that follows.

# %%
paths = every_path(tree)
visited = (paths.states, paths.tokens)
chance = tree.sequence_distribution(policy)[:, None] * paths.mask


def on_every_path(V, gamma, lam, rewards=paths.rewards, policy=policy):
    """The library's Δ_t on every completion of the tree."""
    values = torch.where(paths.mask, V[paths.states], 0.0)
    log_ratio = policy[visited].log(), tree.ref[visited].log()
    return lambda_returns(
        rewards, values, *log_ratio, paths.mask, tau=tau, gamma=gamma, lam=lam
    ).advantages


gamma, lam = 0.9, 0.7
by_recursion = tree.td_errors(policy, V, tau, gamma)
for level in reversed(tree.levels):
    ahead, after = (policy * by_recursion).sum(-1), tree.children[level]
    by_recursion[level] += gamma * lam * torch.where(after >= 0, ahead[after], 0.0)
means = mean_given(visited, chance, on_every_path(V, gamma, lam), Q.shape)
check.equation("6.6", means, by_recursion)

for gamma in (1.0, 0.9):
    means = mean_given(visited, chance, on_every_path(V, gamma, lam=1.0), Q.shape)
    check.equation("6.6", means, tree.evaluate(policy, tau, gamma)[0] - Q)

# %% [markdown]
# Now fit: $\tau\log\frac{\pi}{\pi_b} + V = \tau\log\frac{\pi_{old}}{\pi_b} + V_{old} + \alpha\Delta$. The reference cancels. Solve for $\pi$:
#
# $$\pi_{new}(a|s) = \frac{\pi_{old}(a|s)\,e^{\alpha\Delta(s,a)/\tau}}{\sum_{a'}\pi_{old}(a'|s)\,e^{\alpha\Delta(s,a')/\tau}} \tag{6.7}$$
#
# and what normalising takes away is taken up by the value:
#
# $$V_{new}(s) = V_{old}(s) + \tau \log \sum_a \pi_{old}(a|s)\,e^{\alpha\Delta(s,a)/\tau} \tag{6.8}$$

# %%
Delta = tree.evaluate(policy, tau)[0] - Q  # by (6.6), λ = γ = 1
new, new_V = klq_step(policy, V, Delta, tree.ref, tau, alpha)
weights = policy * (alpha * Delta / tau).exp()
check.equation("6.7", new, weights / weights.sum(-1, keepdim=True))
check.equation("6.8", new_V, V + tau * weights.sum(-1).log())

# %% [markdown]
# How much of the error is left after this step, measured against the full target $Q_{old} + \Delta$? The part that $\alpha$
# did not go:
#
# $$Q_{old} + \Delta - Q_{new} = (1 - \alpha)\,\Delta \tag{6.9}$$

# %%
left_over = Q + Delta - action_values(new, new_V, tree.ref, tau)
check.equation("6.9", left_over, (1 - alpha) * Delta)

# %% [markdown]
# **Change.** What does $\alpha$ do to the policy, and what $\tau$? By (6.7) some settings on the sliders give *exactly* the same policy:
# which?

# %%
explore(STEP)

# %% [markdown]
# ## When the value is off by a constant
#
# A fresh value head says 0 everywhere. If rewards are about 3, it is too low by 3 in every state. When a run of KLQ goes wrong, look for
# this first. Follow it through: let the value be $V + c$ where $V$ was, with the same policy and the same rewards. (Square
# brackets say which value, and later which reward, was used.)
#
# **What $\Delta$ makes of it.** $Q$ rises by $c$. In (5.1) a token in the middle gains $\gamma c$ at the next state and loses $c$ in $Q$. The
# last token has no next state: it only loses. Sum these with (5.5) over the $M$ tokens that are left, this one included:
#
# $$\Delta_t[V + c] = \Delta_t[V] - c\,w_M, \qquad w_M = (1-\gamma)\sum_{k<M-1}(\gamma\lambda)^k + (\gamma\lambda)^{M-1} \tag{6.10}$$
#
# At $\lambda = 1$ this is $w_M = 1$, whatever $\gamma$: every $\Delta$ is shifted by $-c$. At $\gamma = 1$ and $\lambda < 1$ it is $\lambda^{M-1}$: only the end of the
# text feels all of it.
#
# **Predict.** Take the exact step of (6.7) and (6.8) from $V + c$, at $\lambda = 1$. What becomes of the policy, and of the value?
#
# <details><summary>Compare</summary>
#
# The policy is the same: all $\Delta(s,\cdot)$ are shifted alike, and $e^{-\alpha c/\tau}$ is in every term of the fraction in (6.7). The value
# begins $c$ higher, and its soft mean in (6.8) is lower by $\alpha c$.
#
# </details>

# %%
c, left = -3.0, paths.mask.sum(1, keepdim=True) - torch.arange(paths.mask.shape[1])
for gamma, lam in ((0.9, 0.7), (1.0, 0.7), (0.9, 1.0), (1.0, 0.0), (1.0, 1.0)):
    x = gamma * lam
    powers = sum(x**k * (k < left - 1) for k in range(paths.mask.shape[1]))
    w = (1 - gamma) * powers + x ** (left - 1)
    shift = on_every_path(V + c, gamma, lam) - on_every_path(V, gamma, lam)
    check.equation("6.10", shift[paths.mask], -c * w[paths.mask])
shift = on_every_path(V + c, 1.0, 1.0) - on_every_path(V, 1.0, 1.0)
check.equation("6.10", shift[paths.mask], torch.full_like(shift, -c)[paths.mask])
print("w at λ = 0.95 with", {m: round(0.95 ** (m - 1), 2) for m in (1, 10, 50)}, "left")

# %% [markdown]
# **What the exact step makes of it.** With every token of every state, at $\lambda = 1$:
#
# $$\pi_{new}[V + c] = \pi_{new}[V], \qquad V_{new}[V + c] = V_{new}[V] + (1 - \alpha)\,c \tag{6.11}$$
#
# So whoever fits *every* token and moves the value as far as it has to go need not fear an offset: it shrinks to $1-\alpha$ of itself with
# each step, like all errors by (6.9). (That is at $\lambda = 1$. At $\lambda < 1$ a token that ends the text is shifted by $-c$ and the others by less, by
# (6.10). With $c < 0$, ending at once then looks better than it is, even to the exact step. The last lines print that.)

# %%
Delta_off = mean_given(visited, chance, on_every_path(V + c, 1.0, 1.0), Q.shape)
off, off_V = klq_step(policy, V + c, Delta_off, tree.ref, tau, alpha)
check.equation("6.11", off, new)
check.equation("6.11", off_V, new_V + (1 - alpha) * c)

for lam in (1.0, 0.5):
    for v in (V, V + c):
        mean = mean_given(visited, chance, on_every_path(v, 1.0, lam), Q.shape)
        ends = klq_step(policy, v, mean, tree.ref, tau, alpha)[0][0, 0].item()
        print(f"λ = {lam}, V off by {(v - V)[0]:+.0f}: ends at once with {ends:.3f}")

# %% [markdown]
# **What sampled tokens make of it.** In training we have one sampled token in a state, not all of them; and the value may not be able
# to go where it has to: its steps are small, or it shares a network with the policy. Take the extreme, a value that is held. Then
# the log-ratio of the sampled token has to make up for everything:
#
# $$\tau\log\frac{\pi(a|s)}{\pi_{old}(a|s)} = \alpha(\Delta - c), \qquad \pi(a|s) = \pi_{old}(a|s)\,e^{\alpha\Delta/\tau}\cdot e^{-\alpha c/\tau} \tag{6.12}$$
#
# The last factor is the same for *everything that was sampled*, good or bad. If the value is too high ($c > 0$), all that was sampled becomes less
# likely, and what was not sampled gains. If it is too low, whatever was sampled is pulled towards certainty: a probability
# cannot go beyond 1, so the target may even be out of reach. The check minimises the library's loss for one token by gradient descent.

# %%
a, c, s = 1, 0.7, 0
gain, old = Delta[s, a], policy[s]
z, one = old.log().clone(), torch.ones(1, dtype=torch.bool)
b, v = tree.ref[s, a].log()[None], (V[s] + c)[None]
goal = tau * (old[a].log()[None] - b) + v + alpha * (gain - c)
for _ in range(300):
    z.requires_grad_()
    fit = klq_loss(torch.log_softmax(z, -1)[a][None], b, v, goal, one, tau=tau)
    z = z.detach() - torch.autograd.grad(fit, z)[0] / tau**2
p = old[a] * (alpha * gain / tau).exp() * torch.tensor(-alpha * c / tau).exp()
check.equation("6.12", torch.softmax(z, -1)[a], p)

# %% [markdown]
# How far does the policy move for it? At least as far as the token's own probability forces it to, from $p_{old}$ to $p$, and just so
# far if the other tokens keep their proportions:
#
# $$D(\pi\|\pi_{old})(s) \;\ge\; p\log\frac{p}{p_{old}} + (1-p)\log\frac{1-p}{1-p_{old}} \tag{6.13}$$
#
# We try it on a thousand policies with the right $p$. Then, at the paper's $\tau = 0.05$ and the library's $\alpha = 0.2$, a token with $\Delta = 0$,
# about which there was nothing to learn:

# %%
forced = p * (p / old[a]).log() + (1 - p) * ((1 - p) / (1 - old[a])).log()
nearest = fit_sampled(old, a, alpha * (gain - c), tau)
check.equation("6.13", kl_divergence(nearest.log(), old.log()), forced)
rivals = torch.rand(1000, len(old))
rivals[:, a] = 0.0
rivals = (1 - p) * rivals / rivals.sum(-1, keepdim=True)
rivals[:, a] = p
moved = kl_divergence(rivals.log(), old.expand(1000, -1).log())
check.inequality("6.13", forced.expand(1000), moved)

print(f"probability before: {old[a]:.3f}")
for c in (0.1, 0.3, 1.0, -0.1, -0.3, -1.0):
    q = fit_sampled(old, a, -0.2 * c, tau=0.05)
    kl = kl_divergence(q.log(), old.log())
    print(f"c = {c:+.1f}: {q[a]:.3f} after, KL(new‖old) = {kl:.3f} nats")

# %%
show(draw_offset())

# %% [markdown]
# **Explain.** An offset is worth $\alpha c/\tau$ nats on each sampled token. At small $\tau$ a nat is cheap, so the log-ratios are an easy place to put
# the error of $V$ in.
#
# > **People ask: is a constant in $\Delta$ not a mere baseline, which averages out?**
# >
# > In the first gradient it does, on average: $\sum_a \pi\,\nabla\log\pi = \nabla \sum_a \pi = 0$, as printed below. But a regression does not stop
# > after one gradient. It goes on with the same sampled tokens until it meets (6.12), and there nothing averages. (PPO, proximal
# > policy optimisation, usually *whitens* $\Delta$: it subtracts the mean over the batch, and so never sees an offset. Notebook 07 tells what that costs.)

# %%
z = policy.log().clone().requires_grad_()
constant = (policy * torch.log_softmax(z, -1)).sum()
print("mean gradient:", torch.autograd.grad(constant, z)[0].abs().max().item())

# %% [markdown]
# ### Cure 1: begin at the mean
#
# At the start $\pi = \pi_b$ and $Q = V$. By (5.10) the mean of $\Delta$ in the first state is what $V$ lacks, and under $\pi_b$ there is no KL to pay:
#
# $$\mathbb{E}_{\pi_b}[\Delta_0] = \mathbb{E}_{\pi_b}[R] - V(s_0) \qquad (\gamma = \lambda = 1,\; \pi = \pi_b) \tag{6.14}$$
#
# A value that starts at the reference's mean reward is right on average from the first batch on. The library's trainer sets the bias
# of a fresh head to the mean of that batch, which the reference sampled.

# %%
under_ref = tree.sequence_distribution(tree.ref)
mean_reward = tree.expected_reward(tree.ref)
for level in (0.0, mean_reward.item()):
    first = on_every_path(torch.full_like(V, level), 1.0, 1.0, policy=tree.ref)[:, 0]
    average = under_ref @ first
    check.equation("6.14", average, mean_reward - level)
    print(f"V = {level:.3f}: mean of Δ at the first token {average:+.3f}")

# %% [markdown]
# ### Cure 2: centre the rewards
#
# Or subtract a constant $b$ from every reward. At $\gamma = 1$ that is the same thing, for every $\lambda$ and every token:
#
# $$\Delta_t[R - b,\, V] = \Delta_t[R,\, V + b] \qquad (\gamma = 1) \tag{6.15}$$
#
# One number for all prompts leaves the differences between them: all that is written after an easy prompt still looks good, after a hard
# one bad. So subtract from the rewards of each prompt $x$ their mean $b_x$ under the reference. That changes nothing in what is best:
#
# $$\pi^*[R - b_x] = \pi^*[R], \qquad V^*[R - b_x] = V^*[R] - b_x \qquad (\gamma = 1) \tag{6.16}$$
#
# In the library these are `centre="batch"` and `centre="prompt"`. The second check takes a tree with two prompts.

# %%
b, ends = 0.8, left == 1
for lam in (0.0, 0.7, 1.0):
    less = on_every_path(V, 1.0, lam, rewards=paths.rewards - b * ends)
    check.equation("6.15", less, on_every_path(V + b, 1.0, lam))

two = TokenTree.grow(
    3, 2, lambda _: torch.softmax(torch.randn(3), -1),
    lambda y: torch.randn(()) + 2 * y[0], prompts=((0,), (1,)),
)  # fmt: skip
means = two.evaluate(two.ref, tau)[1][two.roots]  # no KL under the reference
b_x = torch.tensor([means[prefix[0]] for prefix in two.prefixes])
less = torch.where(two.children < 0, two.rewards - b_x[:, None], two.rewards)
_, V_less, best = replace(two, rewards=less).optimum(tau)
odds = two.sequence_distribution(two.ref) * (two.rewards[two.leaves] / tau).exp()
odds = odds.view(2, -1)  # of the texts of each prompt, by (1.5) with whole texts
typed = odds / odds.sum(1, keepdim=True) / 2
check.equation("6.16", two.sequence_distribution(best), typed.flatten())
V_star = two.optimum(tau)[1]
check.equation("6.16", V_less, V_star - b_x)
print("means of the two prompts:", [round(x, 2) for x in means.tolist()])

# %% [markdown]
# Now see both at work, on a real (if tiny) language model with a value head on its *trunk*, the part of the network that head and
# logits share. There is nothing to learn: whatever is written after a prompt earns the same, about 3, a bit more for some prompts than for
# others. The reference is the optimum, and all KL is damage. $\tau$ is the paper's; $\alpha$, the passes over a batch and Adam's step
# size are the library's defaults, and so is the factor of the next section.

# %%
show(draw_cures())

# %% [markdown]
# ### And the shared trunk
#
# By (6.5) the policy's gradient has a factor $\tau$ and the value's has none. On parameters of their own that matters little. On a shared
# trunk the two are added, and the value's part counts $1/\tau$ times as much beside the policy's as in a loss that weighs both alike. While
# $V$ is being repaired, the trunk serves $V$ alone. So the library multiplies the value gradient that enters the trunk by a
# factor $f$, which is $\tau$ unless told otherwise (`value_grad_scale`); the head itself learns at full speed:
#
# $$\nabla_{trunk} L = \frac{1}{N}\sum_{\text{tokens}} (Q_\theta - \hat G)\left(\tau\,\nabla\log\pi_\theta + f\,\nabla V_\theta\right) \tag{6.17}$$

# %%
model, price = tiny_model(), 0.05
trunk = list(model.body.parameters())
surprise, every = torch.randn(4, 4), torch.ones(4, 4, dtype=torch.bool)
picked = torch.randint(6, (4, 4, 1))


def trunk_gradient(f, of):
    """Gradient in all of the trunk of what `of` makes of log π and V of a batch."""
    model.value_grad_scale = f
    log_policy, v = read_model(model)
    grads = torch.autograd.grad(of(log_policy.gather(-1, picked)[..., 0], v), trunk)
    return torch.cat([g.flatten() for g in grads])


def loss_of(logp, v):
    """Any reference will do: it cancels between Q and the target."""
    q = q_values(logp, torch.zeros_like(logp), v, price).detach()
    goal = q + alpha * surprise
    return klq_loss(logp, torch.zeros_like(logp), v, goal, every, tau=price)


policy_part = trunk_gradient(1, lambda lp, v: -alpha * (surprise * price * lp).mean())
value_part = trunk_gradient(1, lambda lp, v: -alpha * (surprise * v).mean())
for f in (1.0, price):
    total = trunk_gradient(f, loss_of)
    check.equation("6.17", total, policy_part + f * value_part)
    weight = (f * value_part.norm() / policy_part.norm()).item()
    cosine = torch.cosine_similarity(total, policy_part, 0).item()
    print(f"f = {f}: the value's part is {weight:.2f} times the policy's,", end=" ")
    print(f"cosine of the sum with the policy's {cosine:.2f}")

# %% [markdown]
# So without the factor the trunk goes where $V$ wants it, and with it the policy has its say. Does that help against an offset? The example with
# nothing to learn again, from $V = 0$:

# %%
for name, adam in (("gradient descent", False), ("Adam", True)):
    for f in (1.0, 0.05):
        kl, v = nothing_to_learn(scale=f, adam=adam).T
        print(f"{name}, f = {f}: V = {v[20]:.2f} after 20 updates,", end=" ")
        print(f"largest KL(π‖reference) {kl.max():.3f} nats")

# %% [markdown]
# Under plain gradient descent it does. Under Adam it does not, not here: Adam gives each parameter a step of the same size however small
# its gradient is, so the trunk moves as fast as before, only not for $V$. $V$ then rises more slowly, and the log-ratios
# have longer to fill the gap. The factor is for the balance of two gradients. Against an offset, start right.

# %% [markdown]
# ## Does it learn?
#
# Here is KLQ without the sampling, on a tree so small that everything is exact: logits and values in a table, $\Delta$ for every
# token of every state, targets refreshed every twenty steps, the optimiser Adam on (6.4) in between. No policy gradient was
# written anywhere. *Regret* is how much the objective $J$ still falls short of its maximum $J^*$.

# %%
show(draw_training())

# %% [markdown]
# ## A clipped relative
#
# Networks can jump, so there are variants. One bounds how far $Q$ may move from $Q_{old}$ and
# takes the worse of the two squares, which is PPO's trick applied to a value:
#
# $$L_{clip} = \tfrac12\max\left[(Q_\theta - \hat G)^2,\; (\mathrm{clamp}(Q_\theta,\,Q_{old} \pm c) - \hat G)^2\right] \tag{6.18}$$

# %%
c = 0.1
q, q_old = q_values(new_logp, logq, new_values, tau), Q[at]
clipped = klq_loss(
    new_logp, logq, new_values, out.targets, mask, tau=tau, loss="value_clipped",
    clip=c, old_logprobs=logp, old_values=values, reduction="none",
)  # fmt: skip
held = torch.minimum(torch.maximum(q, q_old - c), q_old + c)
worse = torch.maximum((q - out.targets) ** 2, (held - out.targets) ** 2)
check.equation("6.18", clipped[mask], 0.5 * worse[mask])

# %% [markdown]
# ## Fused
#
# On a real model the logits have a hundred thousand columns, and most of the time goes into reading them. The kernels of
# this project compute log-prob, loss and gradient in one pass. Same number, same gradient:
#
# $$L_{fused}(\text{logits}) = L(\log \mathrm{softmax}(\text{logits})) \tag{6.19}$$

# %%
rows = logits[batch.states]
fused = logits_klq_loss(
    rows, batch.tokens, logq, new_values, out.targets, mask, tau=tau
)
check.equation("6.19", fused, loss)
fused_grad = torch.autograd.grad(fused, logits)[0]
check.equation("6.19", fused_grad, auto[0])

# %% [markdown]
# ## Exercises
#
# ### Exercise 6.1 · The loss in a few lines
#
# Write (6.4) for tensors of shape [B, T]. `targets` may carry a gradient and padding may hold NaN (not a number):
# neither may reach the result. The check looks at your loss *and* at its gradients.
#
# <!-- hints 6.1 -->


# %%
def my_klq_loss(logprobs, ref_logprobs, values, targets, mask, tau):
    # BEGIN SOLUTION
    error = tau * (logprobs - ref_logprobs) + values - targets.detach()
    error = torch.where(mask, error, 0.0)
    return 0.5 * (error**2).sum() / mask.sum()
    # END SOLUTION


check.exercise("6.1", my_klq_loss)

# %% [markdown]
# ### Exercise 6.2 · Where the regression ends
#
# From the probabilities `old` and `advantages` $\Delta(s,\cdot)$ of one state, both [A], its value, $\tau$ and $\alpha$: return the new
# policy [A] and the new value (a number) of (6.7) and (6.8). The advantages in the check are near 10,000: mind overflow.
#
# <!-- hints 6.2 -->


# %%
def my_exact_step(old, advantages, value, tau, alpha):
    # BEGIN SOLUTION
    score = old.log() + alpha * advantages / tau
    return torch.softmax(score, -1), value + tau * torch.logsumexp(score, -1)
    # END SOLUTION


check.exercise("6.2", my_exact_step)

# %% [markdown]
# ### Exercise 6.3 · What an offset costs
#
# In one state the value is too high by $c$ and held. One `token` was sampled from `old`, the probabilities [A]; with the right value its
# $\Delta$ would be `advantage`. Fit this token alone, at $\lambda = 1$; the others keep their proportions. Return the new policy [A] and how far it
# moved, $D(\pi\|\pi_{old})$ in nats (a number). The inputs are such that the sampled token's new probability stays below 1.
#
# <!-- hints 6.3 -->


# %%
def my_sampled_step(old, token, advantage, offset, tau, alpha):
    # BEGIN SOLUTION
    p = old[token] * torch.tensor(alpha * (advantage - offset) / tau).exp()
    new = old * (1 - p) / (1 - old[token])
    new[token] = p
    return new, (new * (new / old).log()).sum()
    # END SOLUTION


check.exercise("6.3", my_sampled_step)

# %% [markdown]
# ### Open question
#
# A colleague trains with $\alpha = 1$ "because then the target is the full return, and half-hearted targets are a
# waste". When is the colleague right, and what goes wrong otherwise?
#
# *What a good answer contains:* what $\alpha = 1$ means for the exact step (1 point); that $\Delta$ is a noisy estimate on
# sampled tokens, and one step fits that noise (2); the size of the step in $\alpha/\tau$ (1); an experiment that would
# decide (1).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# With exact $\Delta$ for every token, $\alpha = 1$ is one sweep of soft policy iteration, and nothing is faster. In training,
# $\Delta$ comes from one sampled continuation. By (6.7) the fitted policy multiplies the odds of each sampled token by
# $e^{\alpha\Delta/\tau}$; at $\tau = 0.05$ and $|\Delta| = 1$ that is $e^{20}$ for $\alpha = 1$. So noise would be fitted without restraint, and tokens
# that were not sampled are moved only by what the network shares. A smaller $\alpha$ averages over batches. To decide, compare
# the objective reached for several $\alpha$ at equal numbers of completions, with several seeds.
#
# </details>

# %% [markdown]
# ## Remember
#
# A policy, its reference and a value head are a Q-function (6.1), whose soft value is the value head (6.2). Targets are
# $Q_{old} + \alpha\Delta$ without gradient (6.3), the loss is a half square averaged over real tokens (6.4), and its
# gradient contains a policy gradient (6.5). Fitted exactly, it multiplies the old policy by $e^{\alpha\Delta/\tau}$ (6.7). A value that is
# off by $c$ harms no exact step (6.11), but every sampled token by $\alpha c/\tau$ nats (6.12): start $V$ at the mean reward, or centre rewards.
#
# *In the library:* `klq_kernels.reference.klq_loss`, `klq_kernels.logits_klq_loss` and `linear_klq_loss` (fused),
# `klq_edu.core.improvement.klq_step`; `TrainConfig` (`centre`, `value_grad_scale`) and `ActorCritic.start_value` in `klq_edu.rlhf`. *Next:* notebook 07 shows whose step this is.

# %%
check.ledger()
