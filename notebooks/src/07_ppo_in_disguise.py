# %% [markdown]
# # 07 · KLQ is PPO in disguise (and where it is not)
#
# **In what sense is KL-regularised Q-learning the same algorithm as proximal policy optimisation, and where does that
# stop?**
#
# *After this notebook you can* state three exact claims of equivalence, prove each in a few lines, derive the penalty
# coefficient $\beta = \tau(1-\alpha)/\alpha$, and tell from a list of everyday tricks (clipping, whitening, several
# epochs, another value coefficient) which ones break which claim, and by how much.
#
# *You need* notebooks 01 (Boltzmann policies), 04 (the estimator $k_2$), 05 (λ-returns) and 06 (the loss of KLQ, KL-regularised
# Q-learning).
# *Time:* <!-- minutes --> minutes. *Symbols:* $\pi_b$ reference, $\pi_{old}$ the policy that sampled the batch, $\tau$ price of the
# Kullback–Leibler divergence (KL) $D$, $\alpha$ step size, $\delta$ temporal-difference error, $\Delta$ its λ-sum,
# $\hat A$ the advantage of PPO (proximal policy optimisation), $\rho = \pi/\pi_{old}$, $\beta$ PPO's penalty.

# %%
import torch

from klq_edu.core.improvement import (
    action_values,
    kl_penalised_argmax,
    klq_step,
    penalty_coefficient,
    ppo_penalty_step,
)
from klq_edu.core.objectives import (
    klq_loss,
    ppo_clip_loss,
    ppo_penalty_loss,
    value_loss,
)
from klq_edu.core.returns import gae, kl_shaped_rewards, lambda_returns, whiten
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c07_ppo_in_disguise import (
    GAP,
    grammar_batch,
    habits,
    second_epoch,
    turn,
)
from klq_edu.figures import exact_steps
from klq_edu.rlhf.algorithms import make_targets
from klq_kernels.reference import kl_divergence

check = start("07")

# %% [markdown]
# ## Two algorithms, side by side
#
# Both sample completions with the current policy $\pi_{old}$ and have a value head $V$. Then they part, or so it seems.
#
# PPO in five sentences. It makes actions with a positive advantage $\hat A$ more likely. It uses a batch for several passes
# (*epochs*), so after the first step the policy is not $\pi_{old}$ any more; the ratio $\rho = \pi/\pi_{old}$ corrects for that,
# $\mathbb{E}_{\pi_{old}}[\rho\hat A] = \mathbb{E}_\pi[\hat A]$, and this is called the *surrogate* objective. *Clipping* gives no further reward
# once $\rho$ has left $[0.8, 1.2]$ in the direction that $\hat A$ favours. *Whitening* replaces $\hat A$ by its difference from the
# batch's mean, divided by the standard deviation. The value head is fitted to $V_{old} + \hat A$, often as a second output of the
# same network (a shared *trunk*).
#
# | | PPO | KLQ |
# |---|---|---|
# | the KL to $\pi_b$ is | subtracted from the reward | inside $Q = \tau \log(\pi/\pi_b) + V$ |
# | what is estimated | an advantage $\hat A$ (GAE, generalised advantage estimation) | a target $\hat G = Q + \alpha\Delta$ |
# | the policy learns by | a policy gradient, $-\mathbb{E}[\rho\hat A]$ | a squared error, $\tfrac12(Q_\theta - \hat G)^2$ |
# | the step is kept small by | a clip, or a penalty on $D(\pi\|\pi_{old})$ | the step size $\alpha$ |
#
# **Predict.** One fits values by regression, the other climbs a surrogate objective. For which rows of this table would
# you bet that they are the same thing, written differently? (The table returns at the end.)
#
# We need something to compute with: a random token tree, an old policy that has already left the reference, values
# that are wrong (as they always are), and a batch of sampled completions.

# %%
tau, alpha, gamma, lam = 0.5, 0.3, 0.97, 0.9
tree = TokenTree.random(4, 3, eos=0, seed=1)
noise = torch.randn(tree.ref.shape)
old = torch.softmax(tree.ref.log() + noise, -1)
V = torch.randn(len(old))

batch = tree.rollout(old, 200, torch.Generator().manual_seed(0))
mask = batch.mask
logp = old[batch.states, batch.tokens].log()
logq = tree.ref[batch.states, batch.tokens].log()
values = torch.where(mask, V[batch.states], 0.0)
print(f"{len(mask)} completions of 1 to {mask.shape[1]} tokens in {len(old)} states")

# %% [markdown]
# ## Claim 1: the same estimator
#
# PPO for language models takes the reward with the KL penalty mixed in,
#
# $$\tilde r_{t+1} = r_{t+1} - \tau \log\frac{\pi_{old}(a_t|s_t)}{\pi_b(a_t|s_t)} \tag{7.1}$$

# %%
shaped = kl_shaped_rewards(batch.rewards, logp, logq, tau)
check.equation("7.1", shaped[mask], (batch.rewards - tau * (logp - logq))[mask])

