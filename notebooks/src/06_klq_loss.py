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
import torch

from klq_edu.core.improvement import action_values, klq_step
from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c06_klq_loss import STEP, draw_training
from klq_kernels import logits_klq_loss
from klq_kernels.loss import plain_error
from klq_kernels.reference import kl_divergence, klq_loss, q_values

check = start("06")

# %% [markdown]
# ## No new network
#
# Q-learning needs a network that says how good each action is. For a language model that would be a head with as many
# outputs as the vocabulary has tokens, trained from scratch. KLQ needs none. We have a policy $\pi_\theta$ (the language
# model), the reference $\pi_b$ it started from, and one number per state, $V_\theta$. Together they *are* a Q-function,
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
# question: *that* is what training must achieve.

# %%
soft = (policy * Q).sum(-1) - tau * kl_divergence(policy.log(), tree.ref.log())
check.equation("6.2", soft, V)

# %% [markdown]
# > **People ask: is the KL penalty applied twice, once in $Q$ and once in the loss?**
# >
# > Once. The log-ratio in $Q$ *is* the penalty, and the reward enters the target without any. Write out two steps, as in the check
# > of (5.2): each token's log-ratio occurs once, with $-\tau$. Shape the reward as well, and it occurs twice (notebook 07).
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
# ## The loss
#
# Fit $Q_\theta$ to the target by least squares, over the real tokens of the batch; the paper's (6):
#
# $$L(\theta) = \frac{1}{N}\sum_{\text{tokens}} \tfrac12\left(Q_\theta(s_t,a_t) - \hat G_t\right)^2 \tag{6.4}$$
#
# $N$ counts real tokens, padding excluded. Gradients flow into $\log\pi_\theta$ and $V_\theta$, and *not* into $\hat G$: it was
# computed from the old model and stays put. This is all that KLQ minimises.

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

# %% [markdown]
# ## Where it ends
#
# Suppose the table of logits and values can fit every target exactly, for all tokens $a$ of a state, where $\Delta(s,a)$ is the mean of
# $\Delta_t$ given $s$ and $a$ (a regression fits means; what sampling does to this comes in the open question). Then
# $\tau\log\frac{\pi}{\pi_b} + V = \tau\log\frac{\pi_{old}}{\pi_b} + V_{old} + \alpha\Delta$. The reference cancels. Solve for $\pi$:
#
# $$\pi_{new}(a|s) = \frac{\pi_{old}(a|s)\,e^{\alpha\Delta(s,a)/\tau}}{\sum_{a'}\pi_{old}(a'|s)\,e^{\alpha\Delta(s,a')/\tau}} \tag{6.6}$$
#
# and what normalising takes away is taken up by the value:
#
# $$V_{new}(s) = V_{old}(s) + \tau \log \sum_a \pi_{old}(a|s)\,e^{\alpha\Delta(s,a)/\tau} \tag{6.7}$$

# %%
Delta = tree.evaluate(policy, tau)[0] - Q  # the mean of Δ_t at λ = 1
new, new_V = klq_step(policy, V, Delta, tree.ref, tau, alpha)
weights = policy * (alpha * Delta / tau).exp()
check.equation("6.6", new, weights / weights.sum(-1, keepdim=True))
check.equation("6.7", new_V, V + tau * weights.sum(-1).log())

# %% [markdown]
# How much of the error is left after this step, measured against the full target $Q_{old} + \Delta$? The part that $\alpha$
# did not go:
#
# $$Q_{old} + \Delta - Q_{new} = (1 - \alpha)\,\Delta \tag{6.8}$$

# %%
left_over = Q + Delta - action_values(new, new_V, tree.ref, tau)
check.equation("6.8", left_over, (1 - alpha) * Delta)

# %% [markdown]
# **Change.** What does $\alpha$ do to the policy, and what $\tau$? By (6.6) some settings on the sliders give *exactly* the same policy:
# which?

# %%
explore(STEP)

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
# takes the worse of the two squares, which is PPO's trick (proximal policy optimisation) applied to a value:
#
# $$L_{clip} = \tfrac12\max\left[(Q_\theta - \hat G)^2,\; (\mathrm{clamp}(Q_\theta,\,Q_{old} \pm c) - \hat G)^2\right] \tag{6.9}$$

# %%
c = 0.1
q, q_old = q_values(new_logp, logq, new_values, tau), Q[at]
clipped = klq_loss(
    new_logp, logq, new_values, out.targets, mask, tau=tau, loss="value_clipped",
    clip=c, old_logprobs=logp, old_values=values, reduction="none",
)  # fmt: skip
held = torch.minimum(torch.maximum(q, q_old - c), q_old + c)
worse = torch.maximum((q - out.targets) ** 2, (held - out.targets) ** 2)
check.equation("6.9", clipped[mask], 0.5 * worse[mask])

# %% [markdown]
# ## Fused
#
# On a real model the logits have a hundred thousand columns, and most of the time goes into reading them. The kernels of
# this project compute log-prob, loss and gradient in one pass. Same number, same gradient:
#
# $$L_{fused}(\text{logits}) = L(\log \mathrm{softmax}(\text{logits})) \tag{6.10}$$

# %%
rows = logits[batch.states]
fused = logits_klq_loss(
    rows, batch.tokens, logq, new_values, out.targets, mask, tau=tau
)
check.equation("6.10", fused, loss)
fused_grad = torch.autograd.grad(fused, logits)[0]
check.equation("6.10", fused_grad, auto[0])

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
# policy [A] and the new value (a number) of (6.6) and (6.7). The advantages in the check are near 10,000: mind overflow.
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
# $\Delta$ comes from one sampled continuation. By (6.6) the fitted policy multiplies the odds of each sampled token by
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
# gradient contains a policy gradient (6.5). Fitted exactly, it multiplies the old policy by $e^{\alpha\Delta/\tau}$ (6.6).
#
# *In the library:* `klq_kernels.reference.klq_loss`, `klq_kernels.logits_klq_loss` and `linear_klq_loss` (fused),
# `klq_edu.core.improvement.klq_step`. *Next:* notebook 07 shows whose step this is.

# %%
check.ledger()