# %% [markdown]
# and asks how much better than $V(s_t)$ it went. KLQ keeps the plain reward and asks how much better than
# $Q(s_t, a_t) = \tau \log\frac{\pi_{old}}{\pi_b} + V(s_t)$ it went, the paper's (14). Write both out, and the penalty
# has only moved to the other side of the minus sign:
#
# $$\delta_t = r_{t+1} + \gamma V(s_{t+1}) - \underbrace{\left(\tau \log\frac{\pi_{old}}{\pi_b} + V(s_t)\right)}_{Q(s_t,\,a_t)} = \tilde r_{t+1} + \gamma V(s_{t+1}) - V(s_t) \tag{7.2}$$
#
# The check takes KLQ's $\delta$ from the library, and PPO's from the formula on the right, typed for each token.

# %%
out = lambda_returns(
    batch.rewards, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam, alpha=alpha
)
ppo_delta = torch.zeros_like(values)
for i, t in mask.nonzero().tolist():
    is_last = t + 1 == mask.shape[1] or not mask[i, t + 1]
    next_value = 0.0 if is_last else values[i, t + 1]
    ppo_delta[i, t] = shaped[i, t] + gamma * next_value - values[i, t]
check.equation("7.2", out.td_errors, ppo_delta)

# %% [markdown]
# Both then sum the errors with the same weights, so both get the same number. **KLQ's $\Delta$ is PPO's advantage**,
# as long as nobody whitens it:
#
# $$\Delta_t = \sum_{k \ge 0} (\gamma\lambda)^k\,\delta_{t+k} = \hat A^{GAE}_t \tag{7.3}$$

# %%
advantages = gae(shaped, values, mask, gamma=gamma, lam=lam)
check.equation("7.3", out.advantages, advantages)

# %% [markdown]
# > **People ask: is the KL penalty applied twice?**
# >
# > In PPO it sits in the reward; KLQ has it in $Q$. If you also shape the reward for KLQ, you pay twice. Here is what
# > that does to the temporal-difference error: it is off by exactly one more penalty.

# %%
twice = lambda_returns(
    shaped, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam
).td_errors
extra = (twice - out.td_errors)[mask] / (tau * (logp - logq)[mask])
print(
    f"additional penalty, in units of τ log(π/π_b): {extra.min():.6f} to {extra.max():.6f}"
)

# %% [markdown]
# ## Claim 2: the same first gradient
#
# At the beginning of the first epoch $\theta = \theta_{old}$, so $Q_\theta - \hat G = -\alpha\Delta$. The gradient of a half
# square is the error times the gradient of $Q_\theta$:
#
# $$\nabla\,\tfrac12\,\mathbb{E}\big[(Q_\theta - \hat G)^2\big]\Big|_{\theta=\theta_{old}} = -\alpha\,\mathbb{E}\big[\Delta\,(\tau\,\nabla\log\pi_\theta + \nabla V_\theta)\big] \tag{7.4}$$
#
# The first part is the policy gradient, though nobody asked for one. We give every state its own logits and its own
# value, let autograd differentiate the library's loss, and type the right-hand side.

# %%
logits = old.log().clone().requires_grad_()
critic = V.clone().requires_grad_()


def at_batch():
    """Log-probs and values of the batch's tokens, differentiable."""
    log_policy = torch.log_softmax(logits, -1)
    return log_policy[batch.states, batch.tokens], critic[batch.states]


new_logp, new_values = at_batch()
loss = klq_loss(new_logp, logq, new_values, out.targets, mask, tau=tau)
klq_grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (logits, critic))])

new_logp, new_values = at_batch()
inner = (out.advantages * (tau * new_logp + new_values))[mask].mean()
by_hand = torch.autograd.grad(-alpha * inner, (logits, critic))
check.equation("7.4", klq_grad, torch.cat([g.flatten() for g in by_hand]))

# %% [markdown]
# **Which PPO has this gradient?** Its surrogate $-\mathbb{E}[\rho\hat A]$ has the gradient $-\mathbb{E}[\hat A\,\nabla\log\pi]$ at
# $\rho = 1$. Its value loss $\tfrac12\mathbb{E}(V - V_{old} - \hat A)^2$ has $-\mathbb{E}[\hat A\,\nabla V]$. To match (7.4) divided
# by $\alpha\tau$, the value loss needs the coefficient $1/\tau$:
#
# $$\nabla L_{KLQ} = \alpha\tau\,\nabla L_{PPO}, \qquad L_{PPO} = -\mathbb{E}[\rho\hat A] + \frac{1}{\tau}\cdot\tfrac12\,\mathbb{E}\big[(V - V_{old} - \hat A)^2\big] \tag{7.5}$$

# %%
new_logp, new_values = at_batch()
ppo = ppo_clip_loss(new_logp, logp, advantages, mask, clip=0.2)
ppo = ppo + value_loss(new_values, values + advantages, mask) / tau
ppo_grad = torch.cat([g.flatten() for g in torch.autograd.grad(ppo, (logits, critic))])
check.equation("7.5", klq_grad, alpha * tau * ppo_grad)

# %% [markdown]
# The clip is switched on in that check, and does nothing: no ratio has moved yet. But look at the coefficient. At the
# paper's $\tau = 0.05$ it is **20**, where PPO implementations use 0.1 to 1. On a trunk shared by policy and
# critic, that factor decides whose gradient wins; there this library's trainer multiplies the critic's share of the trunk's gradient
# by $\tau$, unless told otherwise. The common factor $\alpha\tau$, on the other hand, hardly matters: it is a learning rate, and
# Adam, which divides by the gradient's own size, nearly cancels it.
#
# ## Claim 3: the same finite step
#
# Now leave gradients and ask where the regression *ends*. With a table for $\pi$ and $V$ it can fit every target
# $Q_{old} + \alpha\Delta$ exactly. Then the new policy is the Boltzmann policy of the target (notebook 01), and since
# $\pi_b\,e^{Q_{old}/\tau} \propto \pi_{old}$, the reference drops out:
#
# $$\pi_{new} \propto \pi_b\,e^{(Q_{old} + \alpha\Delta)/\tau} \propto \pi_{old}\,e^{\alpha\Delta/\tau} \tag{7.6}$$
#
# In this section $\Delta$ is a table as well: one number for each state and token, the mean of $\Delta_t$ there at $\lambda = 1$.

# %%
Q_old = action_values(old, V, tree.ref, tau)
Delta = tree.evaluate(old, tau, gamma)[0] - Q_old
new, new_V = klq_step(old, V, Delta, tree.ref, tau, alpha)
typed = old * (alpha * Delta / tau).exp()
check.equation("7.6", new, typed / typed.sum(-1, keepdim=True))

# %% [markdown]
# Where does PPO's penalty version end, the one that subtracts $\beta D(\pi\|\pi_{old})$ instead of clipping? We need its objective
# first, in each state. Three moves lead from the surrogate to it and to its $\beta$.
#
# **First move.** Write $\hat A$ out. It is $\Delta$, what (7.2) and (7.3) make of the rewards of (7.1), so
# $\hat A = (Q_{old} + \Delta) - V_{old} - \tau\log\frac{\pi_{old}}{\pi_b}$. (The last two
# are $-Q_{old}$, which cancels: that is why $\hat A$ *is* $\Delta$.) A mean over $\pi_{old}$ with weight $\rho$ is a mean over $\pi$:
#
# $$\mathbb{E}_{\pi_{old}}[\rho\hat A] = \mathbb{E}_\pi[Q_{old} + \Delta] - V_{old} - \tau\,\mathbb{E}_\pi\left[\log\frac{\pi_{old}}{\pi_b}\right] \tag{7.7}$$
#
# The log-ratio in the last term is *frozen*: it was computed when the batch was sampled. As $\pi$ moves, it is weighed anew, but $\pi_{old}$ stays inside.
# For the check we make $\hat A$ by PPO's route alone, from KL-shaped rewards and $V$, back from the last token. A thousand random
# policies in the first state go through the library's surrogate, its clip out of reach. (It takes a plain mean over the
# four tokens; the factor $4\,\pi_{old}$ makes of that a mean under $\pi_{old}$.)

# %%
frozen = kl_shaped_rewards(tree.rewards, old.log(), tree.ref.log(), tau)
A_hat = torch.zeros_like(old)
for level in reversed(tree.levels):
    after = tree.children[level]
    worth = torch.where(after >= 0, (V + (old * A_hat).sum(-1))[after], 0.0)
    A_hat[level] = frozen[level] + gamma * worth - V[level, None]
check.equation("7.7", A_hat, Delta)


def surrogate_at(policy, state=0):
    """E_old[ρÂ] in one state, with all its tokens."""
    weighted, each = 4 * old[state] * A_hat[state], torch.ones(4).bool()
    return -ppo_clip_loss(policy.log(), old[state].log(), weighted, each, clip=1e9)


rivals = torch.softmax(2 * torch.randn(1000, 4), -1)
surrogates = torch.stack([surrogate_at(policy) for policy in rivals])
gain = rivals @ (Q_old + Delta)[0]
kept = tau * rivals @ (old[0] / tree.ref[0]).log()
check.equation("7.7", surrogates, gain - V[0] - kept)

# %% [markdown]
# **Second move.** The paper's PPO-penalty charges the KL to $\pi_b$ *afresh*, as notebook 02 does, for the policy that is being chosen:
# $\tau\log\frac{\pi}{\pi_b}$ replaces $\tau\log\frac{\pi_{old}}{\pi_b}$. That is another objective than the surrogate with its frozen KL. How far
# apart are they? The mean of the difference under $\pi$ is $\tau D(\pi\|\pi_{old})$:
#
# $$\mathbb{E}_{\pi_{old}}[\rho\hat A] - \tau D(\pi\|\pi_{old}) = \mathbb{E}_\pi[Q_{old} + \Delta] - \tau D(\pi\|\pi_b) - V_{old} \tag{7.8}$$
#
# So a fresh price for leaving the reference *is* a frozen one and a brake against leaving $\pi_{old}$. A trainer, which freezes, needs
# $\tau$ more of that brake for the same objective. (At $\Delta = 0$ the surrogate is 0,
# and this is (1.6) of notebook 01 for $Q_{old}$, whose Boltzmann policy is $\pi_{old}$.)

# %%
ref0, old0 = tree.ref[0].expand(1000, 4), old[0].expand(1000, 4)
to_ref = kl_divergence(rivals.log(), ref0.log())
to_old = kl_divergence(rivals.log(), old0.log())
check.equation("7.8", surrogates - tau * to_old, gain - tau * to_ref - V[0])
check.equation("7.8", -tau * to_old, rivals @ Q_old[0] - tau * to_ref - V[0])

# %% [markdown]
# PPO with a penalty maximises the right-hand side less $\beta D(\pi\|\pi_{old})$. By (7.8) both penalties merge, and only the advantage
# is left of $Q$ (the surrogate is $\mathbb{E}_\pi[\Delta]$ here):
#
# $$\mathbb{E}_\pi[Q_{old} + \Delta] - \tau D(\pi\|\pi_b) - \beta D(\pi\|\pi_{old}) = V_{old} + \mathbb{E}_\pi[\Delta] - (\tau + \beta)\,D(\pi\|\pi_{old}) \tag{7.9}$$

# %%
beta = penalty_coefficient(tau, alpha)
left = gain - tau * to_ref - beta * to_old
check.equation("7.9", left, V[0] + rivals @ Delta[0] - (tau + beta) * to_old)

# %% [markdown]
# **Third move.** By notebook 01 the best policy of the right-hand side is $\pi_{old}\,e^{\Delta/(\tau+\beta)}$, normalised.
# Compare with (7.6): they agree when $\tau + \beta = \tau/\alpha$, that is, for the paper's (18),
#
# $$\beta = \frac{\tau\,(1-\alpha)}{\alpha} \tag{7.10}$$
#
# This is an equation about algorithms, so we check it on them: the library's PPO-penalty step against its KLQ step, in
# every state, for several $\alpha$, with this $\beta$ typed in.

# %%
for a in (0.1, 0.3, 0.7, 1.0):
    step = klq_step(old, V, Delta, tree.ref, tau, a)[0]
    penalty = ppo_penalty_step(old, Q_old + Delta, tree.ref, tau, tau * (1 - a) / a)
    check.equation("7.10", penalty, step)
check.equation("7.10", torch.tensor(beta), torch.tensor(tau * (1 - alpha) / alpha))

# %% [markdown]
# **Read it.** A small step size is a strong penalty: $\alpha = 0.1$ means $\beta = 9\tau$. At $\alpha = 1$ there is no
# proximal penalty at all, and KLQ takes the full soft policy improvement of notebook 02, held by the reference
# alone.
#
# **Which one do I set in a trainer?** A trainer keeps $\hat A = \Delta$, with the KL to $\pi_b$ frozen into it by (7.3), and adds a
# penalty $c\,D(\pi\|\pi_{old})$ to $-\mathbb{E}[\rho\hat A]$. Then $Q_{old}$ and the reference are gone from the objective, (7.9) has been
# used already, and the right coefficient is not $\beta$ but
#
# $$\tau + \beta = \frac{\tau}{\alpha}, \qquad \pi_{new} = \text{argmax}_\pi\; \mathbb{E}_\pi[\Delta] - \frac{\tau}{\alpha}\,D(\pi\|\pi_{old}) \tag{7.11}$$

# %%
bare, best = kl_penalised_argmax(Delta, (old, tau / alpha))
check.equation("7.11", bare, new)

# %% [markdown]
# Does a trainer that minimises the library's `ppo_penalty_loss` end there? Give it every token of every state. Its value at $\pi_{new}$ must
# be minus the maximum in (7.11), no other policy may get below, and its gradient must vanish there. At $\pi_{old}$ the penalty is flat: the
# gradient is the bare surrogate's, whatever the coefficient.

# %%
everywhere = torch.ones_like(old, dtype=torch.bool)


def trainer_loss(policy, c=tau / alpha):
    kl = kl_divergence(policy.log(), old.log())[:, None].expand_as(old)
    weighted = 4 * old * Delta
    return ppo_penalty_loss(
        policy.log(), old.log(), weighted, everywhere, coef=c, kl=kl
    )


check.equation("7.11", trainer_loss(new), -best.mean())
others = torch.softmax(new.log() + 0.3 * torch.randn(100, *new.shape), -1)
losses = torch.stack([trainer_loss(other) for other in others])
check.inequality("7.11", -best.mean().expand(100), losses)


def slope(policy, c=tau / alpha):
    """Gradient of the trainer's loss in the logits of every state."""
    z = policy.log().requires_grad_()
    return torch.autograd.grad(trainer_loss(torch.softmax(z, -1), c), z)[0]


surrogate_slope = -old * (Delta - (old * Delta).sum(-1, keepdim=True)) / len(old)
check.equation("7.11", slope(new), torch.zeros_like(new))
for c in (0.1, beta, tau / alpha):
    check.equation("7.11", slope(old, c), surrogate_slope)
    print(f"c = {c:.2f}: slope at KLQ's policy {slope(new, c).norm():.0e}")

# %% [markdown]
# It is a trap that has caught many readers: $c = \tau/\alpha$ beside the bare advantage, $\beta = \tau/\alpha - \tau$ beside $Q_{old} + \Delta$ and
# the reference. (PPO as published penalises $D(\pi_{old}\|\pi)$, the other direction, for which the best step has no such closed
# form. Near $\pi_{old}$ the two hardly differ.)
#
# And the *values*? Claim 3 is about policies. Fitted exactly, PPO's critic ends at $V_{old} + \mathbb{E}_{\pi_{old}}[\Delta]$, a plain mean;
# KLQ's ends, by (6.8), at a soft mean, $V_{old} + \tau\log\mathbb{E}_{\pi_{old}}[e^{\alpha\Delta/\tau}]$, which goes about $\alpha$ of the way. They differ
# even at $\alpha = 1$:

# %%
ppo_V = V + (old * Delta).sum(-1)
for a in (0.1, 0.3, 1.0):
    klq_V = klq_step(old, V, Delta, tree.ref, tau, a)[1]
    moved = (klq_V - V).norm() / (ppo_V - V).norm()
    print(f"α = {a}: KLQ's values move {moved:.2f} times as far", end=", ")
    print(f"largest difference {(klq_V - ppo_V).abs().max():.2f}")

# %% [markdown]
# The figure shows both, the right way and the trap. Each dot is one token in one state.

# %%
show(exact_steps())

# %% [markdown]
# The library takes both steps with one function; here they are.

# %%
source(klq_step)
source(ppo_penalty_step)

# %% [markdown]
# ## The penalty hidden in the square
#
# Claim 3 speaks of tables and exact fits. What does KLQ do to a *sampled* token? Hold $V$ at $V_{old}$ and write
# $\ell = \log\frac{\pi}{\pi_{old}}$, a log-ratio to the *old* policy now. Then $Q_\theta - \hat G = \tau\ell - \alpha\Delta$, and the square has three terms:
#
# $$\tfrac12(\tau\ell - \alpha\Delta)^2 = \alpha\tau\left[-\Delta\,\ell + \frac{\tau}{\alpha}\cdot\tfrac12\,\ell^2\right] + \tfrac12\alpha^2\Delta^2 \tag{7.12}$$
#
# The first is PPO's surrogate with $\log\rho$ in place of $\rho$. The second is the estimator $k_2 = \tfrac12\ell^2$ of notebook
# 04, a sampled penalty on $D(\pi\|\pi_{old})$ with just the coefficient $\tau/\alpha$ of (7.11), right to second order in $\ell$, since the
# samples come from $\pi_{old}$ and not from $\pi$. The third does not depend on $\theta$. So one
# square holds PPO's gain *and* PPO's brake.

# %%
ell = 0.3 * torch.randn(mask.shape)
square = klq_loss(
    logp + ell, logq, values, out.targets, mask, tau=tau, reduction="none"
)
D = out.advantages
parts = alpha * tau * (-D * ell + tau / alpha * 0.5 * ell**2) + 0.5 * (alpha * D) ** 2
check.equation("7.12", square[mask], parts[mask])

# %% [markdown]
# Now differentiate. Beside it put PPO with a penalty of weight $c$ on the same samples. The library estimates $D(\pi\|\pi_{old})$ by
# $\rho\log\rho - \rho + 1$, whose derivative in $\log\pi$ is $\rho\,\ell$:
#
# $$\frac{1}{\alpha\tau}\nabla L_{KLQ} = \mathbb{E}\Big[\Big(\frac{\tau}{\alpha}\,\ell - \Delta\Big)\nabla\log\pi\Big], \qquad \nabla L_{pen} = \mathbb{E}\Big[\rho\,(c\,\ell - \Delta)\,\nabla\log\pi\Big] \tag{7.13}$$
#
# At $\pi_{old}$, where $\rho = 1$ and $\ell = 0$, both are the policy gradient, whatever $c$ is. Away from it they agree, token by token, up to
# the weight $\rho$, if and only if $c = \tau/\alpha$: both pull a token towards $\ell = \alpha\Delta/\tau$, which is (7.6) again. With $c = \beta$ PPO pulls
# it further.


# %%
def gradient_at(new_logp, c=None):
    """Per token: of PPO with penalty c, or of KLQ divided by ατ where c is None."""
    new_logp = new_logp.detach().requires_grad_()
    if c is None:
        loss = klq_loss(new_logp, logq, values, out.targets, mask, tau=tau)
        return torch.autograd.grad(loss / (alpha * tau), new_logp)[0]
    loss = ppo_penalty_loss(new_logp, logp, D, mask, coef=c)
    return torch.autograd.grad(loss, new_logp)[0]


rho, N = ell.exp(), mask.sum()
pull = torch.where(mask, tau / alpha * ell - D, 0.0)
check.equation("7.13", gradient_at(logp + ell), pull / N)
check.equation("7.13", gradient_at(logp + ell, tau / alpha), rho * pull / N)
for c in (tau / alpha, beta):
    check.equation("7.13", gradient_at(logp, c), gradient_at(logp))
    apart = gradient_at(logp + ell, c) / rho - gradient_at(logp + ell)
    print(f"c = {c:.2f}: apart by {apart.norm() / gradient_at(logp + ell).norm():.0e}")

# %% [markdown]
# ## Where it stops
#
# All three claims assume things that PPO in practice does not do. So we leave the tree and take a real model: a
# small transformer that has learnt a little grammar, trained by three KLQ updates, and the batch it samples next. On
# this batch we compute both gradients, in all its parameters, and switch PPO's habits on.
#
# **Predict**, for the policy's parameters and for the critic's: which of these drive the gradients apart, at the first step and in a
# second epoch? Clipping the ratios; clipping the values; a value coefficient of 1; whitening, or only one half of it: centring, scaling.
# (For the second epoch both networks have taken a step down KLQ's gradient, long enough for some ratios to leave the clip.)

# %%
policy, rollout, config = grammar_batch()
print(f"τ = {config.tau}, so KLQ's value coefficient is {1 / config.tau:g}")
print(rollout.completions[:3])
moved_rho, moved_V = second_epoch()
print(f"second epoch: ρ from {moved_rho.min():.2f} to {moved_rho.max():.2f}", end=", ")
print(f"{((moved_rho - 1).abs() > 0.2).double().mean():.0%} of them beyond the clip")
print(f"{(moved_V.abs() > 0.2).double().mean():.0%} of the values moved by over 0.2")
explore(GAP)

# %% [markdown]
# **Explain.** With nothing switched on, the gap is the rounding of float32: claim 2 holds on a neural network just as on
# a table, since it never used the table. Now the sizes, habit by habit. We compare a gradient $g$ with the one it would be,
# $g_0$: plain PPO with KLQ (divided by $\alpha\tau$) in the first line, and PPO with one habit with plain PPO, at the same
# place, in the others. Each habit either does nothing or does much,
#
# $$\frac{\|g - g_0\|}{\|g_0\|} \le 10^{-5} \qquad\text{or}\qquad \frac{\|g - g_0\|}{\|g_0\|} \ge 0.3 \tag{7.14}$$
#
# and which one it is we say before we look: 1 for much, 0 for nothing.

# %%
sizes = habits()
changes = {  # first step: policy, critic; second epoch: policy, critic
    "plain PPO (from KLQ)": (0, 0, 1, 1),
    "ratios clipped": (0, 0, 1, 0),
    "values clipped": (0, 0, 0, 1),
    "value coefficient 1": (0, 1, 0, 1),
    "centred": (1, 0, 1, 0),
    "scaled": (1, 0, 1, 0),
    "whitened": (1, 0, 1, 0),
}
said = torch.tensor([changes[name] for name in sizes.index]).bool()
found = torch.tensor(sizes.to_numpy())
check.inequality("7.14", found[~said], torch.full_like(found[~said], 1e-5))
check.inequality("7.14", torch.full_like(found[said], 0.3), found[said])
assert abs(sizes.iloc[3, 1] - (1 - config.tau)) < 1e-5  # value coefficient 1
gains = make_targets(rollout, config).advantages[rollout.mask]
spread = gains.std(correction=0).item()
assert abs(sizes.loc["scaled"].iloc[0] - abs(1 - 1 / spread)) < 1e-4
print(f"σ of this batch's Δ: {spread:.3f}, |1 − 1/σ| = {abs(1 - 1 / spread):.1e}")
cosines = {name: turn(name) for name in ("centred", "scaled")}
assert cosines["centred"] < 0.99 and cosines["scaled"] > 0.999
print("cosine with plain PPO's gradient:", {k: round(x, 3) for k, x in cosines.items()})
sizes.style.format("{:.1e}")

# %% [markdown]
# - *Clipping* is a rule about ratios, or values, that have moved. At the first step none has, so it changes nothing; later it stops
#   the gradient of some tokens, where KLQ's square pulls them back.
# - *The value coefficient* rescales the critic's part of (7.4) and leaves the policy's alone: from $1/\tau$ to 1 it loses $1 - \tau$.
# - *A second epoch* starts away from $\theta_{old}$. There KLQ's error contains $\tau\ell$, the brake of (7.12), which plain
#   PPO lacks, and PPO has a ratio $\rho$, which KLQ lacks; and $V$ has moved, which couples policy and critic in KLQ only. The gap grows
#   from 0 with the first step.
# - *Whitening* is two habits, centring and scaling, for the policy's part. Both make another estimator, so claim 1 is gone before
#   any gradient is taken. They are not equally bad: centring turns the gradient, as its cosine tells, scaling only changes its length. The number of
#   *scaled* is $|1 - 1/\sigma|$, with the standard deviation $\sigma$ of this batch's $\Delta$; another batch has another.
# - A gap above 1, as of *values clipped*, is no slip: the full gradient is small because its tokens pull against each other, and
#   those that are left no longer cancel.
#
# The clips and whitening in formulas. PPO-clip maximises the mean of the smaller one of $\rho\hat A$ and $\mathrm{clamp}(\rho, 1\pm\varepsilon)\,\hat A$.
# Which is smaller? That depends on the sign of $\hat A$:
#
# $$\min\left(\rho\hat A,\; \mathrm{clamp}(\rho, 1\pm\varepsilon)\,\hat A\right) = \hat A\min(\rho, 1+\varepsilon) \text{ if } \hat A \ge 0,\; \hat A\max(\rho, 1-\varepsilon) \text{ else} \tag{7.15}$$
#
# A good token earns nothing beyond $1+\varepsilon$, a bad one nothing below $1-\varepsilon$. The other two sides stay open, so a step in the wrong
# direction can be taken back. (With a maximum instead it would be the other way round.) The clip never promises more than $\rho\hat A$.

# %%
eps = 0.2
capped = torch.where(D >= 0, rho.clamp(max=1 + eps), rho.clamp(min=1 - eps)) * D
surrogate = -ppo_clip_loss(logp + ell, logp, D, mask, clip=eps)
check.equation("7.15", surrogate, capped[mask].mean())
check.inequality("7.15", surrogate, (rho * D)[mask].mean())

# %% [markdown]
# Many implementations clip the value head as well. With $G = V_{old} + \hat A$ they minimise
#
# $$L_V = \tfrac12\,\mathbb{E}\left[\max\left((V - G)^2,\; (\mathrm{clamp}(V,\, V_{old}\pm\varepsilon) - G)^2\right)\right] \;\ge\; \tfrac12\,\mathbb{E}\left[(V - G)^2\right] \tag{7.16}$$
#
# Where $V$ has left the interval $V_{old}\pm\varepsilon$ and is nearer to $G$ than the edge that it crossed, the clamped error is the larger
# one, and it does not depend on $V$: such a value gets no gradient, however far it still has to go.

# %%
V_now = (values + 0.3 * torch.randn(mask.shape)).requires_grad_()
G = values + D
near = torch.minimum(torch.maximum(V_now, values - eps), values + eps)
typed = 0.5 * torch.maximum((V_now - G) ** 2, (near - G) ** 2)[mask].mean()
clipped = value_loss(V_now, G, mask, clip=eps, old_values=values)
check.equation("7.16", clipped, typed)
check.inequality("7.16", value_loss(V_now, G, mask), clipped)
still = torch.autograd.grad(clipped, V_now)[0][mask] == 0
nearer = (near != V_now) & ((V_now - G).abs() < (near - G).abs())
check.equation("7.16", still.double(), nearer[mask].double())
print(f"without a gradient: {still.double().mean():.0%} of the values")

# %% [markdown]
# Whitening, with the mean $\bar\Delta$ and the standard deviation $\sigma$ of all $\Delta$ in the batch:
#
# $$\hat A^{white}_t = \frac{\Delta_t - \bar\Delta}{\sigma} \tag{7.17}$$

# %%
real, white = D[mask], whiten(D, mask)[mask]
mean, sigma = real.mean(), real.std(correction=0)
check.equation("7.17", white, (real - mean) / (sigma + 1e-8))  # σ may be 0
turned = (white.sign() != real.sign()).double().mean()
print(f"mean {mean:.2f}, σ {sigma:.2f}: {turned:.0%} of the signs change")

# %% [markdown]
# What does each half do to the surrogate's gradient, $g(\hat A) = -\mathbb{E}[\hat A\,\nabla\log\pi]$?
#
# $$g\Big(\frac{\Delta}{\sigma}\Big) = \frac{1}{\sigma}\,g(\Delta), \qquad g(\Delta - \bar\Delta) = g(\Delta) + \bar\Delta\,\mathbb{E}[\nabla\log\pi] \tag{7.18}$$
#
# *Scaling* is another step size, for the policy alone: the direction stays, but against the critic's part the policy's weight changes, as
# with another value coefficient. *Centring* turns signs: a token that went worse than expected, but not as badly as the average token,
# is made *more* likely. For PPO that is harmless on average. Over all tokens of a state $\mathbb{E}_{\pi_{old}}[\nabla\log\pi] = \sum_a\nabla\pi = 0$, so $\bar\Delta$ is what
# is called a *baseline*: what it changes is noise of the batch.


# %%
def policy_gradient(advantage):
    loss = ppo_clip_loss(at_batch()[0], logp, advantage, mask)
    return torch.autograd.grad(loss, logits)[0]


plain_gradient = policy_gradient(D)
score = torch.autograd.grad(at_batch()[0][mask].mean(), logits)[0]
check.equation("7.18", policy_gradient(D / sigma), plain_gradient / sigma)
check.equation("7.18", policy_gradient(D - mean), plain_gradient + mean * score)
over_all_tokens = (old * torch.log_softmax(logits, -1)).sum()
average_score = torch.autograd.grad(over_all_tokens, logits)[0]
check.equation("7.18", average_score, torch.zeros_like(old))
for name, change in (("scaling", 1 / sigma - 1), ("centring", mean)):
    added = change * (plain_gradient if name == "scaling" else score)
    print(f"{name}: changes it by {added.norm() / plain_gradient.norm():.0%} here")

# %% [markdown]
# KLQ has no such baseline; $V$ does its work. Take $\bar\Delta$ off every $\Delta$ in KLQ's targets, and by (7.4) the gradient changes by
#
# $$\nabla L_{KLQ}(\Delta - \bar\Delta) - \nabla L_{KLQ}(\Delta) = \alpha\,\bar\Delta\;\mathbb{E}[\tau\,\nabla\log\pi + \nabla V] \tag{7.19}$$
#
# The first part is noise as before. The second is not: it has the same sign in every state, and no average makes it vanish. All values are
# pulled to a level that is wrong by $\alpha\bar\Delta$. PPO is spared that, since its value head is fitted to the unwhitened $V_{old} + \Delta$.

# %%
new_logp, new_values = at_batch()
loss = klq_loss(new_logp, logq, new_values, out.targets - alpha * mean, mask, tau=tau)
centred = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (logits, critic))])
new_logp, new_values = at_batch()
inner = (tau * new_logp + new_values)[mask].mean()
shift = [alpha * mean * g for g in torch.autograd.grad(inner, (logits, critic))]
check.equation("7.19", centred - klq_grad, torch.cat([g.flatten() for g in shift]))
print(f"added in all to the slope of V: {shift[1].sum():.3f}, α times the mean")
print(f"state by state: from {shift[1].min():.3f} to {shift[1].max():.3f}")
assert (shift[1] * mean >= 0).all()

# %% [markdown]
# > **People ask: so is KLQ just PPO?**
# >
# > One exact step is, and one gradient is. Training is many steps with sampled tokens and shared weights, and there
# > KLQ is a PPO with five choices made for you: $\log\rho$ for $\rho$, a squared-log-ratio brake of weight $\tau/\alpha$
# > instead of a clip, the value coefficient $1/\tau$, a value that goes $\alpha$ of the way, and no whitening. Whether that is better is
# > for experiments to say: `klq demo` runs one.
#
# So how did your bets on the four rows come out?
#
# | row | same thing? | needs | ends with |
# |---|---|---|---|
# | the KL to $\pi_b$ | yes, moved across a minus sign (7.2) | nothing | a KL added to the reward of KLQ |
# | $\Delta$ and $\hat A$ | yes, the same number (7.3) | equal $\gamma$, $\lambda$, $V$ | whitening |
# | square and surrogate | same gradient up to $\alpha\tau$ (7.5) | $\theta = \theta_{old}$, value coefficient $1/\tau$ | the second epoch |
# | $\alpha$ and penalty | same policy (7.10), other values | a table, all tokens, exact fits | sampled tokens, shared weights, the clip |
#
# ## Exercises
#
# ### Exercise 7.1 · From step size to penalty
#
# A colleague wants to take KLQ's step with a PPO that has a penalty $c\,D(\pi\|\pi_{old})$. Return the pair of coefficients: the first
# beside $Q_{old} + \Delta$ and $\tau D(\pi\|\pi_b)$, the second beside the bare advantage. (And what happens to both as $\alpha \to 0$?)
#
# <!-- hints 7.1 -->


# %%
def my_coefficients(tau, alpha):
    # BEGIN SOLUTION
    return tau * (1 - alpha) / alpha, tau / alpha
    # END SOLUTION


check.exercise("7.1", my_coefficients)

# %% [markdown]
# ### Exercise 7.2 · One step, two anchors
#
# Return $\text{argmax}_\pi\, \mathbb{E}_\pi[q] - \tau D(\pi\|\pi_b) - \beta D(\pi\|\pi_{old})$ for one state: `old` and `ref` are
# probabilities, and they and `q` have shape [A].
#
# <!-- hints 7.2 -->


# %%
def my_penalty_step(old, ref, q, tau, beta):
    # BEGIN SOLUTION
    return torch.softmax((q + tau * ref.log() + beta * old.log()) / (tau + beta), -1)
    # END SOLUTION


check.exercise("7.2", my_penalty_step)

# %% [markdown]
# ### Exercise 7.3 · The PPO that takes KLQ's first step
#
# Write PPO's loss (without clip, a plain mean over tokens) so that its gradient at $\theta_{old}$ is KLQ's, divided by
# $\alpha\tau$. All tensors have shape [N]; the check differentiates your loss in `logprobs` and `values`, at the old ones and away from
# them. So KLQ's own square won't do: it has the same gradient at $\theta_{old}$ and parts from PPO there.
#
# <!-- hints 7.3 -->


# %%
def my_matching_ppo(logprobs, old_logprobs, values, old_values, advantages, tau):
    # BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    value_error = values - (old_values + advantages)
    return -(ratio * advantages).mean() + 0.5 * (value_error**2).mean() / tau
    # END SOLUTION


check.exercise("7.3", my_matching_ppo)

# %% [markdown]
# ### Open question
#
# Which of these survive into the second epoch on the same batch, and why: (a) $\Delta$ equals the GAE advantage; (b)
# KLQ's gradient is $\alpha\tau$ times PPO's; (c) the exact minimiser of KLQ's regression is the PPO-penalty step; (d) the
# square contains a KL penalty of weight $\tau/\alpha$?
#
# *What a good answer contains:* a verdict for each (4 points), the reason (4), and for the one that fails, the term that
# makes it fail (2).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# (a) survives: $\Delta$ was computed before the first step and does not change. (b) fails: away from $\theta_{old}$ KLQ's
# error is $\tau\ell - \alpha\Delta + (V - V_{old})$ instead of $-\alpha\Delta$. The new terms are the brake $\tau\ell$ and a
# coupling between critic and policy, and on PPO's side the ratio $\rho$ appears. (c) survives: where the minimum lies does not
# depend on how far we are on the way. It needs a table and all tokens, in every epoch. (d) survives as a term: now
# that $V$ has moved, the square gains a cross term $\tau\ell\,(V - V_{old})$ and terms without $\ell$, but $\tfrac12\tau^2\ell^2$ stands. Read as an
# *estimate* of $D(\pi\|\pi_{old})$ it is good to second order only, since the samples come from $\pi_{old}$.
#
# </details>

# %% [markdown]
# ## Remember
#
# The penalty moves from the reward into $Q$: same $\delta$, same $\Delta$ (7.2, 7.3). The first gradient is PPO's with value
# coefficient $1/\tau$ (7.5). The exact step is PPO-penalty with $\beta = \tau(1-\alpha)/\alpha$ beside $\tau D(\pi\|\pi_b)$ (7.10),
# or $\tau/\alpha$ beside the bare advantage (7.11). It stops at whitening, at clipping once ratios or values have moved, at a second
# epoch, and at every other value coefficient (7.14).
#
# *In the library:* `klq_edu.core.improvement` (`klq_step`, `ppo_penalty_step`, `penalty_coefficient`),
# `klq_edu.core.returns` (`gae`, `lambda_returns`), and `klq_edu.rlhf.algorithms`, where both algorithms stand on one
# page. *Next:* notebook 08 turns the formulas into a loop, breaks it and repairs it; `make demo` lets the two race.

# %%
check.ledger()
